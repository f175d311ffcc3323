"""Generated streams: every label against a brute-force computation, every law of the draws, and the chance levels."""

import math

import pytest
import torch
from torch import Tensor

from clplat.streams.experience import UNSCORED, Batch, Data, Stream
from clplat.streams.mqar import MQAR, mqar
from clplat.streams.parity import parity
from clplat.streams.permuted_copy import permuted_copy
from clplat.streams.regular import LANGUAGES, regular
from clplat.streams.selective_copy import selective_copy
from clplat.streams.synthetic import Draws, GeneratedData, set_key, splitmix64

SMALL = {"train_size": 300, "valid_size": 20, "test_size": 50}
STREAMS = [
    pytest.param(lambda **k: permuted_copy(3, **{**SMALL, **k}), id="permuted_copy"),
    pytest.param(lambda **k: parity(experiences=3, **{**SMALL, **k}), id="parity"),
    pytest.param(
        lambda **k: regular(lengths=[(9, 12), (13, 20), (5, 30)], test_lengths=None, **{**SMALL, **k}), id="regular"
    ),
    pytest.param(lambda **k: selective_copy(3, tokens=4, blanks=9, **{**SMALL, **k}), id="selective_copy"),
    pytest.param(lambda **k: mqar(3, vocabulary=32, length=24, **{**SMALL, **k}), id="mqar"),
    pytest.param(
        lambda **k: mqar(3, vocabulary=32, length=24, random_filler=True, **{**SMALL, **k}), id="mqar, random filler"
    ),
]


def everything(data: Data | None) -> Batch:
    assert data is not None
    return data.batch(torch.arange(len(data)))


def rows_of(batch: Batch) -> list[tuple]:
    """Each row without its padding, so that batches of different widths can be compared."""
    out = []
    for i in range(len(batch)):
        t = batch.x.shape[1] if batch.lengths is None else int(batch.lengths[i])
        mask = None if batch.mask is None else batch.mask[i, :t].tolist()
        y = batch.y[i] if batch.y.ndim == 1 else batch.y[i, :t]
        out.append((batch.x[i, :t].flatten().tolist(), y.flatten().tolist(), mask))
    return out


# Draws -----------------------------------------------------------------------------------------------------------


def test_splitmix64_equals_its_definition():
    word = (1 << 64) - 1

    def mixed(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        return z ^ (z >> 31)

    counters = [0, 1, 2, -1, 2**62, -(2**63), 2**63 - 1, 123456789]
    assert [v & word for v in splitmix64(torch.tensor(counters)).tolist()] == [mixed(c & word) for c in counters]
    # The first outputs of the reference implementation for seed 0.
    golden = 0x9E3779B97F4A7C15
    signed = [(golden * k & word) - (1 << 64) * ((golden * k & word) >> 63) for k in (1, 2, 3)]
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [v & word for v in splitmix64(torch.tensor(signed)).tolist()] == expected


def test_uniform_numbers_are_uniform_and_independent():
    u = Draws(5, torch.arange(20_000)).uniform("u", 4)
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert torch.allclose(u.mean(0), torch.tensor(0.5).double(), atol=0.01)
    assert torch.allclose((u**2).mean(0), torch.tensor(1 / 3).double(), atol=0.01)
    counts = (u * 16).long().flatten().bincount(minlength=16).double()
    chi2 = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert chi2 < 37.7  # 99.9 % quantile at 15 degrees of freedom
    neighbours = torch.cat([u, u.roll(1, 0)], 1).T
    off_diagonal = torch.corrcoef(neighbours) - torch.eye(8)
    assert float(off_diagonal.abs().max()) < 0.03


def test_names_and_keys_give_different_numbers_and_the_same_name_the_same():
    index = torch.arange(50)
    a = Draws(1, index).bits64("a", 3)
    assert torch.equal(a, Draws(1, index).bits64("a", 3))
    assert not (a == Draws(1, index).bits64("b", 3)).any()
    assert not (a == Draws(2, index).bits64("a", 3)).any()
    assert a.unique().numel() == 150


def test_distinct_draws_every_ordered_choice_equally_often():
    drawn = Draws(3, torch.arange(60_000)).distinct("d", 5, 3)
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == 4
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    counts = (drawn * torch.tensor([25, 5, 1])).sum(1).bincount()
    counts = counts[counts > 0].double()
    assert len(counts) == 60  # 5 * 4 * 3
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 98.3  # 99.9 % quantile at 59 degrees of freedom
    assert torch.equal(Draws(3, torch.arange(9)).distinct("all", 6, 6).sort(1).values, torch.arange(6).expand(9, -1))


# Laws of every generator -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", STREAMS)
def test_streams_are_learnable_and_say_their_kind(make):
    for task_incremental in (False, True):
        stream: Stream = make(task_incremental=task_incremental)
        stream.check()
        assert stream.scenario == ("task_incremental" if task_incremental else "domain_incremental")
        for i, e in enumerate(stream):
            assert e.task_label == (i if task_incremental else None)
            batch = everything(e.valid)
            assert len(batch) == 20
            assert (batch.task is not None) == task_incremental
            if batch.task is not None:
                assert batch.task.tolist() == [i] * 20
            if stream.length is not None:
                assert batch.x.shape[1] == stream.length


@pytest.mark.parametrize("make", STREAMS)
def test_an_example_does_not_depend_on_its_batch_nor_on_global_random_state(make):
    data = make()[1].train
    torch.manual_seed(0)
    whole = rows_of(everything(data))
    state = torch.get_rng_state()
    index = torch.tensor([299, 3, 3, 17, 0])
    torch.manual_seed(1)
    assert rows_of(make()[1].train.batch(index)) == [whole[i] for i in index.tolist()]
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())
    one_by_one = [rows_of(data.batch(torch.tensor([i])))[0] for i in range(20)]
    assert one_by_one == whole[:20]


