"""Task labels are names: any numbers, in any order, more than once."""

from dataclasses import replace

import pytest
import tiny
import torch
from hydra.utils import get_method
from torch import Tensor

from clplat.learners.learner import Learner
from clplat.learners.nets.heads import TaskHead, head_for
from clplat.lightning import quiet_trainer
from clplat.loop import Run
from clplat.per_task.masked import TaskMasks
from clplat.settings import Training
from clplat.strategy import Strategy
from clplat.streams.batch import StreamError
from clplat.streams.data import TensorData
from clplat.streams.experience import Experience, Stream

PAIRS = ((0, 1), (2, 3), (4, 5))


def labelled(labels: tuple, pairs: tuple = PAIRS) -> Stream:
    """Vectors of two classes an experience, by the labels given."""
    generator, parts = torch.Generator().manual_seed(0), []
    for k, (label, pair) in enumerate(zip(labels, pairs, strict=True)):
        y = torch.tensor(pair)[torch.arange(40) % 2]
        x = torch.randn(40, 5, generator=generator) + y[:, None]
        data = TensorData(x, y, task=label)
        parts.append(Experience(k, str(k), pair, data, data, task_label=label))
    return Stream("labelled", tuple(parts), "task_incremental", "class", 6, features=5, length=0)


def run(stream: Stream, strategy: Strategy | None = None) -> tuple[Tensor, Learner]:
    torch.manual_seed(0)
    made = tiny.learner(strategy, stream, head=head_for(stream))
    done = Run(stream, made, quiet_trainer(), Training(batch_size=8, epochs=2))
    done.go()
    return done.results.R, made


STRATEGIES = {
    "finetune": lambda: None,
    "lwf": lambda: get_method("clplat.strategies.lwf.LwF")(1.0),
    "center_loss": lambda: get_method("clplat.strategies.center_loss.CenterLoss")(strength=0.1, freeze_head=True),
    "packnet": lambda: get_method("clplat.strategies.packnet.PackNet")(),
    "relevance_maps": lambda: get_method("clplat.strategies.relevance_maps.RelevanceMaps")(),
    "hypernetwork": lambda: get_method("clplat.strategies.hypernetwork.Hypernetwork")(0.01),
    "generative_replay": lambda: get_method("clplat.strategies.generative_replay.GenerativeReplay")(hidden=4, latent=2),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_labels_are_names_and_nothing_more(name):
    R, reference = run(labelled((0, 1, 2)), STRATEGIES[name]())
    for labels in ((1, 2, 3), (2, 0, 1), (-1, -7, 2**40)):
        again, made = run(labelled(labels), STRATEGIES[name]())
        assert torch.equal(R, again)
        for a, b in zip(reference.parameters(), made.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_label_that_comes_back_shares_its_head(name):
    again = labelled((5, 1, 5), ((0, 1), (2, 3), (0, 1)))
    R, made = run(again, STRATEGIES[name]())
    assert bool(((R >= 0) & (R <= 1)).all())
    both = labelled((5, 1, 5))
    R, made = run(both, STRATEGIES[name]())
    assert bool(((R >= 0) & (R <= 1)).all())
    assert isinstance(made.net.head, TaskHead)
    assert made.net.head.offered([5, 1]).ge(0).nonzero().tolist() == [[0, 0], [0, 1], [0, 4], [0, 5], [1, 2], [1, 3]]


@pytest.mark.parametrize("labels", [(0, 1), (1, 0), (30, -4)])
def test_a_head_offers_each_row_its_own_tasks_classes(labels):
    head = TaskHead(3, 4, dict(zip(labels, ((0, 3), (1, 2)), strict=True)))
    features = torch.randn(3, 3)
    logits = head(features, torch.tensor([labels[1], labels[0], 99])).detach()
    raw = head.linear(features).detach()
    lowest = torch.finfo(raw.dtype).min
    assert logits[0].tolist() == [lowest, float(raw[0, 2]), float(raw[0, 3]), lowest]
    assert logits[1].tolist() == [float(raw[1, 0]), lowest, lowest, float(raw[1, 1])]
    assert logits[2].tolist() == [lowest] * 4  # a task that nobody told of
    mapped = torch.func.vmap(lambda f, t: head(f[None], t[None])[0])
    assert torch.equal(mapped(features, torch.tensor([labels[1], labels[0], 99])), logits)
    with pytest.raises(ValueError, match="no outputs for task 7"):
        head.offered([7])


@pytest.mark.parametrize("label", [None, "first", 1.5, 10**30])
def test_labels_that_are_no_numbers_are_refused(label):
    stream = labelled((0, 1, 2))
    parts = (stream[0], replace(stream[1], task_label=label), stream[2])
    with pytest.raises(
        StreamError, match=r"experience 1 \(1\): a task-incremental stream needs one whole number as task"
    ):
        replace(stream, experiences=parts).check()


def test_a_set_that_carries_another_label_than_its_experience_is_refused():
    stream = labelled((0, 1, 2))
    wrong = replace(stream[1], test=stream[2].test)
    with pytest.raises(
        StreamError, match=r"experience 1 \(1\), test set, row 0: its task label is 2, the experience's is 1"
    ):
        replace(stream, experiences=(stream[0], wrong, stream[2])).check()
    untold = replace(stream[1], train=TensorData(torch.rand(4, 5), torch.tensor([2, 3, 2, 3])))
    with pytest.raises(StreamError, match="train set, row 0: it carries no task label, expected 1"):
        replace(stream, experiences=(stream[0], untold, stream[2])).check()


@pytest.mark.parametrize("label", [-1, 0, 2**62])
def test_the_active_label_is_kept_in_a_checkpoint_whatever_it_is(label):
    tasks, again = TaskMasks(), TaskMasks()
    again.set_extra_state(tasks.get_extra_state())
    assert (again.active, again.open) == (None, False)
    tasks.start(label)
    again.set_extra_state(tasks.get_extra_state())
    assert (again.active, again.open) == (label, True)
