"""The loop: equal to a plain PyTorch loop bit for bit, indifferent to chunks and evaluations, and exactly resumable."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clplat import checkpoint
from clplat.composition import Composite
from clplat.evaluate import evaluate
from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import GrowingHead, Head
from clplat.learners.nets.net import Net
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.objectives import Classification, objective_for
from clplat.loop import Run
from clplat.settings import Evaluation, Training
from clplat.stepper import NonFiniteLoss
from clplat.strategies.ewc import EWC
from clplat.strategies.joint import Joint
from clplat.strategies.replay import Replay
from clplat.strategy import Strategy
from clplat.streams.data import TensorData
from clplat.streams.experience import Experience, Stream, StreamError
from clplat.streams.loader import stable_seed


def tiny_stream(experiences: int = 3, examples: int = 70) -> Stream:
    """Two classes an experience, sequences [5, 4] whose mean tells the class."""
    generator = torch.Generator().manual_seed(5)
    parts = []
    for k in range(experiences):
        data = []
        for n in (examples, 30):
            y = torch.randint(2 * k, 2 * k + 2, (n,), generator=generator)
            x = torch.randn(n, 5, 4, generator=generator) + y[:, None, None] * 0.7
            data.append(TensorData(x, y))
        parts.append(Experience(k, f"pair {k}", (2 * k, 2 * k + 1), train=data[0], test=data[1]))
    return Stream("tiny", tuple(parts), "class_incremental", "class", 2 * experiences, features=4, length=5)


def tiny_learner(stream: Stream, strategy: Strategy | None = None, head: type[Head] = Head, **options: Any) -> Learner:
    torch.manual_seed(1)
    inputs = stream.inputs
    net = recurrent(inputs, partial(head, outputs=stream.outputs), mixer=LSTM, hidden=8, layers=2, dropout=0.3)
    return Learner(net, objective_for(stream.target), strategy, partial(torch.optim.Adam, lr=1e-2), **options)


def weights(learner: Learner) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in learner.state_dict().items() if torch.is_tensor(v)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_finetuning_equals_a_plain_loop_bit_for_bit(trainer):
    stream = tiny_stream()
    learner = tiny_learner(stream)
    Run(stream, learner, trainer(), Training(batch_size=16, epochs=2, seed=3)).go()

    plain = tiny_learner(stream)
    net = plain.net
    torch.manual_seed(1)
    tiny_learner(stream)  # leaves the random state where the run began
    net.train()
    for experience in stream:
        data = experience.train
        assert isinstance(data, TensorData)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for epoch in range(2):
            generator = torch.Generator().manual_seed(stable_seed(3, "order", experience.index, epoch))
            for rows in torch.randperm(len(data), generator=generator).split(16):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(data.batch(rows)).logits, data.y[rows]).backward()
                optimizer.step()
    assert same(dict(net.state_dict()), dict(learner.net.state_dict()))


@pytest.mark.parametrize(("chunk", "log_every"), [(1, 50), (7, 3), (32, 1)])
def test_chunks_make_no_difference(trainer, chunk, log_every):
    stream, finals = tiny_stream(), []
    for training in (
        Training(batch_size=16, epochs=2),
        Training(batch_size=16, epochs=2, chunk=chunk, log_every_n_steps=log_every),
    ):
        learner = tiny_learner(stream)
        Run(stream, learner, trainer(), training).go()
        finals.append(weights(learner))
    assert same(*finals)


def test_evaluation_changes_nothing_in_the_training(trainer):
    stream, finals, tables = tiny_stream(), [], []
    for every in (None, 3):
        learner = tiny_learner(stream, Replay(capacity=20, seed=0))
        run = Run(stream, learner, trainer(), Training(batch_size=16, epochs=2), Evaluation(every_n_steps=every))
        tables.append(run.go().all)
        finals.append(weights(learner))
    assert same(*finals)
    assert torch.equal(tables[0].R, tables[1].R)
    assert tables[1].has_between and not tables[0].has_between
    assert len(tables[1].rows) > len(tables[0].rows) + 3


def test_evaluation_leaves_modes_random_state_and_gradients(trainer):
    stream = tiny_stream()
    learner = tiny_learner(stream)
    learner.train()
    learner.net.blocks[1].eval()  # a strategy may have frozen a part
    modes, state = [m.training for m in learner.modules()], torch.get_rng_state()
    evaluate(learner, stream.experiences)
    assert [m.training for m in learner.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in learner.parameters())


def test_scores_equal_brute_force_with_and_without_unseen_classes():
    stream = tiny_stream()
    learner = tiny_learner(stream)
    learner.shape_for(stream[0])
    learner.shape_for(stream[1])
    scores, seen = evaluate(learner, stream.experiences, batch_size=7)
    learner.eval()
    for k, experience in enumerate(stream):
        data = experience.test
        correct = correct_seen = 0
        for i in range(len(data)):
            batch = data.batch(torch.tensor([i]))
            logits = learner.net(batch).logits[0]
            correct += int(logits.argmax() == batch.y[0])
            correct_seen += int(logits[:4].argmax() == batch.y[0])
        assert scores[k] == pytest.approx(correct / len(data), abs=1e-12)
        assert seen[k] == pytest.approx(correct_seen / len(data), abs=1e-12)
    assert seen[2] == 0  # none of its classes was seen


def test_steps_go_on_over_experiences_where_lightning_looks(trainer):
    stream = tiny_stream()
    t = trainer()
    learner = tiny_learner(stream)
    table = Run(stream, learner, t, Training(batch_size=16, steps=9)).go().all
    assert learner.steps == t.global_step == 27
    assert table.step == [0, 9, 18, 27]


def test_logit_mask_leaves_the_other_classes_untouched(trainer):
    stream = tiny_stream()
    learner = tiny_learner(stream, logit_mask="experience")
    before = learner.net.head.linear.weight[4:].clone()
    run = Run(stream, learner, trainer(), Training(batch_size=16, epochs=1))
    learner.begin(stream[0])
    run._learn_experience()
    assert torch.equal(learner.net.head.linear.weight[4:], before)
    assert not torch.equal(learner.net.head.linear.weight[:2], before[:2])


def test_schedule_starts_anew_and_clipping_bounds_the_step(trainer):
    rates: list[float] = []

    class Watch(Strategy):
        def after_step(self, learner, batch, output) -> None:
            assert learner.optimizer is not None
            rates.append(learner.optimizer.param_groups[0]["lr"])
            norm = torch.stack([p.grad.norm() for p in learner.parameters() if p.grad is not None]).norm()
            assert norm <= 0.01 + 1e-6

    stream = tiny_stream(experiences=2)
    learner = tiny_learner(stream, Watch(), schedule=lambda steps: lambda i: 1 - i / steps, clip_norm=0.01)
    Run(stream, learner, trainer(), Training(batch_size=16, steps=4)).go()
    assert rates == pytest.approx([1e-2 * f for f in (1, 0.75, 0.5, 0.25)] * 2)


def test_the_backward_pass_runs_without_autocast(trainer):
    """As torch recommends: under it, products of what the forward pass kept in single precision would be rounded."""
    seen: list[tuple[bool, bool]] = []

    class Watch(Strategy):
        def loss(self, learner, batch, output):
            before = torch.is_autocast_enabled("cpu")
            output.features.register_hook(lambda _: seen.append((before, torch.is_autocast_enabled("cpu"))))
            return {}

    stream = tiny_stream(experiences=1)
    Run(stream, tiny_learner(stream, Watch()), trainer(precision="bf16-mixed"), Training(steps=2)).go()
    assert seen == [(True, False)] * 2


@pytest.mark.parametrize("options", [{"head": GrowingHead}, {"logit_mask": "seen"}])
def test_joint_training_makes_room_for_all_classes(trainer, options):
    stream = tiny_stream()
    learner = tiny_learner(stream, Joint(), **options)
    table = Run(stream, learner, trainer(), Training(batch_size=16, epochs=4)).go().all
    assert learner.steps == 4 * math.ceil(210 / 16)
    assert torch.equal(table.R[0], table.R[2])
    assert (table.R[0] > table.baseline).all()


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and what was in memory is gone."""