@pytest.mark.parametrize("make", STREAMS)
def test_train_valid_and_test_differ_and_follow_the_data_seed(make):
    def parts(**k) -> list[list[tuple]]:
        return [rows_of(everything(d))[:20] for d in (make(**k)[2].train, make(**k)[2].valid, make(**k)[2].test)]

    a, b = parts(), parts(data_seed=7)
    assert a == parts()
    assert all(x != y for x, y in zip(a, b, strict=True))
    assert a[0] != a[1] != a[2] != a[0]


def test_sets_of_a_large_space_share_no_example():
    for stream in (permuted_copy(1), mqar(1), selective_copy(1)):
        e = stream[0]
        assert isinstance(e.train, GeneratedData)
        train = {tuple(v) for v in e.train.batch(torch.arange(5000)).x.flatten(1).tolist()}
        test = {tuple(v) for v in everything(e.test).x.flatten(1).tolist()}
        assert len(train) == 5000
        assert not train & test


def test_keys_of_sets_differ():
    keys = {set_key(s, g, p) for s in range(5) for g in ("mqar", "parity 1") for p in ("train", "valid", "test")}
    assert len(keys) == 30


def test_generated_data_refuses_an_empty_set():
    with pytest.raises(ValueError, match="size: got 0, it must be at least 1"):
        parity(train_size=0)


# Regular languages -----------------------------------------------------------------------------------------------


def class_of(language: str, x: list[int]) -> int:
    """One symbol at a time, by an automaton."""
    state = 0
    for t, symbol in enumerate(x):
        if language == "parity":
            state = 1 - state if symbol else state
        elif language == "even_pairs":
            state = int(x[0] != symbol) if t else 0
        else:
            state = {0: {0: 4, 1: 0, 2: 1, 3: 2, 4: 3}[state], 1: state, 2: (state + 1) % 5}[symbol]
    return state


@pytest.mark.parametrize("language", LANGUAGES)
def test_regular_languages_equal_their_automata(language):
    stream = regular(language, train_size=3000, test_size=500)
    symbols, classes = LANGUAGES[language]
    assert (stream.vocabulary, stream.outputs, stream[0].classes) == (symbols, classes, tuple(range(classes)))
    for data, shortest, longest in ((stream[0].train, 1, 40), (stream[0].test, 41, 100)):
        batch = everything(data)
        assert batch.lengths is not None
        lengths = batch.lengths.tolist()
        assert (min(lengths), max(lengths)) == (shortest, longest)
        assert batch.y.tolist() == [class_of(language, x[:n]) for x, n in zip(batch.x.tolist(), lengths, strict=True)]
        counts = batch.y.bincount(minlength=classes) / len(batch)
        assert (counts - 1 / classes).abs().max() < (0.08 if len(batch) == 500 else 0.05)
        content = torch.cat([x[:n] for x, n in zip(batch.x, lengths, strict=True)])
        assert (content.bincount(minlength=symbols) / len(content) - 1 / symbols).abs().max() < 0.02


def test_regular_languages_grow_by_experience():
    stream = regular("cycle_navigation", [(1, 5), (6, 10)], test_lengths=None, train_size=200, test_size=200)
    assert [e.name for e in stream] == ["cycle_navigation 1 to 5", "cycle_navigation 6 to 10"]
    for e, longest in zip(stream, (5, 10), strict=True):
        assert everything(e.test).x.shape[1] == longest
    shared = regular(lengths=[(1, 5), (6, 10)], train_size=20, test_size=50)
    assert all(min(len(x) for x, _, _ in rows_of(everything(e.test))) > 40 for e in shared)
    assert rows_of(everything(shared[0].test)) != rows_of(everything(shared[1].test))


