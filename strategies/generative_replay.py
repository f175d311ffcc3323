"""Deep generative replay (Shin et al. 2017, arXiv 1705.08690), for sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clplat import checks
from clplat.learners.learner import Learner
from clplat.learners.nets.net import Output
from clplat.rehearsal.rows import current_rows
from clplat.rehearsal.vae import SequenceVAE
from clplat.strategy import Strategy
from clplat.streams.experience import Batch, Experience, Stream, StreamError
from clplat.streams.loader import stable_seed
from clplat.weights.teacher import Teacher


class GenerativeReplay(Strategy):
    """Replay of inputs that a generator makes, with the answers that the old learner gives to them.

    The generator is a recurrent variational autoencoder, trained beside the learner. Copies of both from the end of
    the last experience stand for the past. In experience t = 1, 2, ... learner and generator are trained alike on

        loss = (1 / t) loss(current) + (1 - 1 / t) loss(generated)

    so that both remember all of the past. With `labels="soft"` the
    learner's old answers are distilled at a temperature instead of being taken as truth (van de Ven & Tolias 2018).
    Nothing of the past is stored but the two nets. With task labels, each generated row is of a random earlier task;
    which of its steps are scored is taken from the current rows, where a stream scores only some.

    Deviation: the paper's generator is adversarial; this one is the variational one of van de Ven & Tolias, with GRUs.

    Args:
        rows: generated rows a step, null: as many as the batch has; 0 is finetuning.
        hidden: width of the generator's GRUs.
        latent: Z, the width of its code.
        deviation: of float inputs, see `SequenceVAE`.
        lr: of the generator's Adam.
        labels: "hard" or "soft"; soft for targets that are classes only.
        temperature: of soft labels, above 0.
        seed: of the generator's random numbers.
    """

    needs = frozenset({"boundaries"})
    not_carried = "its generator makes sequences of one length, segments have several"
    generator: SequenceVAE
    old: SequenceVAE  # the generator at the end of the last experience

    def __init__(
        self,
        rows: int | None = None,
        hidden: int = 256,
        latent: int = 32,
        deviation: float = 0.3,
        lr: float = 1e-3,
        labels: str = "soft",
        temperature: float = 2.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.at_least(0, "0 is finetuning", rows=rows)
        checks.at_least(1, hidden=hidden, latent=latent)
        checks.above(0, deviation=deviation, lr=lr, temperature=temperature)
        checks.one_of("labels", labels, ("hard", "soft"))
        self.rows, self.hidden, self.latent, self.deviation = rows, hidden, latent, deviation
        self.lr, self.soft, self.temperature = lr, labels == "soft", temperature
        self.off = rows == 0
        self.claims = frozenset([] if self.off else ["objective"])
        self.passes = 1.0 if self.off else 3.0
        self.optimizer: torch.optim.Optimizer | None = None
        self._resume: dict[str, Any] | None = None  # the optimiser's state, until the generator is on its device
        self.tasks: list[int] = []
        self.learned = 0  # experiences
        self._random = torch.Generator().manual_seed(stable_seed(seed, "generative replay"))
        self._generated: Batch | None = None

    def setup(self, learner: Learner, stream: Stream) -> None:
        if self.soft and not learner.objective.classes:
            name = type(learner.objective).__name__
            raise ValueError(f"labels: got 'soft', which distils classes, and {name} has none: use 'hard'.")
        if self.off:
            return
        self.teacher = Teacher(learner.net)
        data = stream[0].train
        batch = data.batch(torch.arange(min(len(data), 32)))
        if batch.lengths is not None:
            raise StreamError(
                "generative_replay generates sequences of one length, and this stream's differ: use replay."
            )
        tokens = not batch.x.is_floating_point()
        # A vocabulary is not seen from data: the net's own embedding has it.
        vocabulary = next(p.shape[0] for p in learner.net.embedding.parameters()) if tokens else None
        steps = batch.x.shape[1] if tokens or batch.x.ndim == 3 else 0
        sizes = (steps, None if tokens else batch.x.shape[-1], vocabulary, self.hidden, self.latent, self.deviation)
        self.generator, self.old = SequenceVAE(*sizes), SequenceVAE(*sizes).requires_grad_(False)

    def enter(self, learner: Learner, experience: Experience) -> None:
        if self._resume is not None:
            state, self._resume = self._resume, None
            self.before_experience(learner, experience)
            assert self.optimizer is not None
            self.optimizer.load_state_dict(state)

    def before_experience(self, learner: Learner, experience: Experience) -> None:
        if not self.off:  # fresh in every experience
            self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=self.lr)

    def before_step(self, learner: Learner, batch: Batch) -> None:
        self._generated = None
        count = len(batch) if self.rows is None else self.rows
        if self.learned and count:
            z = self._normal(count, batch.x)
            uniform = torch.rand(count, self.old.steps or 1, generator=self._random).to(batch.x.device)
            task = None
            if batch.task is not None:
                drawn = torch.randint(len(self.tasks), (count,), generator=self._random)
                task = torch.tensor(self.tasks)[drawn].to(batch.x.device)
            scored = learner.objective.scored(batch)
            mask = None if scored is None else scored[torch.arange(count, device=scored.device) % len(batch)]
            like = batch.y[:1].expand(count, *batch.y.shape[1:])
            made = Batch(self.old.generate(z, uniform), like, mask=mask, task=task)
            logits = self.teacher(made).logits
            if learner.logit_mask != "all" and learner.objective.one_class:  # the learner masks these as well
                logits = logits.masked_fill(~learner.seen, torch.finfo(logits.dtype).min)
            self._generated = replace(made, y=learner.objective.answer(logits, batch.y), extra={"logits": logits})

    def objective(self, learner: Learner, batch: Batch, output: Output) -> Tensor:
        own = learner.objective(output.logits, batch)
        if self._generated is None:
            return own
        logits, share = learner(self._generated).logits, 1 / (self.learned + 1)
        if not self.soft:
            past = learner.objective(logits, self._generated)
        else:
            old = self._generated.extra["logits"]
            # A class that competes in neither, or in one of them only, has nothing to be compared with.
            offered = (old > torch.finfo(old.dtype).min) & (logits > torch.finfo(logits.dtype).min)
            lowest = torch.finfo(torch.float32).min
            old = (
                (old.to(torch.promote_types(old.dtype, torch.float32)) / self.temperature)
                .masked_fill(~offered, lowest)
                .log_softmax(-1)
            )
            new = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature).log_softmax(-1)
            apart = (old.exp() * (old - new)).masked_fill(~offered, 0).sum(-1)
            mask = self._generated.mask
            mean = apart.mean() if mask is None else (apart * mask).sum() / mask.sum()
            past = self.temperature**2 * mean
        return share * own + (1 - share) * past

    def after_step(self, learner: Learner, batch: Batch, output: Output) -> None:
        if self.optimizer is None:
            return
        rows = current_rows(batch)
        share = 1 / (self.learned + 1)
        with torch.enable_grad():
            loss = self.generator.loss(rows, self._normal(len(rows), rows.x))
            if self._generated is not None:
                noise = self._normal(len(self._generated), rows.x)
                loss = share * loss + (1 - share) * self.generator.loss(self._generated, noise)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def after_experience(self, learner: Learner, experience: Experience) -> None:
        if self.off:
            return
        self.old.load_state_dict(self.generator.state_dict())
        self.teacher.learn(learner.net)
        self.learned += 1
        if experience.task_label is not None and experience.task_label not in self.tasks:
            self.tasks.append(experience.task_label)

    def stored_bytes(self) -> int:
        if self.off:
            return 0
        size = sum(p.numel() * p.element_size() for p in self.generator.parameters())
        return 2 * size + self.teacher.stored_bytes()

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "optimizer": self._resume if self.optimizer is None else self.optimizer.state_dict(),
            "tasks": list(self.tasks),
            "learned": self.learned,
            "random": self._random.get_state(),
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self.tasks, self.learned = list(state["tasks"]), state["learned"]
        self._random.set_state(state["random"].cpu())
        self.optimizer, self._resume = None, state["optimizer"]

    def _normal(self, rows: int, like: Tensor) -> Tensor:
        return torch.randn(rows, self.latent, generator=self._random).to(like.device, non_blocking=True)
