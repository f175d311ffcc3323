"""What learners learn: every one on small tasks, and the claims of recurrences on the tasks that they are known for.

Accuracies are those of one seed with one thread, with a margin for other machines. They say that a learner works, not
which is best: every one gets the same few steps, and no learning rate was searched for.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from learners.rows import Learns, collected

from clplat.report.summary import Names
from clplat.train import train

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


LEARNS: dict[str, Learns] = collected("LEARNS")


def accuracy(folder: Path, *overrides: str) -> float:
    """The average accuracy of one run."""
    common = ["strategy=[finetune]", "tracking=none", "progress=false", "training.epochs=null", "threads=1"]
    with initialize_config_module("clplat.conf", version_base="1.3"):
        cfg = compose("train", [*common, "training.log_every_n_steps=1000", *overrides])
    return train(cfg, folder, Names("stream", "learner", "finetune"))["average"]


def small(learner: str) -> list[str]:
    """A learner 64 wide, with clipped gradients."""
    return [f"learner={learner}", "++learner.net.hidden=64", "learner.clip_norm=1.0"]


def test_all_learners_are_here() -> None:
    there = {p.stem for p in (ROOT / "conf" / "learner").glob("*.yaml") if not p.stem.startswith("_")}
    assert set(LEARNS) == there - {"mlp"}


@pytest.mark.parametrize("learner", LEARNS)
def test_it_learns_selective_copy(learner: str, tmp_path: Path) -> None:
    """Four tokens among 16 blanks, to be repeated at the end: 24 steps."""
    reached = LEARNS[learner]
    found = accuracy(
        tmp_path, *small(learner), "stream=selective_copy", "stream.experiences=1", "stream.vocabulary=8",
        "stream.tokens=4", "stream.blanks=16", "stream.test_size=200", f"optimizer.lr={0.006 if reached.steps == 150 else 0.003}",
        f"training.steps={reached.steps}", "training.batch_size=32", *reached.options,
    )  # fmt: skip
    assert found > reached.copy


@pytest.mark.parametrize("learner", [name for name, reached in LEARNS.items() if reached.digits is not None])
def test_it_learns_the_digits_as_it_is_shipped(learner: str, tmp_path: Path) -> None:
    """For those that copy with other settings only."""
    digits = LEARNS[learner].digits
    assert digits is not None
    found = accuracy(
        tmp_path,
        *small(learner),
        "stream=joint_digits",
        "optimizer.lr=0.003",
        "training.steps=300",
        "training.batch_size=32",
    )
    assert found > digits


REGULAR = [
    "stream=regular", "stream.train_size=100000", "stream.lengths=[[1,20]]", "stream.test_lengths=[21,60]",
    "training.batch_size=64",
]  # fmt: skip


@pytest.mark.parametrize(
    ("learner", "language"),
    [
        ("lstm", "parity"),
        ("lstm", "even_pairs"),
        ("lstm", "cycle_navigation"),
        ("gru", "parity"),
        ("gru", "even_pairs"),
    ],
)
def test_recurrent_nets_solve_regular_languages_at_lengths_never_seen(
    learner: str, language: str, tmp_path: Path
) -> None:
    """Trained on 1 to 20 symbols, tested on 21 to 60 (Deletang et al. 2023: 1 to 40, 41 to 500).

    The GRU's ring of five takes three times the steps.
    """
    pace = ["training.steps=1200", "optimizer.lr=0.005"]
    assert accuracy(tmp_path, *small(learner), *REGULAR, *pace, f"stream.language={language}") >= 0.99


def test_a_transformer_does_not(tmp_path: Path) -> None:
    """Parity stays at chance. Even pairs, the first and last symbol only, a transformer with rotary positions solves."""
    pace = ["training.steps=400", "optimizer.lr=0.001"]
    found = accuracy(tmp_path, *small("transformer"), *REGULAR, *pace, "stream.language=parity")
    assert 0.35 < found < 0.65


@pytest.mark.parametrize("learner", ["gated_deltanet", "deltanet"])
def test_delta_rules_solve_associative_recall(learner: str, tmp_path: Path) -> None:
    """MQAR with 4 pairs in 64 steps (Arora et al. 2023), 64 tokens."""
    found = accuracy(
        tmp_path, *small(learner), "learner.net.layers=1", "learner.net.expansion=0", "learner.net.mixer.heads=2",
        "learner.net.mixer.expansion=1", "stream=mqar", "stream.experiences=1", "stream.vocabulary=64",
        "stream.test_size=500", "optimizer=adamw", "optimizer.lr=0.01", "optimizer.weight_decay=0.0",
        "training.steps=300", "training.batch_size=32",
    )  # fmt: skip
    assert found >= 0.99
