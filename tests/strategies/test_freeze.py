"""Freezing: what is frozen stays the same to the bit, and the probe of what can be recovered touches nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from cases import Case
from torch import Tensor, nn

from clplat.learners.learner import Learner
from clplat.learners.nets.heads import Head
from clplat.learners.nets.mlp import mlp
from clplat.learners.nets.net import Block, Net, State
from clplat.learners.nets.transformer import transformer
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.probes.recoverability import recoverability
from clplat.settings import Training
from clplat.strategies.freeze import Freeze
from clplat.strategy import Strategy
from clplat.streams.data import TensorData
from clplat.streams.experience import Experience, Stream
from clplat.streams.inputs import Inputs

K, N, D = 3, 40, 5
stream = partial(tiny.stream, shift=0.7, alternating=True)
OPTIMIZERS: dict[str, Callable] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5),
    "adam_l2": partial(torch.optim.Adam, lr=1e-2, weight_decay=0.5),
    "sgd": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
}


class Normed(Block):
    """A layer with running statistics, which move in training mode even where weights do not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout(0.5)

    def forward(
        self, hidden: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        return self.dropout(self.norm(self.linear(hidden)).relu()), None


def learner(net: Net, strategy: Strategy | None, optimizer: str = "adamw", **options: Any) -> Learner:
    return Learner(net, objective_for("class"), strategy, OPTIMIZERS[optimizer], **options)


def normed(blocks: int = 3) -> Net:
    torch.manual_seed(1)
    return Net(nn.Linear(D, D), [Normed() for _ in range(blocks)], Head(D, 6))


class After(Run):
    """Keeps the net's state after every experience."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.states: list[dict[str, Tensor]] = []

    def score(self, trained: int, final: bool) -> None:
        super().score(trained, final)
        if final and trained >= 0:
            self.states.append(copy.deepcopy(dict(self.learner.net.state_dict())))


def trained(trainer: Callable, made: Learner) -> list[dict[str, Tensor]]:
    run = After(stream(), made, trainer(), Training(batch_size=8, epochs=2))
    run.go()
    return run.states


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


CASES = {"freeze": Case(off={"blocks": 0, "embedding": False})}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_weights_and_buffers_stay_the_same_to_the_bit(optimizer: str, trainer: Callable) -> None:
    first, *later = trained(trainer, learner(normed(), Freeze(blocks=2), optimizer))
    for state in later:
        changed = moved(first, state)
        assert not {name for name in changed if name.startswith(("embedding.", "blocks.0.", "blocks.1."))}
        rest = {name for name in first if name.startswith(("blocks.2.", "head."))}
        assert changed == rest
    plain = trained(trainer, learner(normed(), None, optimizer))
    assert moved(plain[0], plain[1]) == set(first)  # without freezing everything moves


def test_nothing_is_frozen_before_its_start(trainer: Callable) -> None:
    plain = trained(trainer, learner(normed(), None))
    late = trained(trainer, learner(normed(), Freeze(blocks=3, start=2)))
    assert not moved(plain[1], late[1])
    assert not {n for n in moved(late[1], late[2]) if not n.startswith("head.")}
    early = trained(trainer, learner(normed(), Freeze(blocks=1, start=0)))
    torch.testing.assert_close(early[0]["blocks.0.linear.weight"], normed().state_dict()["blocks.0.linear.weight"])


def test_blocks_are_counted_and_not_matched_by_name(trainer: Callable) -> None:
    """A match of "blocks.1" by substring would freeze blocks 10 and 11 too."""
    torch.manual_seed(1)
    net = mlp(Inputs(features=D, length=0), partial(Head, outputs=6), hidden=[6] * 12)
    made = learner(net, Freeze(blocks=2))
    trained(trainer, made)
    frozen = {name for name, p in made.net.named_parameters() if not p.requires_grad}
    assert frozen == {f"blocks.{k}.linear.{part}" for k in (0, 1) for part in ("weight", "bias")}


def test_all_blocks_frozen_only_the_head_moves(trainer: Callable) -> None:
    torch.manual_seed(1)
    shape = Inputs(features=4, length=5)
    net = transformer(shape, partial(Head, outputs=6), hidden=8, layers=2, heads=2, dropout=0.2)
    generator = torch.Generator().manual_seed(5)
    parts = []
    for k in range(2):
        y = 2 * k + torch.arange(N) % 2
        data = TensorData(torch.randn(N, 5, 4, generator=generator), y)
        parts.append(Experience(k, str(k), (2 * k, 2 * k + 1), train=data, test=data))
    told = Stream("sequences", tuple(parts), "class_incremental", "class", 6, features=4, length=5)
    run = After(told, learner(net, Freeze(blocks=3)), trainer(), Training(batch_size=8, epochs=2))
    run.go()
    assert moved(*run.states) == {"head.linear.weight", "head.linear.bias"}


def test_evaluation_mode_is_a_choice(trainer: Callable) -> None:
    first, second, _ = trained(trainer, learner(normed(), Freeze(blocks=2, eval_mode=False)))
    assert moved(first, second) & {"blocks.0.norm.running_mean", "blocks.1.norm.running_var"}
    assert "blocks.0.linear.weight" not in moved(first, second)


def test_a_call_of_train_in_between_does_not_thaw_the_statistics() -> None:
    made = learner(normed(), Freeze(blocks=1))
    made.enter(stream()[1])
    made.train()
    made.strategy.before_step(made, stream()[1].train.batch(torch.arange(8)))
    assert [block.training for block in made.net.blocks] == [False, True, True]
    assert not made.net.embedding.training
    made.enter(stream()[1])  # twice is once
    assert [p.requires_grad for p in made.net.blocks[1].parameters()] == [True] * 4


def test_what_cannot_be_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^blocks: got 4, it must lie in 0\.\.3"):
        Freeze(blocks=4).setup(learner(normed(), None), stream())
    with pytest.raises(ValueError, match=r"^learner\.optimizer_state: got 'kept'.* set it to fresh"):
        Freeze().setup(learner(normed(), None, optimizer_state="kept"), stream())
    with pytest.raises(ValueError, match=r"^blocks: got -1, it must be at least 0"):
        Freeze(blocks=-1)
    with pytest.raises(ValueError, match=r"^start: got -1"):
        Freeze(start=-1)


def test_the_probe_recovers_and_leaves_everything_as_it_was(trainer: Callable) -> None:
    made = learner(normed(), Freeze(blocks=1))
    run = Run(stream(), made, trainer(), Training(batch_size=8, epochs=6))
    run.go()
    first = stream()[0]
    state = copy.deepcopy(made.state_dict())
    modes = [m.training for m in made.modules()]
    grads = [p.requires_grad for p in made.parameters()]
    random = torch.get_rng_state()
    found = recoverability(made, first, 40, batch_size=8)
    assert found.before < 0.1
    assert found.after > 0.4
    assert found.gain == found.after - found.before
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in made.modules()] == modes
    assert [p.requires_grad for p in made.parameters()] == grads
    after = made.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in state.items() if torch.is_tensor(v))
    again = recoverability(made, first, 40, batch_size=8)
    assert again == found  # the same seed, the same answer
    torch.manual_seed(123)
    assert recoverability(made, first, 40, batch_size=8) == found


def test_the_probe_is_plain_training_from_where_the_learner_is() -> None:
    """Against a naive loop on a copy, with SGD and one pass in the loader's order."""
    from clplat.streams.order import Order

    torch.manual_seed(1)
    net = mlp(Inputs(features=D, length=0), partial(Head, outputs=6), hidden=[7])
    made, first = learner(net, None, "sgd"), stream()[0]
    other = copy.deepcopy(net)
    optimizer = OPTIMIZERS["sgd"](other.parameters())
    for chunk in first.train.training(Order(8, 5, seed=0, experience=0)):
        for batch in chunk:
            optimizer.zero_grad()
            made.objective(other(batch).logits, batch).backward()
            optimizer.step()
    whole = first.test.batch(torch.arange(N))
    right = float((other(whole).logits.argmax(-1) == whole.y).double().mean())
    found = recoverability(made, first, 5, batch_size=8)
    assert found.after == pytest.approx(right)
    assert found.before == pytest.approx(float((net(whole).logits.argmax(-1) == whole.y).double().mean()))


def test_no_steps_recover_nothing_and_other_data_can_be_given() -> None:
    made = learner(normed(), None)
    none = recoverability(made, stream()[0], 0)
    assert (none.gain, none.steps) == (0.0, 0)
    own, other = (recoverability(made, stream()[0], 30, data=stream()[k].train, batch_size=8) for k in (0, 2))
    assert own.after > 0.4
    assert other.after < own.after  # other classes teach nothing about these
    with pytest.raises(ValueError, match="steps must be at least 0"):
        recoverability(made, stream()[0], -1)
