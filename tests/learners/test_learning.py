"""What learners learn: every one on small tasks, and the claims of recurrences on the tasks that they are known for.

Accuracies are those of one seed with one thread, with a margin for other machines. They say that a learner works, not
which is best: every one gets the same few steps, and no learning rate was searched for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from clplat.train import Names, train

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Reached:
    """What a learner must exceed: on the digits after 300 steps, and on selective copy (T 64, chance 1/6) after `steps`,
    at a learning rate of 0.006 for 250 steps and of 0.003 for 600. `options` are for selective copy only."""

    digits: float
    copy: float
    steps: int = 250
    options: tuple[str, ...] = ()


REACHED = {
    "aaren": Reached(0.85, 0.60, 600),
    "awd_lstm": Reached(
        0.60,
        0.40,
        2500,
        ("learner.net.layers=1", "learner.net.activation=0", "learner.net.temporal_activation=0", "optimizer.lr=0.006"),
    ),
    "bidirectional": Reached(0.80, 0.85, 600),
    "block_lrnn": Reached(
        0.90, 0.45, 800, ("++learner.net.hidden=32", "learner.net.mixer.block=4", "optimizer.lr=0.006")
    ),
    "deltanet": Reached(0.90, 0.90),
    "elman": Reached(
        0.90,
        0.65,
        3000,
        ("learner.net.mixer.nonlinearity=relu", "learner.net.mixer.init=identity", "optimizer.lr=0.001"),
    ),
    "gate_loop": Reached(0.85, 0.25, 600),
    "gated_deltanet": Reached(0.90, 0.85),
    "gla": Reached(0.85, 0.40),
    "griffin": Reached(0.90, 0.40),
    "gru": Reached(0.85, 0.75),
    "hawk": Reached(0.85, 0.50),
    "hgrn": Reached(0.90, 0.60),
    "hgrn2": Reached(0.90, 0.35),
    "hyper_lstm": Reached(0.90, 0.60),
    "lem": Reached(0.85, 0.80),
    "lightnet": Reached(0.85, 0.35),
    "local_attention": Reached(0.90, 0.35),
    "low_rank_lstm": Reached(0.85, 0.80, 600),
    "lru": Reached(0.90, 0.30, 600),
    "lstm": Reached(0.85, 0.80, 600),
    "mamba": Reached(0.90, 0.75),
    "min_gru": Reached(0.65, 0.50, 600),
    "min_lstm": Reached(0.65, 0.50),
    "mlstm": Reached(0.90, 0.90),
    "odyssey_lstm": Reached(0.85, 0.75, 600),
    "retnet": Reached(0.85, 0.35),
    "rwkv4": Reached(0.90, 0.75),
    "rwkv6": Reached(0.90, 0.80),
    "s4d": Reached(0.90, 0.45),
    "slstm": Reached(0.90, 0.60),
    "titans": Reached(0.90, 0.85),
    "transformer": Reached(0.90, 0.35),
}
"""Three need other settings. An Elman net as torch starts it passes on a gradient of 1e-20 over 60 blanks; relu with U = I
keeps it. Either penalty of the AWD-LSTM keeps a net of one layer near chance, for it must carry the memory in the outputs that
they make small and slow; dropout stays. Blocks of 4 x 4 forget less than those of 8 x 8, and cost less."""


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
    assert set(REACHED) == there - {"mlp"}


@pytest.mark.parametrize("learner", REACHED)
def test_it_learns_the_digits(learner: str, tmp_path: Path) -> None:
    found = accuracy(
        tmp_path,
        *small(learner),
        "stream=joint_digits",
        "optimizer.lr=0.003",
        "training.steps=300",
        "training.batch_size=32",
    )
    assert found > REACHED[learner].digits


@pytest.mark.parametrize("learner", REACHED)
def test_it_learns_selective_copy(learner: str, tmp_path: Path) -> None:
    """Four tokens among 56 blanks, to be repeated at the end: 64 steps."""
    reached = REACHED[learner]
    found = accuracy(
        tmp_path, *small(learner), "stream=selective_copy", "stream.experiences=1", "stream.vocabulary=8",
        "stream.tokens=4", "stream.blanks=56", "stream.test_size=200", f"optimizer.lr={0.006 if reached.steps == 250 else 0.003}",
        f"training.steps={reached.steps}", "training.batch_size=32", *reached.options,
    )  # fmt: skip
    assert found > reached.copy


REGULAR = ["stream=regular", "stream.train_size=100000", "training.batch_size=128", "training.steps=1200"]


@pytest.mark.parametrize("language", ["parity", "even_pairs", "cycle_navigation"])
@pytest.mark.parametrize("learner", ["lstm", "gru"])
def test_recurrent_nets_solve_regular_languages_at_lengths_never_seen(
    learner: str, language: str, tmp_path: Path
) -> None:
    """Trained on 1 to 40 symbols, tested on 41 to 100 (Deletang et al. 2023)."""
    # The GRU needs more time for the ring of five.
    longer = (learner, language) == ("gru", "cycle_navigation")
    pace = ["training.steps=3000", "optimizer.lr=0.003"] if longer else ["optimizer.lr=0.005"]
    found = accuracy(tmp_path, *small(learner), *REGULAR, *pace, f"stream.language={language}")
    assert found >= 0.99


@pytest.mark.parametrize(("language", "chance"), [("parity", 0.5), ("cycle_navigation", 0.2)])
def test_a_transformer_does_not(language: str, chance: float, tmp_path: Path) -> None:
    """Even pairs asks for the first and last symbol only, and a transformer with rotary positions does solve it."""
    steps = "training.steps=400"
    found = accuracy(
        tmp_path, *small("transformer"), *REGULAR, steps, f"stream.language={language}", "optimizer.lr=0.001"
    )
    assert found < chance + 0.15


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
