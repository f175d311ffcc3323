"""Nets whose weights a hypernetwork generates for each task (von Oswald et al. 2020, arXiv 1906.00695)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from clplat.learners.nets.heads import TaskHead
from clplat.learners.nets.net import Net
from clplat.per_task.generators import Generator, Piece
from clplat.per_task.net import PerTaskNet, Tasks
from clplat.streams.loader import stable_seed

DRAWN = 4096
"""A tensor's first entries, by which it is told whether they were drawn."""


class TaskEmbeddings(Tasks):
    """One embedding e_t [E] a task: a parameter while the task is learned, a constant afterwards.

    Embeddings start from N(0, std^2), drawn by the task's place among those of the stream, so that a task not met yet
    has one too.

    Args:
        width: E.
        std: of the initial values.
        seed: of these.
    """

    learned: Tensor | None

    def __init__(self, width: int, std: float, seed: int) -> None:
        super().__init__()
        self.std, self.seed = std, seed
        self.current = nn.Parameter(torch.zeros(width))
        self.register_buffer("learned", None)  # [K, E]

    def initial(self, label: int) -> Tensor:
        """The embedding [E] that a task starts from."""
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "task embedding", self.place(label)))
        drawn = self.std * torch.randn(len(self.current), generator=generator)
        return drawn.to(self.current)

    def embedding(self, label: int) -> Tensor:
        """The embedding [E] of a task: the parameter, the learned constant, or the initial one."""
        if self.learning(label):
            return self.current
        if label in self.labels and self.learned is not None:
            return self.learned[self.labels.index(label)]
        return self.initial(label)

    @torch.no_grad()
    def start(self, label: int) -> None:
        """Begin to learn a task, from its initial embedding, or where it ended if it was learned before."""
        super().start(label)
        old = label in self.labels and self.learned is not None
        self.current.copy_(
            self.learned[self.labels.index(label)] if old and self.learned is not None else self.initial(label)
        )

    @torch.no_grad()
    def finish(self) -> None:
        """Freeze the active task's embedding."""
        again = self.active in self.labels
        super().finish()
        mine = self.current.detach().clone()[None]
        if self.learned is None:
            self.learned = mine
        elif again and self.active is not None:
            self.learned[self.labels.index(self.active)] = mine[0]
        else:
            self.learned = torch.cat([self.learned, mine])


class GeneratedNet(PerTaskNet):
    """A net all of whose weights are generated: W = h(e_t, Theta) for the batch's task t.

    The target's own parameters are given up; the trainable ones are the generator's (Theta) and the embedding of the
    task being learned. Vectors (biases, gains), and other tensors whose initial values follow a rule, are
    generated as a difference to these, so that a normalisation starts as one, and a state space model with the decays
    and frequencies that it is made with. Weights are generated in the parameters' precision under autocast too.

    Args:
        target: the net whose weights are generated; it is changed.
        tasks: the embeddings.
        make: makes the generator from the pieces.
    """

    generator: Generator
    offset: Tensor

    def __init__(self, target: Net, tasks: TaskEmbeddings, make: Callable[[Sequence[Piece]], Generator]) -> None:
        super().__init__(target, tasks)
        self.pieces, offset = _take_over(target)
        self.register_buffer("offset", offset)  # of all pieces with std 0, one after the other
        self.generator = make(self.pieces)

    @property
    def embeddings(self) -> TaskEmbeddings:
        """The task embeddings: what `tasks` is here."""
        assert isinstance(self.tasks, TaskEmbeddings)
        return self.tasks

    @property
    def size(self) -> int:
        """W, the number of weights that are generated."""
        return sum(p.size for p in self.pieces)

    def weights_for(self, label: int) -> dict[str, Tensor]:
        """The target's weights for a task, by name."""
        with torch.autocast(self.offset.device.type, enabled=False):
            flat, _ = self.generator(self.embeddings.embedding(label)[None])
        weights: dict[str, Tensor] = {}
        ruled = [p.size for p in self.pieces if not p.std]
        offsets = iter(self.offset.split(ruled) if ruled else ())
        for piece, values in zip(self.pieces, flat[0].split([p.size for p in self.pieces]), strict=True):
            whole = values if piece.std else values + next(offsets)
            weights.update({name: whole.view(piece.shape) for name in piece.names})
        return weights

    def owned(self, labels: Sequence[int]) -> Tensor | None:
        """[J, W_head] 1 for the outputs of each task in `labels`, 0 for other tasks'; None where all share the head.

        W_head are the weights of the head, which are the last of all.
        """
        head = self.template.head
        if not isinstance(head, TaskHead):
            return None
        columns = head.offered(labels)  # [J, C]
        rows = head.linear.out_features
        own = torch.zeros(len(labels), rows + 1, device=columns.device)
        own.scatter_(1, columns.masked_fill(columns < 0, rows), 1.0)
        own = own[:, :rows]
        return torch.cat([own.repeat_interleave(head.linear.in_features, 1), own], 1)


def _take_over(target: Net) -> tuple[list[Piece], Tensor]:
    """Replace the target's parameters by empty buffers; what they were, and the values of those that were not drawn."""
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, p in target.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
        parameters[id(p)] = p
    pieces: list[Piece] = []
    offsets = [torch.zeros(0)]
    for key, p in parameters.items():
        std = float(p.detach().square().mean().sqrt()) if _drawn(p.detach()) else 0.0
        if not std:
            offsets.append(p.detach().flatten().clone())
        pieces.append(Piece(tuple(names[key]), tuple(p.shape), std))
        for name in names[key]:
            path, _, last = name.rpartition(".")
            module = target.get_submodule(path)
            delattr(module, last)
            module.register_buffer(last, None, persistent=False)
            setattr(module, last, torch.empty(0))  # by attribute, for recurrent modules that keep a list of their own
    return pieces, torch.cat(offsets)


def _drawn(value: Tensor) -> bool:
    """Whether a tensor holds random draws, which repeat hardly ever. Those of a vector are kept whatever they are."""
    some = value.flatten()[:DRAWN]
    return value.ndim >= 2 and len(some.unique()) > len(some) / 2
