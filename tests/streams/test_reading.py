"""Random transforms follow from the run's seed and the example's place in the run."""

import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clplat.lightning import quiet_trainer
from clplat.loop import Run
from clplat.settings import Training
from clplat.streams.data import TensorData
from clplat.streams.examples import Examples
from clplat.streams.experience import Batch, Data, Experience, Stream
from clplat.streams.mixed import MixedData
from clplat.streams.order import Order
from clplat.streams.reading import seed_all, seeded
from clplat.streams.union import UnionData
from clplat.streams.workers import WorkerData


def noise(x: Tensor) -> Tensor:
    """Draws from all three generators that transforms draw from."""
    return x + torch.rand(()) + float(np.random.rand()) + random.random()


class Pairs(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return noise(torch.full((5,), float(index))), index % 2


class Own(Examples):
    def __len__(self) -> int:
        return 12

    def batch(self, index: Tensor) -> Batch:
        return Batch(noise(index[:, None].float().expand(-1, 5)), index % 2, index=index)


def tensors() -> TensorData:
    return TensorData(torch.arange(12.0)[:, None].expand(12, 5), torch.arange(12) % 2, transform=noise)


KINDS = {
    "tensors": tensors,
    "own": Own,
    "read": lambda: WorkerData(Pairs()),
    "workers": lambda: WorkerData(Pairs(), workers=2),
    "union": lambda: UnionData([tensors()]),
    "mixed": lambda: MixedData([tensors()], [None]),
}


def training(data: Data, start: int = 0, seed: int = 0, experience: int = 0) -> list[Tensor]:
    order = Order(5, steps=7, seed=seed, experience=experience, start=start, chunk=2)
    return [b.x for b in chain.from_iterable(data.training(order))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_from_seed_experience_and_step(kind):
    data = KINDS[kind]()
    whole = training(data)
    seed_all(9)  # the state of the training does not matter
    state = torch.get_rng_state(), random.getstate()
    following = np.random.randint(1 << 30)
    seed_all(9)
    assert same(training(data), whole)
    assert same(training(data, start=3), whole[3:])  # as after a resume
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.randint(1 << 30) == following
    for other in (training(data, seed=1), training(data, experience=1)):
        assert not same(other, whole)
    passes = torch.cat(whole[:3])[:, 0].sort().values, torch.cat(whole[3:6])[:, 0].sort().values
    assert not torch.equal(*passes)  # drawn anew in each pass


def test_draws_are_the_same_with_any_number_of_workers():
    sets = [WorkerData(Pairs(), workers) for workers in (0, 1, 2)]
    trained = [training(data) for data in sets]
    assert same(trained[0], trained[1])
    assert same(trained[0], trained[2])
    scored = [[b.x for b, _ in data.test_batches(5)] for data in sets]
    assert same(scored[0], scored[1])
    assert same(scored[0], scored[2])
    assert not torch.equal(scored[0][0][:2] - scored[0][0][:1], scored[0][1][:2] - scored[0][1][:1])


def test_generators_are_put_back_when_readings_are_nested():
    seed_all(3)
    expected = [torch.rand(2).tolist(), np.random.rand(2).tolist(), [random.random()]]

    def draw() -> list[list[float]]:
        return [torch.rand(2).tolist(), np.random.rand(2).tolist(), [random.random()]]

    seed_all(3)
    with seeded(5):
        first = draw()
        with seeded(6):
            inner = draw()
            np.random.seed(1)  # as a transform may
        second = draw()
    assert draw() == expected
    with seeded(5):
        assert [draw(), draw()] == [first, second]
    with seeded(6):
        assert draw() == inner


def test_what_draws_nothing_is_not_seeded():
    plain = TensorData(torch.rand(4, 2), torch.zeros(4).long())
    assert not plain.draws
    assert not MixedData([plain, UnionData([plain])], [None, None]).draws
    assert UnionData([plain, tensors()]).draws


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_with_random_transforms_goes_on_exactly(tmp_path, workers):
    def start(folder: Path) -> Run:
        data = WorkerData(Pairs(), workers)
        parts = tuple(Experience(k, str(k), (0, 1), data, data) for k in range(2))
        stream = Stream("noisy", parts, "domain_incremental", "class", 2, features=5, length=0)
        training = Training(batch_size=5, epochs=2, checkpoint_every_n_steps=2)
        return Run(stream, tiny.learner(of=stream, dropout=0.5), quiet_trainer(), training, folder=folder)

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = start(tmp_path / "whole")
    whole.go()
    resumed = tiny.killed_and_resumed(start, tmp_path / "killed", saves=3)
    assert torch.equal(tiny.flat(resumed.learner), tiny.flat(whole.learner))
    assert torch.equal(resumed.results.R, whole.results.R)
