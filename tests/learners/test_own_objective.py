"""A sixth objective: one class and one yaml of a user's own, and nothing of clplat is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clplat.cli import main

COUNTS = """
import torch
from clplat.learners.objective import Objective
from clplat.streams.data import TensorData
from clplat.streams.experience import Experience, Stream


class Poisson(Objective):
    targets = ("value",)
    score_name = "deviance"
    higher_is_better = False

    def losses(self, logits, batch):
        return (logits.exp() - batch.y * logits).sum(-1)

    def score(self, logits, batch):
        return self.losses(logits, batch).sum(), torch.tensor(batch.y.numel())

    def fisher_factors(self, logits, batch):  # the variance of a count is its rate
        for output in range(logits.shape[-1]):
            factor = torch.zeros_like(logits)
            factor[:, output] = (0.5 * logits[:, output]).exp()
            yield factor


def counts() -> Stream:
    generator, parts = torch.Generator().manual_seed(0), []
    for k in range(2):
        x = torch.randn(40, 5, 3, generator=generator)
        rate = (x.mean(1)[:, :2] + k).exp()
        y = torch.poisson(rate, generator=generator)
        data = TensorData(x, y)
        parts.append(Experience(k, f"rates {k}", (), train=data, test=data))
    return Stream("counts", tuple(parts), "domain_incremental", "value", outputs=2, features=3, LENGTH=5)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A package and a config folder of the user's own; the arguments that name them."""
    from dataclasses import fields

    from clplat.streams.experience import Stream

    length = "length" if "length" in {f.name for f in fields(Stream)} else "steps"
    (tmp_path / "my_counts.py").write_text(COUNTS.replace("LENGTH", length))
    for group, name, lines in (
        ("objective", "poisson", "# Counts\n_target_: my_counts.Poisson\n"),
        ("stream", "counts", "# Counts\n_target_: my_counts.counts\n"),
    ):
        folder = tmp_path / "my_conf" / group
        folder.mkdir(parents=True)
        (folder / f"{name}.yaml").write_text(lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    quick = ["training.epochs=2", "learner.net.hidden=4", "tracking=none", "progress=false"]
    return ["--config-dir", "my_conf", "stream=counts", "objective=poisson", *quick]


@pytest.mark.parametrize("strategy", ["finetune", "replay", "ewc", "mas"])
def test_it_trains_and_is_scored(own: list[str], strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *own, f"strategy={strategy}"]) == 0, capsys.readouterr().err
    (result,) = Path("runs").rglob("result.json")
    found = json.loads(result.read_text())
    assert found["score"] == "deviance"
    assert found["higher_is_better"] is False
    assert found["metrics"]["average"] is not None


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (["strategy=lwf"], "lwf distils probabilities of classes, and Poisson has none"),
        (["strategy=ewc", "strategy.ewc.fisher=sampled"], "Poisson does not define a draw of targets"),
        (["strategy=example_forgetting"], "Poisson does not define right and wrong answers"),
    ],
)
def test_what_it_lacks_is_refused_by_name_before_training(
    own: list[str], strategy: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *own, *strategy]) == 2
    said = capsys.readouterr()
    assert reason in said.err
    assert "experiences" not in said.out
