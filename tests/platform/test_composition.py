"""The laws by which a list of strategies becomes one."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from clplat.composition import APART, CLAIMS, NEEDS, Composite, check_stream
from clplat.state import StateModule
from clplat.strategy import FIRST_EDITION, Session, Strategy
from clplat.streams.data import TensorData
from clplat.streams.experience import Batch, Experience, Stream, StreamError

CONF = Path(__file__).parents[2] / "conf"
BATCH = Batch(x=torch.zeros(2, 3), y=torch.zeros(2).long())


class Probe(Strategy):
    """Notes its name at every hook, and appends it to whatever is folded."""

    def __init__(self, name: str, log: list[str], **attributes: Any) -> None:
        super().__init__()
        self.name, self.log = name, log
        for key, value in attributes.items():
            setattr(self, key, value)

    def setup(self, learner: Any, stream: Any) -> None:
        self.log.append(f"setup {self.name}")

    def session(self, stream: Any, index: int, session: Session) -> Session:
        return Session(session.data, session.budget * 10 + float(self.name))

    def enter(self, learner: Any, experience: Any) -> None:
        self.log.append(f"enter {self.name}")

    def before_experience(self, learner: Any, experience: Any) -> None:
        self.log.append(f"before {self.name}")

    def after_experience(self, learner: Any, experience: Any) -> None:
        self.log.append(f"after {self.name}")

    def batch(self, learner: Any, batch: Batch) -> Batch:
        return replace(batch, x=batch.x * 10 + float(self.name))

    def loss(self, learner: Any, batch: Batch, output: Any) -> Mapping[str, Tensor]:
        return {self.name: torch.tensor(float(self.name))}

    def gradients(self, learner: Any, batch: Batch) -> None:
        self.log.append(f"gradients {self.name}")

    def step(self, learner: Any, closure: Callable, update: Callable) -> Any:
        self.log.append(f"enter {self.name}")
        output = update(closure)
        self.log.append(f"leave {self.name}")
        return output

    def after_step(self, learner: Any, batch: Batch, output: Any) -> None:
        self.log.append(f"after_step {self.name}")

    def predict(self, learner: Any, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
        return logits * 10 + float(self.name)

    def before_step(self, learner: Any, batch: Batch) -> None:
        self.log.append(f"before_step {self.name}")

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"name": self.name}]

    def rate(self, step: int, steps: int, batch: Batch, factor: float) -> float:
        assert (step, steps) == (5, 9)
        return factor * 10 + float(self.name)

    def report(self) -> dict[str, Tensor]:
        return {"found": torch.tensor(float(self.name))}

    def objective(self, learner: Any, batch: Batch, output: Any) -> Tensor:
        return torch.tensor(float(self.name))

    def stored_bytes(self) -> int:
        return int(self.name)


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def three(log: list[str]) -> Composite:
    return Composite({n: Probe(n, log) for n in "123"})


def test_folds_go_from_the_left(three: Composite) -> None:
    learner: Any = None
    assert three.batch(learner, BATCH).x[0, 0] == 123
    assert three.predict(learner, BATCH, torch.zeros(1), torch.zeros(1)) == 123
    assert three.session(learner, 0, Session(None, 0.0)).budget == 123
    assert three.rate(5, 9, BATCH, 0.0) == 123


def test_unions_keep_the_order(three: Composite) -> None:
    assert three.parameter_groups() == [{"name": "1"}, {"name": "2"}, {"name": "3"}]
    assert {k: float(v) for k, v in three.report().items()} == {"1.found": 1.0, "2.found": 2.0, "3.found": 3.0}


@pytest.mark.parametrize("hook", ["setup", "enter", "before", "after", "before_step", "gradients", "after_step"])
def test_changes_of_state_go_in_order(hook: str, three: Composite, log: list[str]) -> None:
    nothing: Any = None
    {
        "setup": lambda: three.setup(nothing, nothing),
        "before_step": lambda: three.before_step(nothing, BATCH),
        "enter": lambda: three.enter(nothing, nothing),
        "before": lambda: three.before_experience(nothing, nothing),
        "after": lambda: three.after_experience(nothing, nothing),
        "gradients": lambda: three.gradients(nothing, BATCH),
        "after_step": lambda: three.after_step(nothing, BATCH, nothing),
    }[hook]()
    assert log == [f"{hook} 1", f"{hook} 2", f"{hook} 3"]


def test_a_step_is_an_onion_with_the_first_outermost(three: Composite, log: list[str]) -> None:
    def update(closure: Callable) -> Any:
        log.append("update")
        return closure()

    def closure() -> Any:
        log.append("closure")
        return "output"

    learner: Any = None
    assert three.step(learner, closure, update) == "output"
    enter, leave = [f"enter {n}" for n in "123"], [f"leave {n}" for n in "321"]
    assert log == [*enter, "update", "closure", *leave]


def test_a_strategy_may_take_several_gradients_in_one_step() -> None:
    class Twice(Strategy):
        def step(self, learner: Any, closure: Callable, update: Callable) -> Any:
            closure()
            return update(closure)

    calls: list[str] = []
    learner: Any = None
    both = Composite({"a": Twice(), "b": Twice()})
    both.step(learner, lambda: calls.append("closure"), lambda closure: closure())  # type: ignore[arg-type, func-returns-value]
    assert len(calls) == 3  # each of them one more


def test_loss_terms_are_united_by_name(three: Composite, log: list[str]) -> None:
    nothing: Any = None
    assert {k: float(v) for k, v in three.loss(nothing, BATCH, nothing).items()} == {"1": 1.0, "2": 2.0, "3": 3.0}
    same = Composite({"a": Probe("1", log), "b": Probe("1", log)})
    with pytest.raises(ValueError, match="'b' adds a loss '1' that another one already adds"):
        same.loss(nothing, BATCH, nothing)


def test_who_replaces_the_net_is_set_up_first(log: list[str]) -> None:
    nothing: Any = None
    parts = {"1": Probe("1", log), "2": Probe("2", log, claims=frozenset({"net"})), "3": Probe("3", log)}
    Composite(parts).setup(nothing, nothing)
    assert log == ["setup 2", "setup 1", "setup 3"]


def test_one_strategy_may_replace_the_objective(log: list[str]) -> None:
    nothing: Any = None
    one = Composite({"a": Probe("1", log), "b": Probe("2", log, claims=frozenset({"objective"}))})
    assert one.objective(nothing, BATCH, nothing) == 2

    class Learner:
        def objective(self, logits: Any, batch: Batch) -> Tensor:
            return torch.tensor(7.0)

    class Output:
        logits = None

    learner, output = Learner(), Output()
    none = Composite({"a": Probe("1", log)})
    assert none.objective(learner, BATCH, output) == 7  # type: ignore[arg-type]  # stand-ins with what is asked of them


@pytest.mark.parametrize(("one", "other"), [*APART, *((b, a) for a, b in APART if a != b)])
def test_claims_that_exclude_one_another_are_refused(one: str, other: str, log: list[str]) -> None:
    parts = {
        "a": Probe("1", log, claims=frozenset({one})),
        "free": Probe("2", log),
        "c": Probe("3", log, claims=frozenset({other})),
    }
    with pytest.raises(ValueError, match=r"strategy: a and c cannot be used .* Drop one\.") as caught:
        Composite(parts)
    assert CLAIMS[one] in str(caught.value)
    assert CLAIMS[other] in str(caught.value)
    Composite({"a": parts["a"], "free": parts["free"]})


def test_all_other_pairs_of_claims_go_together(log: list[str]) -> None:
    apart = {frozenset(pair) for pair in APART}
    for one in CLAIMS:
        for other in CLAIMS:
            if frozenset({one, other}) not in apart:
                Composite(
                    {"a": Probe("1", log, claims=frozenset({one})), "b": Probe("2", log, claims=frozenset({other}))}
                )


def test_claims_are_spelled_and_hooks_are_not_hidden(log: list[str]) -> None:
    with pytest.raises(ValueError, match=r"strategy\.a: claims 'datas', allowed are 'objective', 'data'"):
        Composite({"a": Probe("1", log, claims=frozenset({"datas"}))})
    with pytest.raises(ValueError, match=r"strategy\.a: its attribute 'rate' hides the hook of that name"):
        Composite({"a": Probe("1", log, rate=0.1)})


@pytest.mark.parametrize("name", sorted(FIRST_EDITION))
def test_a_hook_of_the_first_edition_is_refused_with_its_successor(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Mine\.{name} is (called|declared as) .* since clplat 0.2: rename it"):
        type("Mine", (Strategy,), {name: lambda self, learner: None})


def test_one_strategy_is_a_list_of_one() -> None:
    class CenterLoss(Strategy):
        pass

    mine = CenterLoss()
    one = Composite.of(mine)
    assert one.named == {"center_loss": mine}
    assert Composite.of(one) is one
    assert Composite.of(None).named == {}


def test_costs_add_up(log: list[str]) -> None:
    both = Composite({"a": Probe("1", log, passes=2.0), "b": Probe("2", log, passes=3.0)})
    assert both.passes == 6.0
    both.strategies[0].passes = 4.0  # as GEM's, which grow with the experiences
    assert both.passes == 12.0
    assert both.stored_bytes() == 3


def test_the_base_class_changes_nothing() -> None:
    base, nothing = Strategy(), object()
    learner: Any = nothing
    assert base.batch(learner, BATCH) is BATCH
    assert base.loss(learner, BATCH, learner) == {}
    assert base.predict(learner, BATCH, BATCH.x, BATCH.x) is BATCH.x
    session = Session(None)
    assert base.session(learner, 0, session) is session
    assert base.step(learner, lambda: learner, lambda closure: closure()) is nothing
    assert base.stored_bytes() == 0
    assert base.passes == 1.0
    assert base.rate(0, 1, BATCH, 0.25) == 0.25
    assert base.parameter_groups() == []


def a_stream(scenario: str = "class_incremental", target: str = "class") -> Stream:
    data = TensorData(torch.zeros(2, 3), torch.zeros(2).long())
    experience = Experience(0, "0", (0,), train=data, test=data)
    return Stream("s", (experience,), scenario, target, 2, features=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("need", "scenario", "target"),
    [
        ("boundaries", "boundary_free", "class"),
        ("task_labels", "class_incremental", "class"),
        ("classes", "class_incremental", "tag"),
    ],
)
def test_what_a_stream_lacks_is_refused(need: str, scenario: str, target: str, log: list[str]) -> None:
    probe = Probe("1", log, needs=frozenset({need}))
    with pytest.raises(StreamError, match=f"'mine' needs .*stream 's' is {scenario}"):
        check_stream(Composite({"mine": probe}), a_stream(scenario, target))
    check_stream(Composite({}), a_stream(scenario, target))
    check_stream(Composite({"mine": probe}), a_stream("task_incremental", "class"))
    assert need in NEEDS


class Grows(StateModule):
    a: Tensor | None
    b: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", None)
        self.register_buffer("b", torch.zeros(2))


def test_state_takes_the_saved_shape() -> None:
    one, two = Grows(), Grows()
    one.a, one.b = torch.arange(6.0).view(2, 3), torch.ones(5)
    nn.ModuleDict({"x": two}).load_state_dict({f"x.{k}": v for k, v in one.state_dict().items()})
    assert two.a is not None
    assert torch.equal(two.a, one.a)
    assert torch.equal(two.b, one.b)
    assert two.b is not one.b
    two.load_state_dict(Grows().state_dict())
    assert two.a is None


@pytest.mark.parametrize("path", sorted((CONF / "strategy").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_a_named_part_of_a_list(path: Path) -> None:
    name = path.stem
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=[f"strategy=[{name}]"])
    assert list(config.strategy) == [name]
    if name == "custom":
        assert OmegaConf.is_missing(config.strategy.custom, "_target_")
        return
    made = instantiate(config.strategy[name])
    assert isinstance(made, Strategy)
    torch.save(made.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    instantiate(config.strategy[name]).load_state_dict(torch.load(buffer, weights_only=True))
    lines = path.read_text().splitlines()
    assert lines[0] == f"# @package strategy.{name}"
    assert lines[1].startswith("# ")


def test_a_list_in_the_config_keeps_its_order() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=["strategy=[replay,ewc]", "strategy.ewc.strength=7", "seed=4"])
    assert list(config.strategy) == ["replay", "ewc"]
    assert config.strategy.ewc.strength == 7
    assert config.strategy.replay.seed == config.strategy.ewc.seed == 4
