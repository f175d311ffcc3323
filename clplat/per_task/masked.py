"""A net with one set of shared matrices and a binary mask on them for each task.

Letters: K tasks learned, M entries of all masked matrices, O entries of all tensors that each task has its own of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat.learners.nets.net import Net
from clplat.per_task.net import PerTaskNet, Tasks


def pack(bits: Tensor) -> Tensor:
    """[ceil(M / 8)] uint8 of [M] bool, the first of eight in the lowest bit."""
    padded = F.pad(bits.to(torch.uint8), [0, -len(bits) % 8]).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, size: int) -> Tensor:
    """The `size` bits [M] that `pack` was given."""
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).bool().flatten()[:size]


class TaskMasks(Tasks):
    """For each learned task its mask, a bit a weight, and the values of the tensors that it has its own of."""

    masks: Tensor | None
    values: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("masks", None)  # [K, ceil(M / 8)] uint8
        self.register_buffer("values", None)  # [K, O]

    def mask(self, label: int, size: int) -> Tensor:
        """[M] bool, the weights that a learned task uses."""
        assert self.masks is not None
        return unpack(self.masks[self.labels.index(label)], size)

    def own(self, label: int) -> Tensor:
        """[O], a learned task's own values."""
        assert self.values is not None
        return self.values[self.labels.index(label)]

    def keep(self, mask: Tensor, own: Tensor) -> None:
        """The active task is learned, with this mask [M] and these values [O]."""
        packed, again = pack(mask)[None], self.active in self.labels
        super().finish()
        if self.masks is None or self.values is None:
            self.masks, self.values = packed, own.clone()[None]
        elif again and self.active is not None:
            at = self.labels.index(self.active)
            self.masks[at], self.values[at] = packed[0], own
        else:
            self.masks, self.values = torch.cat([self.masks, packed]), torch.cat([self.values, own[None]])

    def used(self, labels: Sequence[int], size: int) -> Tensor:
        """[M] bool, the weights that at least one of the learned tasks `labels` uses."""
        whole = torch.zeros(size, dtype=torch.bool, device=None if self.masks is None else self.masks.device)
        for label in labels:
            whole |= self.mask(label, size)
        return whole


class MaskedNet(PerTaskNet):
    """Weight matrices (linear, recurrent, convolutional, embeddings) shared under masks; all else is each task's own.

    A learned task runs with W where its mask is set and 0 elsewhere. Biases, gains and the head, which the masks leave
    out, are kept as they were at its end. So as long as W does not change under the masks of learned tasks (`restore`
    sees to it), neither do their outputs, in any bit.

    The task being learned runs with W, its gates r in 0..1 (relevance maps: r(A); otherwise 1) and `alive`, the weights
    not pruned for it.

    Args:
        template: the net; its parameters stay the trainable ones.
        tasks: where masks are kept.
        sharpness: of the relevance r(a) = sigmoid(sharpness * (a - 1/2)) of trained maps A; None: there are no maps.

    Raises:
        ValueError: there is no matrix besides the head's.
    """

    alive: Tensor

    def __init__(self, template: Net, tasks: TaskMasks, sharpness: float | None = None) -> None:
        super().__init__(template, tasks)
        self.sharpness = sharpness
        named = dict(template.named_parameters())
        head = {id(p) for p in template.head.parameters()}
        self.matrices = [name for name, p in named.items() if p.ndim >= 2 and id(p) not in head]
        self.others = [name for name in named if name not in set(self.matrices)]
        if not self.matrices:
            raise ValueError("A net with a mask a task needs a weight matrix besides its head's: give it a layer.")
        self.sizes = [named[name].numel() for name in self.matrices]
        self.register_buffer("alive", torch.ones(sum(self.sizes), dtype=torch.bool))  # [M]
        shapes = [named[name].shape for name in self.matrices] if sharpness is not None else []
        self.maps = nn.ParameterList(nn.Parameter(torch.ones(shape)) for shape in shapes)
        self._frozen: list[Tensor] = []
        self._held: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    @property
    def masks(self) -> TaskMasks:
        """The masks: what `tasks` is here."""
        assert isinstance(self.tasks, TaskMasks)
        return self.tasks

    def parts(self, names: Sequence[str]) -> list[nn.Parameter]:
        """Parameters of the template by name."""
        named = dict(self.template.named_parameters())
        return [named[name] for name in names]

    def weights_for(self, label: int) -> dict[str, Tensor]:
        """The template's weights for a task, by name: all that differ from its parameters."""
        matrices, weights = self.parts(self.matrices), {}
        if label in self.masks.labels and not self.masks.learning(label):
            masks = self._split(self.masks.mask(label, sum(self.sizes)))
            for name, w, mask in zip(self.matrices, matrices, masks, strict=True):
                weights[name] = torch.where(mask, w, 0)
            others = self.parts(self.others)
            values = self.masks.own(label).split([p.numel() for p in others])
            for name, p, value in zip(self.others, others, values, strict=True):
                weights[name] = value.view(p.shape)
            return weights
        for number, (name, w, alive) in enumerate(zip(self.matrices, matrices, self._split(self.alive), strict=True)):
            gate = self.relevance(number) if self.maps else 1.0
            weights[name] = torch.where(alive, gate * w, 0)
        return weights

    def relevance(self, number: int) -> Tensor:
        """r(A) of a matrix's map, in 0..1, in its shape."""
        assert self.sharpness is not None
        return torch.sigmoid(self.sharpness * (self.maps[number] - 0.5))

    @torch.no_grad()
    def begin(self, label: int, generator: torch.Generator) -> None:
        """Start a task: all weights alive again, and maps, if there are any, drawn from U(0, 1)."""
        self.masks.start(label)
        self.alive.fill_(True)
        for a in self.maps:
            a.copy_(torch.rand(a.shape, generator=generator))

    def finish(self) -> None:
        """Keep the active task's mask (what is alive) and its own values."""
        own = torch.cat([p.detach().flatten() for p in self.parts(self.others)])
        self.masks.keep(self.alive, own)

    def hold(self, dead: bool = False, vectors: bool = False) -> None:
        """Note which weights must not change from now on, and their values.

        Args:
            dead: those pruned for the current task too, besides those that learned tasks use.
            vectors: all vectors outside the head too.
        """
        frozen = self.masks.used(self.masks.past, sum(self.sizes)).to(self.alive.device)
        self._frozen = self._split(frozen)
        held = frozen | ~self.alive if dead else frozen
        self._held = [
            (w, mask, w.detach().clone()) for mask, w in zip(self._split(held), self.parts(self.matrices), strict=True)
        ]
        if vectors:
            head = {id(p) for p in self.head.parameters()}
            fixed = [p for p in self.parts(self.others) if id(p) not in head]
            self._held += [(p, torch.ones_like(p, dtype=torch.bool), p.detach().clone()) for p in fixed]

    def frozen(self) -> list[Tensor]:
        """For each matrix where learned tasks use it (as of the last `hold`)."""
        return self._frozen

    def mask_gradients(self) -> None:
        """No gradient where weights are held."""
        for w, mask, _ in self._held:
            if w.grad is not None:
                w.grad.masked_fill_(mask, 0)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what moved held weights without a gradient: momentum, weight decay, other strategies."""
        for w, mask, value in self._held:
            w.copy_(torch.where(mask, value, w))

    def free_share(self) -> float:
        """The share of the M weights that no learned task uses; waits for the device."""
        return 1 - float(self.masks.used(self.masks.labels, sum(self.sizes)).float().mean())

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self.sizes)
        return [part.view(w.shape) for part, w in zip(parts, self.parts(self.matrices), strict=True)]