def test_regular_languages_refuse():
    with pytest.raises(ValueError, match="language: got 'odd', allowed are 'even_pairs', 'parity', 'cycle_navigation'"):
        regular("odd")
    with pytest.raises(ValueError, match=r"lengths: got \[5, 4\].*1 <= least <= greatest"):
        regular(lengths=[(5, 4)])
    with pytest.raises(ValueError, match=r"lengths: got \[0, 4\]"):
        regular(test_lengths=(0, 4))
    with pytest.raises(ValueError, match="lengths: got none; give one pair"):
        regular(lengths=[])


# Permuted copy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_steps", [None, 9])
@pytest.mark.parametrize("permute", ["steps", "channels", "bits"])
def test_permuted_copy_asks_for_the_pattern_in_a_fixed_new_order(permute, input_steps):
    p, w = 4, 3
    i = input_steps or p
    stream = permuted_copy(4, p, input_steps, w, permute, train_size=400, test_size=10)
    inputs = everything(stream[0].train).x
    orders = []
    for e in stream:
        batch = everything(e.train)
        assert torch.equal(batch.x, inputs)  # identical in all experiences
        assert batch.x.shape == (400, i + 1 + p, w + 1)
        assert batch.mask is not None
        assert batch.mask.tolist() == [[False] * (i + 1) + [True] * p] * 400
        assert batch.x[:, i].tolist() == [[0] * w + [1]] * 400  # the stop bit
        assert batch.x[:, p:i].eq(0).all()
        assert batch.x[:, i + 1 :].eq(0).all()
        assert batch.x[:, :i, w].eq(0).all()
        pattern, answer = batch.x[:, :p, :w].flatten(1), batch.y[:, i + 1 :].flatten(1)
        # Every answer bit is one pattern bit, found by comparing all columns over all examples.
        same = (pattern[:, :, None] == answer[:, None, :]).all(0)
        assert same.sum(0).tolist() == [1] * (p * w)
        places = same.float().argmax(0).view(p, w)
        assert sorted(places.flatten().tolist()) == list(range(p * w))
        if permute == "steps":
            assert (places % w == torch.arange(w)).all()
            assert (places // w == places[:, :1] // w).all()
        if permute == "channels":
            assert (places // w == torch.arange(p)[:, None]).all()
            assert (places % w == places[:1] % w).all()
        orders.append(places.tolist())
    assert len({str(o) for o in orders}) > 1


def test_permuted_copy_bits_are_fair_and_the_first_experience_can_be_the_plain_copy():
    stream = permuted_copy(2, first_identity=True, train_size=5000)
    batch = everything(stream[0].train)
    assert torch.equal(batch.x[:, :5, :7], batch.y[:, 6:])
    assert torch.allclose(batch.x[:, :5, :7].mean(0), torch.tensor(0.5), atol=0.03)
    assert (stream.target, stream.outputs, stream.features, stream.length) == ("bits", 7, 8, 11)


def test_permuted_copy_refuses():
    with pytest.raises(ValueError, match=r"input_steps: got 4, it must be at least 5 \(pattern_steps\)"):
        permuted_copy(pattern_steps=5, input_steps=4)
    with pytest.raises(ValueError, match="allowed are 'steps', 'channels', 'bits'"):
        permuted_copy(permute="rows")  # type: ignore[arg-type]


# Parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_parity_equals_counting_the_last_bits(n):
    batch = everything(parity(first=n, experiences=1, train_size=3000)[0].train)
    assert batch.lengths is not None
    assert sorted(set(batch.lengths.tolist())) == list(range(n + 2, 4 * n + 2))
    assert batch.x.shape[1] == int(batch.lengths.max())
    assert batch.x.unique().tolist() == [0, 1]
    for x, length, y in zip(batch.x[..., 0].tolist(), batch.lengths.tolist(), batch.y.tolist(), strict=True):
        assert y == x[length - n : length].count(1.0) % 2
        assert not any(x[length:])


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_parity_of_a_constant_answer_is_as_documented(n):
    data = parity(first=n, experiences=1, train_size=40_000)[0].train
    labels = data.targets()
    assert labels is not None
    assert torch.equal(labels[-3:], data.batch(torch.arange(39_997, 40_000)).y)
    even = 0.5 if n % 2 else (n + 2) / (2 * n + 2)
    assert float((labels == 0).float().mean()) == pytest.approx(even, abs=4 * math.sqrt(0.25 / 40_000))


def test_parity_grows():
    stream = parity(first=2, experiences=3, step=2)
    assert [e.name for e in stream] == ["parity of 2 bits", "parity of 4 bits", "parity of 6 bits"]
    with pytest.raises(ValueError, match="first: got 0, it must be at least 1"):
        parity(first=0)


# Selective copy --------------------------------------------------------------------------------------------------


def natural(names: Tensor, x: Tensor) -> Tensor:
    return names.argsort()[x]


@pytest.mark.parametrize("relabel", ["all", "inputs"])
def test_selective_copy_asks_for_the_content_in_order(relabel):
    m, blanks, a = 4, 9, 6
    stream = selective_copy(3, a, m, blanks, relabel, train_size=2000)
    sequences = []
    for k, e in enumerate(stream):
        assert isinstance(e.train, GeneratedData)
        generate = e.train.generate
        inputs, targets = generate.inputs, generate.targets  # type: ignore[attr-defined]
        assert sorted(inputs.tolist()) == sorted(targets.tolist()) == list(range(a))
        assert (inputs.tolist() == list(range(a))) == (k == 0)
        if relabel == "inputs":
            assert targets.tolist() == list(range(a))
            assert (int(inputs[0]), int(inputs[-1])) == (0, a - 1)
        else:
            assert torch.equal(inputs, targets)
        batch = everything(e.train)
        x = natural(inputs, batch.x)
        sequences.append(x)
        for row, answer in zip(x.tolist(), batch.y.tolist(), strict=True):
            content = [t for t in row[: blanks + m] if t != 0]
            assert len(content) == m
            assert all(1 <= t <= a - 2 for t in content)
            assert row[blanks + m :] == [a - 1] * m
            assert answer[: blanks + m] == [UNSCORED] * (blanks + m)
            assert answer[blanks + m :] == [int(targets[t]) for t in content]
        assert set(batch.y[batch.y != UNSCORED].tolist()) == set(e.classes)
    assert torch.equal(sequences[0], sequences[1])  # only the alphabet differs


def test_selective_copy_places_and_content_are_uniform():
    x = everything(selective_copy(1, 6, 3, 7, train_size=20_000)[0].train).x
    share = (x[:, :10] != 0).float().mean(0)
    assert torch.allclose(share, torch.tensor(0.3), atol=0.015)
    counts = x[:, :10].flatten().bincount()[1:5] / 60_000
    assert torch.allclose(counts, torch.tensor(0.25), atol=0.01)


def test_selective_copy_refuses():
    with pytest.raises(ValueError, match="vocabulary: got 2, it must be at least 3"):
        selective_copy(vocabulary=2)
    with pytest.raises(ValueError, match="relabel: got 'targets', allowed are 'all', 'inputs'"):
        selective_copy(relabel="targets")  # type: ignore[arg-type]


# MQAR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random_filler", [False, True])
def test_mqar_asks_for_the_value_of_every_key_once(random_filler):
    v, length, p = 32, 24, 4
    stream = mqar(3, v, length, p, random_filler=random_filler, train_size=500)
    for k, e in enumerate(stream):
        assert isinstance(e.train, GeneratedData)
        names = e.train.generate.names  # type: ignore[attr-defined]
        assert (names.tolist() == list(range(v))) == (k == 0)
        batch = everything(e.train)
        x = natural(names, batch.x)
        for row, answer in zip(x.tolist(), batch.y.tolist(), strict=True):
            pairs = dict(zip(row[0 : 2 * p : 2], row[1 : 2 * p : 2], strict=True))
            assert len(pairs) == len(set(pairs.values())) == p
            assert all(1 <= key < v // 2 <= value < v for key, value in pairs.items())
            scored = [t for t in range(length) if answer[t] != UNSCORED]
            assert len(scored) == p
            assert all(t >= 2 * p and t % 2 == 0 for t in scored)
            assert {row[t]: answer[t] for t in scored} == {key: int(names[value]) for key, value in pairs.items()}
            if not random_filler:
                assert all(row[t] == 0 for t in range(2 * p, length) if t not in scored)
        assert set(batch.y[batch.y != UNSCORED].tolist()) == set(e.classes)


@pytest.mark.parametrize("power", [0.01, 1.0, 2.0])
def test_mqar_slots_are_drawn_without_replacement_by_weight(power):
    n, p, slots = 60_000, 2, 4
    drawn = MQAR(torch.arange(8), 2 * p + 2 * slots, p, power, False)._slots(Draws(0, torch.arange(n)))
    weight = [g ** (power - 1) for g in range(1, slots + 1)]
    for a in range(slots):
        for b in range(slots):
            share = float(((drawn[:, 0] == a) & (drawn[:, 1] == b)).float().mean())
            total = sum(weight)
            expected = 0.0 if a == b else weight[a] / total * weight[b] / (total - weight[a])
            assert share == pytest.approx(expected, abs=0.01)


def test_mqar_refuses():
    with pytest.raises(ValueError, match="length: got 14, it must be even and at least 4 \\* pairs = 16"):
        mqar(length=14)
    with pytest.raises(ValueError, match="vocabulary: got 8, it must be even and above 8"):
        mqar(vocabulary=8)
    with pytest.raises(ValueError, match=r"power: got 0\.0, it must be above 0"):
        mqar(power=0.0)
