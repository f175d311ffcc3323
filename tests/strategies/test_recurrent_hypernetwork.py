"""The recurrent generator: what depends on what, growing, and the regulariser on its states."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from cases import Case
from tiny import only
from torch import Tensor
from torch.func import functional_call

from clplat.composition import Composite
from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import TaskHead
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import objective_for
from clplat.loop import Run
from clplat.per_task.generated import GeneratedNet
from clplat.per_task.generators import Chunked, Piece
from clplat.per_task.recurrent import Recurrent
from clplat.settings import Training
from clplat.strategies.ewc import EWC
from clplat.strategies.recurrent_hypernetwork import RecurrentHypernetwork
from clplat.strategy import Strategy
from clplat.streams.experience import Experience
from clplat.streams.inputs import Inputs

K, C, T, D = 3, 6, 5, 4
TASKS = [(0, 1), (2, 3), (4, 5)]
PIECES = [Piece(("a",), (3, 5), 0.3), Piece(("b",), (3,), 0.0), Piece(("c",), (4, 3), 0.2)]


def learner(strategy: Strategy, **options: Any) -> Learner:
    torch.manual_seed(1)
    head = partial(TaskHead, outputs=C, tasks=TASKS)
    net = recurrent(Inputs(features=D, length=T), head, mixer=LSTM, hidden=6)
    return Learner(net, objective_for("class"), strategy, partial(torch.optim.Adam, lr=1e-2), **options)


def strategy(**options: Any) -> RecurrentHypernetwork:
    given: dict[str, Any] = {"beta": 1.0, "hidden": 9, "embedding": 3, "chunk": 50, "code": 4}
    return RecurrentHypernetwork(**(given | options))


def generator(hidden: int = 12, chunk: int = 5) -> Recurrent:
    return Recurrent(PIECES, 3, 1.0, hidden, chunk, 4, 1.0, torch.Generator().manual_seed(0))


CASES = {
    "recurrent_hypernetwork": Case(
        {"hidden": 8, "embedding": 4, "chunk": 100, "code": 4, "beta": 1.0, "beta_state": 0.1, "grow": 2},
        tasks=True,
        refused={"refresh": "keeps a value for each weight"},
        not_counted=("tasks._extra_state",),
    ),
}


def test_a_chunk_depends_on_the_codes_up_to_its_own_and_on_no_later_one() -> None:
    made, e = generator(), torch.randn(1, 3)
    assert made.codes.shape == (3 + 1 + 3, 4)  # ceil(15 / 5), ceil(3 / 5), ceil(12 / 5)
    jacobian = torch.autograd.functional.jacobian(
        lambda codes: functional_call(made, {"codes": codes}, (e,))[0][0], made.codes.detach()
    )
    assert isinstance(jacobian, Tensor)  # [W, L, P]
    of_chunk = [*[0] * 5, *[1] * 5, *[2] * 5, *[3] * 3, *[4] * 5, *[5] * 5, *[6] * 2]
    for weight, chunk in enumerate(of_chunk):
        size = jacobian[weight].abs().amax(1)
        assert bool((size[: chunk + 1] > 0).all())
        assert float(size[chunk + 1 :].sum()) == 0


def test_it_is_an_lstm_unrolled_over_the_chunks() -> None:
    made, e = generator(), torch.randn(2, 3)
    h, c, flat = torch.zeros(2, 12), torch.zeros(2, 12), []
    for code in made.codes:
        gates = torch.cat([e, code.expand(2, -1)], 1) @ made.w_in.T + h @ made.w_state.T + made.bias
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        flat.append(h @ made.out_weight.T + made.out_bias)
    right = torch.cat([*flat[:3], flat[3][:, :3], *flat[4:6], flat[6][:, :2]], 1)
    weights, states = made(e)
    torch.testing.assert_close(weights, right)
    assert states is not None
    torch.testing.assert_close(states[:, -12:], h)


def test_growing_changes_nothing_and_the_new_units_learn() -> None:
    made, e = generator(), torch.randn(4, 3)
    with torch.no_grad():
        made.bias.uniform_(-0.5, 0.5)
    before = made(e)[0].detach()
    old = made.w_state.detach().clone()
    made.grow(5, torch.Generator().manual_seed(1))
    after = made(e)[0]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert made.w_state.shape == (4 * 17, 17) and made.out_weight.shape == (5, 17)
    assert torch.equal(made.w_state.view(4, 17, 17)[:, :12, :12].flatten(0, 1), old)
    for _ in range(2):  # at first only their outputs have a gradient
        made(e)[0].square().sum().backward()
        with torch.no_grad():
            for p in made.parameters():
                assert p.grad is not None
                p -= 0.1 * p.grad
    assert float(made.out_weight.detach()[:, 12:].abs().min()) > 0
    assert made.w_in.grad is not None
    assert float(made.w_in.grad.view(4, 17, -1)[:, 12:].abs().max()) > 0


def test_what_has_grown_is_loaded_into_what_has_not() -> None:
    made, e = generator(), torch.randn(4, 3)
    made.grow(5, torch.Generator().manual_seed(1))
    torch.save(made.state_dict(), file := io.BytesIO())
    file.seek(0)
    other = generator()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(e)[0], made(e)[0])
    assert other.hidden == 17 and all(p.requires_grad for p in other.parameters())


def test_a_run_grows_before_every_task_but_the_first(trainer: Callable) -> None:
    made = learner(strategy(grow=2))
    widths: list[int] = []

    class Watch(Strategy):
        def after_experience(self, learner: Learner, experience: Experience) -> None:
            assert isinstance(learner.net, GeneratedNet) and isinstance(learner.net.generator, Recurrent)
            widths.append(learner.net.generator.hidden)

    made.strategy = Composite({"recurrent_hypernetwork": made.strategy, "watch": Watch()})
    results = Run(tiny.sequences(), made, trainer(), Training(batch_size=16, epochs=6)).go()
    assert widths == [9, 11, 13]
    assert float(results.R[-1].min()) > 0.7


@pytest.mark.parametrize("targets", ["weights", "outputs"])
def test_the_penalty_on_states_against_its_definition(targets: str) -> None:
    made = learner(strategy(beta=0.0, beta_state=4.0, lookahead=False, targets=targets))
    only(made).setup(made, tiny.sequences())
    for experience in tiny.sequences():
        made.begin(experience)
        if experience.index < 2:
            made.end(experience)
    net = made.net
    assert isinstance(net, GeneratedNet) and isinstance(net.generator, Recurrent)
    past = net.embeddings.learned
    assert past is not None
    old = net.generator.states(past).detach()
    with torch.no_grad():
        for p in net.generator.parameters():
            p.add_(0.1 * torch.randn_like(p))
    made.handover.begin(made.parameter_groups())
    only(made).gradients(made, tiny.sequences()[2].train.batch(torch.arange(4)))
    right = torch.autograd.grad(
        2.0 * (net.generator.states(past) - old).square().sum(), [net.generator.w_state, net.generator.codes]
    )
    found = [net.generator.w_state.grad, net.generator.codes.grad]
    for a, b in zip(found, right, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)
    assert net.generator.out_bias.grad is None or float(net.generator.out_bias.grad.abs().max()) == 0


def test_its_size_against_a_chunked_mlp() -> None:
    """What a generator costs depends on the chunk; the recurrent one has 4 G (G + E + P) weights besides U and p."""
    made = learner(strategy())
    only(made).setup(made, tiny.sequences())
    net = made.net
    assert isinstance(net, GeneratedNet) and isinstance(net.generator, Recurrent)
    steps = sum(-(-p.size // 50) for p in net.pieces)
    size = sum(p.numel() for p in net.generator.parameters())
    assert size == 4 * 9 * (9 + 3 + 4) + 4 * 9 + 50 * (9 + 1) + steps * 4
    chunked = Chunked(net.pieces, 3, 1.0, [9], "relu", 50, 4, 1.0, torch.Generator())
    assert sum(p.numel() for p in chunked.parameters()) == (3 + 4 + 1) * 9 + 50 * (9 + 1) + -(-net.size // 50) * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta: got -1.0"),
        ({"beta_state": -1.0}, "beta_state: got -1.0"),
        ({"hidden": 0}, "hidden: got 0"),
        ({"code_std": 0.0}, "code_std: got 0.0"),
        ({"grow": -1}, "grow: got -1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strategy(**options)


def test_what_growing_does_not_go_with_is_refused() -> None:
    made = learner(strategy(grow=1), optimizer_state="kept")
    with pytest.raises(ValueError, match="set optimizer_state=fresh, or grow=0"):
        only(made).setup(made, tiny.sequences())
    with pytest.raises(ValueError, match="ewc keeps a value for each weight"):
        Composite({"recurrent_hypernetwork": strategy(grow=1), "ewc": EWC(strength=1.0)})
    Composite({"recurrent_hypernetwork": strategy(grow=0), "ewc": EWC(strength=1.0)})
