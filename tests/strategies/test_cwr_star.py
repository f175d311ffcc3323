"""CWR*: its consolidation by hand, what is frozen, and which head is trained and tested."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import Case
from torch import Tensor

from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import Head, TaskHead
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.settings import Training
from clplat.strategies.cwr_star import CWRStar
from clplat.strategy import Strategy
from clplat.streams.data import TensorData
from clplat.streams.experience import Experience, Stream
from clplat.streams.inputs import Inputs

C, H = 5, 6


def experience(index: int, classes: tuple[int, ...], counts: tuple[int, ...]) -> Experience:
    y = torch.cat([torch.full((n,), c) for c, n in zip(classes, counts, strict=True)])
    x = torch.randn(len(y), 3, 4, generator=torch.Generator().manual_seed(index)) + y[:, None, None]
    data = TensorData(x, y)
    return Experience(index, str(index), classes, train=data, test=data)


PARTS = (experience(0, (0, 2), (9, 16)), experience(1, (1,), (20,)), experience(2, (0, 3), (4, 10)))
STREAM = Stream("tiny", PARTS, "class_incremental", "class", C, features=4, length=3)


def learner(strategy: Strategy | None, head: object = None, **options: str) -> Learner:
    torch.manual_seed(1)
    made = head or partial(Head, outputs=C)
    net = recurrent(Inputs(features=4, length=3), made, mixer=LSTM, hidden=H)  # type: ignore[arg-type]  # any maker
    optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    return Learner(net, objective_for("class"), strategy, optimizer, **options)  # type: ignore[arg-type]  # text only


def set_head(made: Learner, seed: int) -> tuple[Tensor, Tensor]:
    generator, linear = torch.Generator().manual_seed(seed), made.net.head.linear
    weight, bias = torch.randn(C, H, generator=generator), torch.randn(C, generator=generator)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return weight, bias


CASES = {"cwr_star": Case()}


@torch.no_grad()
def test_rows_are_consolidated_by_the_formula() -> None:
    strategy = CWRStar()
    made = learner(strategy)
    linear = made.net.head.linear
    strategy.before_experience(made, PARTS[0])
    assert float(linear.weight.abs().max()) == float(linear.bias.abs().max()) == 0
    w, b = set_head(made, 1)
    strategy.after_experience(made, PARTS[0])
    saved, shift = torch.zeros(C, H), torch.zeros(C)
    saved[[0, 2]] = w[[0, 2]] - w[[0, 2]].mean()
    shift[[0, 2]] = b[[0, 2]] - b[[0, 2]].mean()
    torch.testing.assert_close(linear.weight.detach(), saved)
    torch.testing.assert_close(linear.bias.detach(), shift)

    strategy.before_experience(made, PARTS[1])
    assert float(linear.weight.abs().max()) == 0  # nothing is saved of its only class
    w, b = set_head(made, 2)
    strategy.after_experience(made, PARTS[1])
    saved[1], shift[1] = w[1] - w[1].mean(), 0.0
    torch.testing.assert_close(linear.weight.detach(), saved)

    strategy.before_experience(made, PARTS[2])
    torch.testing.assert_close(linear.weight[0], saved[0])
    assert float(linear.weight[1:].abs().max()) == 0
    w, b = set_head(made, 3)
    strategy.after_experience(made, PARTS[2])
    s = (9 / 4) ** 0.5  # 9 examples before, 4 now
    saved[0] = (saved[0] * s + w[0] - w[[0, 3]].mean()) / (s + 1)
    saved[3] = w[3] - w[[0, 3]].mean()
    shift[0] = (shift[0] * s + b[0] - b[[0, 3]].mean()) / (s + 1)
    shift[3] = b[3] - b[[0, 3]].mean()
    torch.testing.assert_close(linear.weight.detach(), saved)
    torch.testing.assert_close(linear.bias.detach(), shift)
    assert float(linear.weight[4].abs().max()) == 0  # never met
    assert strategy.get_buffer("past").tolist() == [13, 20, 16, 10, 0]
    assert torch.equal(strategy.get_buffer("saved_weight"), linear.weight)


@torch.no_grad()
def test_a_shared_bias_is_left_alone() -> None:
    strategy = CWRStar(bias="shared")
    made = learner(strategy)
    _, bias = set_head(made, 1)
    strategy.before_experience(made, PARTS[0])
    assert torch.equal(made.net.head.linear.bias, bias)
    assert float(made.net.head.linear.weight.abs().max()) == 0
    strategy.after_experience(made, PARTS[0])
    assert torch.equal(made.net.head.linear.bias, bias)
    assert strategy.saved_bias is None


def run(trainer: Callable, strategy: Strategy | None, count: int) -> Run:
    stream = Stream("tiny", PARTS[:count], "class_incremental", "class", C, features=4, length=3)
    made = Run(stream, learner(strategy), trainer(), Training(batch_size=8, epochs=3))
    made.go()
    return made


def test_after_experience_0_only_the_head_moves_whatever_the_optimiser(trainer: Callable) -> None:
    one, all_ = run(trainer, CWRStar(), 1), run(trainer, CWRStar(), 3)
    for (name, a), b in zip(one.learner.net.named_parameters(), all_.learner.net.parameters(), strict=True):
        assert torch.equal(a, b) == ("head" not in name), name
    start = learner(None).net.get_parameter("blocks.0.mixer.rnn.weight_hh_l0")
    assert not torch.equal(one.learner.net.get_parameter("blocks.0.mixer.rnn.weight_hh_l0"), start)
    assert not torch.equal(one.learner.net.head.linear.weight[0], all_.learner.net.head.linear.weight[0])
    assert torch.equal(one.learner.net.head.linear.weight[2], all_.learner.net.head.linear.weight[2])


def test_it_forgets_less_than_finetuning(trainer: Callable) -> None:
    kept, plain = run(trainer, CWRStar(), 2), run(trainer, None, 2)
    assert float(plain.results.R[1, 0]) < float(kept.results.R[1, 0])


def test_what_it_cannot_do_is_refused_before_training() -> None:
    def heads(features: int) -> Head:
        return TaskHead(features, C, [(0, 2), (1,), (3, 4)])

    with pytest.raises(ValueError, match=r"set learner\.head=shared"):
        CWRStar().setup(learner(None, heads), STREAM)
    with pytest.raises(ValueError, match="set it to fresh"):
        CWRStar().setup(learner(None, optimizer_state="kept"), STREAM)
    with pytest.raises(ValueError, match="allowed are 'consolidate', 'shared'"):
        CWRStar("none")
