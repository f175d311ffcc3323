"""Buffers: which examples stay, what comes back, and that a saved buffer goes on exactly.

Letters: B batch, T time, N capacity.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from clplat.rehearsal.buffer import Buffer
from clplat.rehearsal.policies import ClassBalanced, Grouped, Reservoir, Ring
from clplat.streams.experience import UNSCORED, Batch

AnyBuffer = TypeVar("AnyBuffer", bound=Buffer)


def rows(first: int, count: int, y: Tensor | None = None) -> Batch:
    """Examples whose every field tells their number."""
    number = torch.arange(first, first + count)
    x = number[:, None, None].expand(-1, 3, 2).float()
    return Batch(x=x, y=number % 10 if y is None else y, index=number, task=number % 3)


def index(batch: Batch) -> Tensor:
    assert batch.index is not None
    return batch.index


def held(buffer: Buffer) -> list[int]:
    return sorted(index(buffer.sample(len(buffer))).tolist())


def offer(buffer: AnyBuffer, total: int, size: int = 7, start: int = 0) -> AnyBuffer:
    for first in range(start, total, size):
        buffer.insert(rows(first, min(size, total - first)))
    return buffer


MAKERS: dict[str, Callable[[], Buffer]] = {
    "reservoir": lambda: Reservoir(20, seed=3),
    "class_balanced": lambda: ClassBalanced(20, seed=3),
    "class_balanced_per_class": lambda: ClassBalanced(capacity_per_group=2, seed=3),
    "ring": lambda: Ring(20, seed=3),
    "ring_by_task": lambda: Ring(20, by="task", seed=3),
    "fifo": lambda: Ring(20, by="all", seed=3),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_every_field_of_a_row_stays_together(maker: str) -> None:
    buffer = offer(MAKERS[maker](), 300)
    batch = buffer.sample(len(buffer))
    assert len(buffer) == 20
    assert len(set(index(batch).tolist())) == 20
    number = index(batch)
    assert torch.equal(batch.x, number[:, None, None].expand(-1, 3, 2).float())
    assert torch.equal(batch.y, number % 10)
    assert batch.task is not None
    assert torch.equal(batch.task, number % 3)
    assert batch.source is not None
    assert batch.source.tolist() == [1] * 20
    assert batch.lengths is None
    assert batch.mask is None


@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_the_reservoir_is_uniform_for_any_batch_size_and_across_a_save(size: int) -> None:
    total, capacity, repeats = 200, 20, 100 if size == 1 else 300
    counts = torch.zeros(total)
    for seed in range(repeats):
        buffer = offer(Reservoir(capacity, seed), total // 2, size)
        other = Reservoir(capacity, seed + 10_000)
        other.load_state_dict(buffer.state_dict())
        offer(other, total, size, start=total // 2)
        assert len(other) == capacity
        counts[held(other)] += 1
    # Draws without replacement vary less than multinomial ones: by 1 - N / n.
    statistic = chisquare(counts.numpy()).statistic / (1 - capacity / total)
    assert 120 < statistic < 290  # 199 degrees of freedom, beyond 1e-4 on both sides


def test_the_reservoir_keeps_the_first_until_it_is_full() -> None:
    assert held(offer(Reservoir(20, 0), 20, size=6)) == list(range(20))
    big = Reservoir(5, 0)
    big.insert(rows(0, 500))  # one batch larger than the buffer, slots drawn more than once
    assert len(big) == 5
    assert len(set(held(big))) == 5
    assert max(held(big)) > 5


def test_later_rows_win_a_slot() -> None:
    taken = []
    for seed in range(400):
        one, two = Reservoir(1, seed), Reservoir(1, seed)
        one.insert(rows(0, 2))
        two.insert(rows(0, 1))
        two.insert(rows(1, 1))
        assert held(one) == held(two)
        taken += held(one)
    assert 150 < sum(taken) < 250


@pytest.mark.parametrize("kind", [ClassBalanced, Ring])
def test_classes_share_the_room_equally_as_they_come(kind: type[Grouped]) -> None:
    buffer = kind(11, seed=0)
    label = torch.tensor
    buffer.insert(rows(0, 30, label([4] * 30)))
    assert buffer.sample(11).y.bincount().tolist() == [0, 0, 0, 0, 11]
    buffer.insert(rows(30, 30, label([2] * 30)))
    assert buffer.sample(11).y.bincount(minlength=5).tolist() == [0, 0, 5, 0, 6]
    buffer.insert(rows(60, 60, label([1, 0] * 30)))
    assert buffer.sample(11).y.bincount(minlength=5).tolist() == [2, 3, 3, 0, 3]  # the first classes get the rest
    assert len(buffer) == 11
    buffer.insert(rows(120, 1, label([3])))
    assert len(buffer) == 10  # a class with one example leaves its room empty
    assert buffer.sample(10).y.bincount().tolist() == [2, 2, 2, 1, 3]


def test_class_balanced_is_uniform_within_a_class_however_its_share_shrank() -> None:
    counts = torch.zeros(60)
    for seed in range(400):
        buffer = ClassBalanced(12, seed=seed)
        buffer.insert(rows(0, 30, torch.zeros(30).long()))
        buffer.insert(rows(30, 30, torch.tensor([0, 1] * 15)))
        counts[held(buffer)] += 1
    zeros = torch.cat([torch.arange(30), torch.arange(30, 60, 2)])
    assert counts[zeros].sum() == 400 * 6
    statistic = chisquare(counts[zeros].numpy()).statistic / (1 - 6 / 45)
    assert 15 < statistic < 90  # 44 degrees of freedom


def test_a_ring_holds_the_latest_of_each_group() -> None:
    assert held(offer(Ring(20, by="all"), 100)) == list(range(80, 100))
    assert held(offer(Ring(20), 100)) == list(range(80, 100))  # 10 classes in turn, the last two of each
    assert held(offer(Ring(capacity_per_group=2, by="task"), 100)) == list(range(94, 100))


def test_a_share_per_class_needs_no_total() -> None:
    buffer = offer(ClassBalanced(capacity_per_group=3), 200)
    assert len(buffer) == 30
    assert buffer.sample(30).y.bincount().tolist() == [3] * 10
    assert buffer.sample_per_group(2).y.bincount().tolist() == [2] * 10
    assert len(buffer.sample_per_group(7)) == 30


@pytest.mark.parametrize("count", [1, 3, 20, 80])
def test_sampling_is_uniform_and_without_replacement(count: int) -> None:
    buffer = offer(Reservoir(80, 0), 80)
    counts = torch.zeros(80)
    for _ in range(2000):
        drawn = index(buffer.sample(count))
        assert len(set(drawn.tolist())) == count
        counts[drawn] += 1
    if count < 80:
        assert 35 < chisquare(counts.numpy()).statistic / (1 - count / 80) < 140  # 79 degrees of freedom
    again = buffer.sample(200)
    assert len(again) == 200
    assert len(set(index(again).tolist())) < 80


def test_nothing_is_drawn_from_the_global_generator() -> None:
    state = torch.random.get_rng_state()
    for maker in MAKERS.values():
        buffer = offer(maker(), 100)
        buffer.sample(5)
        if isinstance(buffer, Grouped):
            buffer.sample_per_group(1)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("maker", MAKERS)
def test_a_saved_buffer_goes_on_exactly(maker: str) -> None:
    buffer = offer(MAKERS[maker](), 150)
    buffer.sample(3)
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    other = MAKERS[maker]()
    other.load_state_dict(torch.load(file, weights_only=True))
    offer(buffer, 400, start=150)
    offer(other, 400, start=150)
    for _ in range(3):
        one, two = buffer.sample(6), other.sample(6)
        assert torch.equal(index(one), index(two))
        assert torch.equal(one.x, two.x)
    assert buffer.stored_bytes() == other.stored_bytes() == 20 * (3 * 2 * 4 + 8 + 8 + 8)


def test_an_empty_buffer_is_saved_and_loaded_too() -> None:
    used = offer(Reservoir(5, 0), 50)
    used.load_state_dict(Reservoir(5, 1).state_dict())
    assert len(used) == 0
    assert used.stored_bytes() == 0
    assert held(offer(used, 50)) == held(offer(Reservoir(5, 1), 50))


def ragged(first: int, count: int, steps: int, lengths: list[int] | None = None) -> Batch:
    number = torch.arange(first, first + count)
    x = number[:, None, None].expand(-1, steps, 2).float() + 1
    y = number[:, None].expand(-1, steps).clone()
    return Batch(x=x, y=y, index=number, lengths=None if lengths is None else torch.tensor(lengths))


def test_sequences_of_any_length_are_padded_to_the_longest() -> None:
    buffer = Ring(10, by="all")
    buffer.insert(ragged(0, 2, 4))  # no lengths: all 4 valid
    buffer.insert(ragged(2, 2, 6, [5, 6]))
    buffer.insert(ragged(4, 2, 3))
    buffer.insert(ragged(6, 1, 2, [1]))
    batch = buffer.sample(7).rows(torch.arange(7))
    batch = batch.rows(index(batch).argsort())
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [4, 4, 5, 6, 3, 3, 1]
    assert batch.x.shape == (7, 6, 2)
    for i, width in enumerate([4, 4, 6, 6, 3, 3, 2]):
        assert (batch.x[i, :width] == i + 1).all()
        assert (batch.x[i, width:] == 0).all()
        assert (batch.y[i, :width] == i).all()
        assert (batch.y[i, width:] == UNSCORED).all()
    assert batch.mask is None
    assert buffer.stored_bytes() == 7 * (6 * 2 * 4 + 6 * 8 + 8 + 8)


def test_a_mask_that_only_some_rows_have() -> None:
    buffer = Ring(10, by="all")
    buffer.insert(ragged(0, 1, 2, [1]))
    buffer.insert(Batch(x=torch.ones(1, 3, 2), y=torch.ones(1, 3).long(), mask=torch.tensor([[True, False, True]])))
    buffer.insert(ragged(1, 1, 4, [2]))
    batch = buffer.sample(3)
    batch = batch.rows(index(batch).argsort())
    assert batch.mask is not None
    right = [[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]  # index -1, then 0 and 1
    assert batch.mask.int().tolist() == right


def test_inputs_without_a_time_axis_and_extra_fields() -> None:
    buffer = Reservoir(6, 0, fields=["logits"])
    for first in (0, 3):
        number = torch.arange(first, first + 3)
        logits = number[:, None].expand(-1, 4).float().requires_grad_()
        buffer.insert(Batch(x=number[:, None].float(), y=number, extra={"logits": logits, "other": number}))
    batch = buffer.sample(6)
    assert torch.equal(batch.extra["logits"][:, 0], batch.y.float())
    assert not batch.extra["logits"].requires_grad
    assert list(batch.extra) == ["logits"]
    with pytest.raises(ValueError, match="no extra field 'logits'"):
        buffer.insert(rows(0, 2))


def test_what_cannot_be_stored_is_refused() -> None:
    buffer = offer(Reservoir(20, 0), 20)
    with pytest.raises(ValueError, match="task labels"):
        buffer.insert(Batch(x=torch.zeros(2, 3, 2), y=torch.zeros(2).long()))
    with pytest.raises(ValueError, match=r"'x' was stored with shape \[3, 2\] a row and now has \[3, 5\]"):
        buffer.insert(Batch(x=torch.zeros(25, 3, 5), y=torch.zeros(25).long(), task=torch.zeros(25).long()))
    with pytest.raises(ValueError, match="holds no example"):
        Reservoir(5, 0).sample(1)
    with pytest.raises(ValueError, match="needs one class a row"):
        ClassBalanced(5).insert(ragged(0, 2, 4))
    with pytest.raises(ValueError, match="either capacity or capacity_per_group"):
        Ring(5, 5)
    with pytest.raises(ValueError, match="at least 0"):
        Reservoir(-1, 0)


@pytest.mark.parametrize("buffer", [Reservoir(0, 0), ClassBalanced(0), ClassBalanced(capacity_per_group=0)])
def test_no_capacity_stores_nothing(buffer: Buffer) -> None:
    assert len(offer(buffer, 30)) == 0
    assert buffer.stored_bytes() == 0