def full_learner(stream: Stream, head: type[Head]) -> Learner:
    parts = {"replay": Replay(capacity=20, seed=0), "ewc": EWC(strength=10.0, examples=20, mode="online", gamma=0.9)}
    return tiny_learner(stream, Composite(parts), head, optimizer_state="kept")


def one_run(trainer, folder: Path, head: type[Head], state: dict[str, Any] | None = None) -> Run:
    stream = tiny_stream()
    training = Training(batch_size=16, epochs=3, chunk=4, checkpoint_every_n_steps=6)
    run = Run(stream, full_learner(stream, head), trainer(), training, Evaluation(every_n_steps=5), folder=folder)
    if state is not None:
        run.resume(state)
    return run


def kill_in(moment: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrange for `Killed` the `count`-th time the run comes to `moment`."""
    targets: dict[str, tuple[Any, str]] = {
        "step": (torch.optim.Adam, "step"),
        "forward": (Net, "forward"),
        "consolidation": (EWC, "after_experience"),
        "evaluation": (Classification, "score"),
        "boundary": (Learner, "begin"),
        "checkpoint": (checkpoint.os, "replace"),
    }
    owner, name = targets[moment]
    original: Callable[..., Any] = getattr(owner, name)
    left = [count]

    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("head", [Head, GrowingHead])
@pytest.mark.parametrize(
    ("moment", "count"),
    [
        ("step", 1), ("step", 8), ("step", 15), ("step", 27), ("step", 44), ("forward", 20), ("forward", 60),
        ("consolidation", 1), ("consolidation", 3), ("evaluation", 2), ("evaluation", 25), ("boundary", 2),
        ("checkpoint", 3), ("checkpoint", 7),
    ],
)  # fmt: skip
def test_killed_anywhere_and_resumed_equals_uninterrupted(trainer, tmp_path, monkeypatch, moment, count, head):
    whole = one_run(trainer, tmp_path / "whole", head)
    (tmp_path / "whole").mkdir()
    table = whole.go().all

    (tmp_path / "cut").mkdir()
    cut = one_run(trainer, tmp_path / "cut", head)
    with monkeypatch.context() as patch:
        kill_in(moment, count, patch)
        with pytest.raises(Killed):
            cut.go()
    del cut
    if not (tmp_path / "cut" / "last.ckpt").exists():
        pytest.fail("a run is resumable from its first moment on")
    torch.manual_seed(999)  # nothing may depend on the state of the new process
    resumed = one_run(trainer, tmp_path / "cut", head, checkpoint.load(tmp_path / "cut" / "last.ckpt"))
    again = resumed.go().all
    assert same(weights(resumed.learner), weights(whole.learner))
    assert torch.equal(again.rows, table.rows) and again.step == table.step and again.trained == table.trained
    assert torch.equal(
        torch.nan_to_num(resumed.results.seen.rows, nan=-1), torch.nan_to_num(whole.results.seen.rows, nan=-1)
    )


def test_a_complete_run_resumes_to_the_same_scores(trainer, tmp_path):
    run = one_run(trainer, tmp_path, Head)
    table = run.go().all
    again = one_run(trainer, tmp_path, Head, checkpoint.load(tmp_path / "last.ckpt"))
    assert torch.equal(again.go().all.rows, table.rows)
    assert again.learner.steps == run.learner.steps


def test_nan_loss_names_term_step_and_experience_and_keeps_the_good_checkpoint(trainer, tmp_path):
    class Poison(Strategy):
        def loss(self, learner, batch, output):
            return {"poison": output.logits.sum() * (math.nan if learner.steps == 17 else 0.0)}

    stream = tiny_stream()
    learner = tiny_learner(stream, Poison())
    run = Run(
        stream, learner, trainer(), Training(batch_size=16, steps=10, checkpoint_every_n_steps=4), folder=tmp_path
    )
    with pytest.raises(NonFiniteLoss, match=r"'poison' became nan at step 18, experience 1 \(pair 1\)"):
        run.go()
    state = checkpoint.load(tmp_path / "last.ckpt")
    assert state["steps"] == 16
    assert all(torch.isfinite(v).all() for v in state["learner"].values() if torch.is_tensor(v))


def test_full_disk_while_checkpointing_costs_no_training(trainer, tmp_path, monkeypatch, caplog):
    stream = tiny_stream()
    run = Run(stream, tiny_learner(stream), trainer(), Training(batch_size=16, steps=6), folder=tmp_path)
    original, calls = torch.save, [0]

    def full(state: Any, file: Any) -> None:
        calls[0] += 1
        if calls[0] >= 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        original(state, file)

    monkeypatch.setattr(torch, "save", full)
    table = run.go()
    assert not table.R.isnan().any()
    assert "No space left on device" in caplog.text and "output_dir" in caplog.text
    assert checkpoint.load(tmp_path / "last.ckpt")["experience"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_runs_no_pickled_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path / "last.ckpt")
    assert not (tmp_path / "owned").exists()


def test_a_stream_and_an_objective_that_do_not_fit_are_refused(trainer):
    stream = tiny_stream()
    learner = tiny_learner(stream)
    learner.objective = objective_for("value")
    with pytest.raises(StreamError, match="objective=auto"):
        Run(stream, learner, trainer(), Training(epochs=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1, "steps": 1}, "either epochs or steps"),
        ({}, "either epochs or steps"),
        ({"epochs": 0}, "training.epochs: got 0"),
        ({"epochs": 1, "batch_size": 0}, "training.batch_size: got 0"),
    ],
)
def test_training_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Training(**options)
