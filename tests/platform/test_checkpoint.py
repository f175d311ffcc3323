"""Checkpoints: whole or refused in one line, with the one before beside it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from clplat import checkpoint
from clplat.checkpoint import LAST, PREVIOUS, CheckpointError
from clplat.errors import UserError
from clplat.lightning import quiet_trainer
from clplat.loop import Run
from clplat.settings import Training
from clplat.strategies.ewc import EWC
from clplat.strategies.replay import Replay


def start(folder: Path | None = None, of=None, **options: Any) -> Run:
    of = tiny.stream() if of is None else of
    learner = tiny.learner(options.pop("strategy", None), of, optimizer=torch.optim.Adam, **options)
    return Run(
        of, learner, quiet_trainer(), Training(batch_size=8, epochs=1, checkpoint_every_n_steps=3), None, None, folder
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a run that was stopped inside its second experience."""

    found, left, save = tmp_path_factory.mktemp("run"), 5, Run.save

    def dying(run: Run) -> None:
        nonlocal left
        save(run)
        left -= 1
        if not left:
            raise tiny.Killed

    run = start(found, strategy=Replay(capacity=10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", dying)
        with pytest.raises(tiny.Killed):
            run.go()
    return found


def test_every_bit_that_flips_is_noticed(folder, tmp_path):
    content, draws = (folder / LAST).read_bytes(), random.Random(1)
    path, everywhere = tmp_path / LAST, 8 * len(content)
    ends = [*range(8 * 64), *range(everywhere - 8 * 64, everywhere)]
    for bit in [*draws.sample(range(everywhere), 150), *draws.sample(ends, 100)]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(path)
    path.write_bytes(content)
    assert checkpoint.load(path)["steps"] == 9


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 0.9999])
def test_a_torn_file_is_refused_in_one_line_that_names_the_one_before(folder, tmp_path, share):
    content = (folder / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(content[: int(share * len(content))])
    (tmp_path / PREVIOUS).write_bytes((folder / PREVIOUS).read_bytes())
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load(tmp_path / LAST)
    line = str(refused.value)
    assert "\n" not in line and "weights_only" not in line
    assert f"whole (experience 1, step 6): resume={tmp_path / PREVIOUS}" in line


def test_the_one_before_the_last_is_kept(tmp_path):
    for n in range(4):
        checkpoint.save(tmp_path / LAST, parts() | {"steps": n})
        assert checkpoint.load(tmp_path / LAST)["steps"] == n
    assert checkpoint.load(tmp_path / PREVIOUS)["steps"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [LAST, PREVIOUS]


def test_there_is_a_checkpoint_at_every_moment_of_a_saving(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / LAST, parts() | {"steps": 0})
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        assert checkpoint.load(tmp_path / LAST)["steps"] == 0
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    checkpoint.save(tmp_path / LAST, parts() | {"steps": 1})
    assert checkpoint.load(tmp_path / LAST)["steps"] == 1


def test_a_file_system_without_hard_links_keeps_both(tmp_path, monkeypatch):
    def refused(*names: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    for n in range(3):
        checkpoint.save(tmp_path / LAST, parts() | {"steps": n})
    assert [checkpoint.load(tmp_path / name)["steps"] for name in (LAST, PREVIOUS)] == [2, 1]


def parts() -> dict[str, Any]:
    return {
        "experience": 0, "step": 0, "steps": 0, "complete": False, "learner": {}, "optimizer": None, "carried": None,
        "terms": [], "random": {}, "results": {}, "data": {}, "notes": {},
    }  # fmt: skip


@pytest.mark.parametrize("part", list(parts()))
def test_a_missing_part_is_named(tmp_path, part):
    state = parts()
    del state[part]
    checkpoint.save(tmp_path / LAST, state)
    with pytest.raises(CheckpointError, match=f"its part '{part}' is not as clplat writes it \\(it is missing\\)"):
        checkpoint.load(tmp_path / LAST)


@pytest.mark.parametrize(
    ("part", "value"),
    [("experience", -1), ("experience", "1"), ("step", 1.5), ("learner", [1]), ("results", None), ("terms", 3)],
)
def test_a_part_of_another_kind_is_named(tmp_path, part, value):
    checkpoint.save(tmp_path / LAST, parts() | {part: value})
    with pytest.raises(CheckpointError, match=f"its part '{part}.* is not as clplat writes it"):
        checkpoint.load(tmp_path / LAST)


def test_layouts_of_other_versions_are_refused_by_a_sentence(tmp_path):
    for layout, said in ((1, "before 0.2"), (2, "got layout 2, this version reads layout 3"), (9, "got layout 9")):
        torch.save({"format": layout, **parts()}, tmp_path / LAST)
        with pytest.raises(CheckpointError, match=said):
            checkpoint.load(tmp_path / LAST)


def test_ones_own_layout_without_a_digest_is_damaged(tmp_path):
    torch.save({"format": checkpoint.FORMAT, **parts()}, tmp_path / LAST)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(tmp_path / LAST)


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update(experience=77), "of experience 77, this stream has 3"),
        (lambda s: s["learner"].pop("net.head.linear.weight"), "net.head.linear.weight"),
        (lambda s: s["learner"].update(more=torch.ones(1)), "more"),
        (lambda s: s["learner"].update({"net.head.linear.bias": torch.ones(3)}), "net.head.linear.bias"),
        (lambda s: s["results"].pop("all"), "KeyError: 'all'"),
        (lambda s: s["results"]["all"].update(rows=torch.zeros(1, 5)), "5 experiences, this stream has 3"),
        (lambda s: s["random"].update(torch=torch.zeros(3, dtype=torch.uint8)), "RNG state"),
        (lambda s: s["random"].pop("python"), "KeyError: 'python'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_in_one_line(folder, change: Change, said):
    state = checkpoint.load(folder / LAST)
    change(state)
    run, before = start(strategy=Replay(capacity=10)), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=said) as refused:
        run.resume(state)
    assert "\n" not in str(refused.value)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["optimizer"]["param_groups"][0].update(params=[0]), "state in the checkpoint is for 1 weights"),
        (lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.ones(2, 2)), r"for a weight \[2, 2\]"),
    ],
)
def test_an_optimisers_state_that_does_not_fit_is_refused_before_a_step(folder, change: Change, said):
    """Only then is it known which weights are trained: a strategy may have frozen some."""
    state = checkpoint.load(folder / LAST)
    change(state)
    run = start(strategy=Replay(capacity=10))
    run.resume(state)
    with pytest.raises(CheckpointError, match=said):
        run.go()
    assert run.learner.steps == 9


@pytest.mark.parametrize("other", [{"hidden": (9,)}, {"strategy": EWC(1.0)}, {"of": tiny.stream(experiences=4)}])
def test_a_state_of_another_net_strategy_or_stream_is_refused_in_one_line(folder, other):
    with pytest.raises(UserError) as refused:
        start(**({"strategy": Replay(capacity=10)} | other)).resume(checkpoint.load(folder / LAST))
    assert "\n" not in str(refused.value)


def test_a_step_beyond_the_experience_is_refused(folder):
    state = checkpoint.load(folder / LAST)
    run = start(strategy=Replay(capacity=10))
    run.resume(state | {"step": 1_000_000_000})
    with pytest.raises(CheckpointError, match="of step 1000000000 of an experience that has 5 steps"):
        run.go()


def test_the_state_that_was_not_changed_fits(folder):
    run = start(strategy=Replay(capacity=10))
    run.resume(checkpoint.load(folder / LAST))
    assert run.go().all.finished == 3
