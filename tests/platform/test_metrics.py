"""Metrics against the papers' sums written out, against numbers worked by hand, and their NaN and sign rules."""

import io
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clplat import metrics
from clplat.scores import NAN, ScoreTable

HAND = torch.tensor(  # forgetting of j=0 has its maximum off the diagonal, in row 1
    [
        [0.8, 0.2, 0.1, 0.3],
        [0.9, 0.7, 0.3, 0.2],
        [0.4, 0.6, 0.9, 0.4],
        [0.3, 0.1, 0.5, 1.0],
    ],
    dtype=torch.float64,
)
BASELINE = torch.tensor([0.1, 0.15, 0.2, 0.25], dtype=torch.float64)


@st.composite
def matrices(draw, least: int = 1):
    size = draw(st.integers(least, 6))
    scores = st.floats(-5, 5, allow_nan=False, width=32)
    rows = draw(st.lists(st.lists(scores, min_size=size, max_size=size), min_size=size, max_size=size))
    return torch.tensor(rows, dtype=torch.float64)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def same(got: float, expected: float) -> bool:
    return got == pytest.approx(expected, abs=1e-9, nan_ok=True)


@given(matrices())
def test_levels_are_the_papers_sums(r):
    n = len(r)
    assert same(metrics.average_accuracy(r), mean(r[n - 1, j].item() for j in range(n)))
    incremental = mean(mean(r[i, j].item() for j in range(i + 1)) for i in range(n))
    assert same(metrics.average_incremental_accuracy(r), incremental)


@given(matrices())
def test_forgetting_is_the_papers_sum(r):
    n = len(r)
    each = [max(r[i, j].item() for i in range(n - 1)) - r[n - 1, j].item() for j in range(n - 1)]
    assert same(metrics.forgetting(r), mean(each))
    got = metrics.forgetting_per_experience(r)
    assert got[:-1].tolist() == pytest.approx(each)
    assert math.isnan(got[-1])


@given(matrices())
def test_transfers_are_the_papers_sums(r):
    n, baseline = len(r), torch.linspace(-1, 1, len(r), dtype=torch.float64)
    lopez = mean(r[n - 1, j].item() - r[j, j].item() for j in range(n - 1))
    ahead = mean(r[j - 1, j].item() - baseline[j].item() for j in range(1, n))
    assert same(metrics.backward_transfer(r), lopez)
    assert same(metrics.forward_transfer(r, baseline), ahead)


@given(matrices())
def test_references_are_the_papers_sums(r):
    n, reference = len(r), torch.linspace(0.5, 1, len(r), dtype=torch.float64)
    assert same(metrics.intransigence(r, reference), mean((reference[j] - r[j, j]).item() for j in range(n)))
    ratios = [mean(r[i, j].item() for j in range(i + 1)) / reference[i].item() for i in range(n)]
    assert same(metrics.omega(r, reference), mean(ratios))


@given(matrices())
def test_a_reference_run_gives_its_diagonal_and_the_averages_of_its_rows(r):
    n, table = len(r), ScoreTable(len(r))
    for i, row in enumerate(r):
        table.append(row, i, i)
    together = r.sin() + 2
    got = metrics.summary(table, together)
    assert same(got["intransigence"], mean((together[j, j] - r[j, j]).item() for j in range(n)))
    offline = [mean(together[i, j].item() for j in range(i + 1)) for i in range(n)]
    assert same(got["omega"], mean(mean(r[i, j].item() for j in range(i + 1)) / offline[i] for i in range(n)))
    assert got | {"intransigence": 0, "omega": 0} == pytest.approx(
        metrics.summary(table) | {"intransigence": 0, "omega": 0}, nan_ok=True
    )


def test_a_run_is_its_own_reference_without_loss():
    table = ScoreTable(4)
    for i, row in enumerate(HAND):
        table.append(row, i, i)
    got = metrics.summary(table, HAND)
    assert got["intransigence"] == 0
    assert got["omega"] == pytest.approx(1)


def test_the_docs_have_the_row_of_every_metric():
    page = (Path(__file__).parents[2] / "docs" / "semantics.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| `\w+` \| .* \d{4}( \(|\s*\|)", line)]
    assert rows == metrics.documented(), "replace the rows by those of clplat.metrics.documented()"


def test_a_metric_is_a_function_and_a_row(monkeypatch):
    def last(r):
        """The score on the last experience."""
        return float(r[-1, -1])

    monkeypatch.setitem(metrics.METRICS, "last", metrics.Metric(last, "last {score}", "nobody", 0, level=True))
    up, down = ScoreTable(4), ScoreTable(4, "loss", higher_is_better=False)
    for i, row in enumerate(HAND):
        up.append(row, i, i)
        down.append(row, i, i)
    assert metrics.summary(up)["last"] == metrics.summary(down)["last"] == 1.0
    assert metrics.METRICS["last"].title.format(score="loss") == "last loss"


@given(matrices(), st.data())
def test_after_each_is_the_metric_of_a_shorter_run(r, data):
    i = data.draw(st.integers(0, len(r) - 1))
    for metric in (metrics.average_accuracy, metrics.forgetting, metrics.backward_transfer):
        assert same(metrics.after_each(metric, r)[i].item(), metric(r[: i + 1, : i + 1].clone()))


def rows_of(r, between: int):
    """The rows of a run whose scores fall below R's between the ends of experiences."""
    table = ScoreTable(len(r))
    for i, row in enumerate(r):
        for k in range(between):
            table.append(row - 0.01 * (k + 1) * (i + 1), trained=i, step=10 * i + k, final=False)
        table.append(row, trained=i, step=10 * i + 9)
    return table


@given(matrices(least=2), st.integers(1, 3))
def test_worst_case_is_the_papers_sum(r, between):
    n, table = len(r), rows_of(r, between)
    lowest = []
    for j in range(n - 1):
        after = [row[j].item() for row, i in zip(table.rows, table.trained, strict=True) if i > j]
        lowest.append(min(after))
    got = metrics.summary(table)
    assert same(got["minimum"], mean(lowest))
    assert same(got["worst_case"], r[n - 1, n - 1].item() / n + (1 - 1 / n) * mean(lowest))


def test_worked_by_hand():
    assert metrics.average_accuracy(HAND) == pytest.approx(1.9 / 4)
    assert metrics.average_incremental_accuracy(HAND) == pytest.approx((0.8 + 0.8 + 1.9 / 3 + 1.9 / 4) / 4)
    assert metrics.forgetting(HAND) == pytest.approx((0.6 + 0.6 + 0.4) / 3)
    assert metrics.backward_transfer(HAND) == pytest.approx((-0.5 - 0.6 - 0.4) / 3)
    assert metrics.forward_transfer(HAND, BASELINE) == pytest.approx((0.05 + 0.1 + 0.15) / 3)
    assert metrics.intransigence(HAND, torch.ones(4)) == pytest.approx((0.2 + 0.3 + 0.1 + 0) / 4)


def test_forgetting_is_not_minus_backward_transfer():
    # Avalanche takes the diagonal instead of the maximum, and then always has F = -BWT.
    assert metrics.forgetting(HAND) > -metrics.backward_transfer(HAND)


def test_the_last_row_is_no_candidate_for_the_maximum():
    # Mammoth takes the maximum over all rows and clips at 0: a gain of 0.1 reads as no forgetting at all.
    assert metrics.forgetting(torch.tensor([[0.7, 0.0], [0.8, 0.9]])) == pytest.approx(-0.1)


def test_every_experience_but_the_last_counts():
    # LibContinual sums over j < T-2 and divides by T-1: 0 for two experiences, two thirds of it for four.
    assert metrics.forgetting(torch.tensor([[0.9, 0.0], [0.2, 0.9]])) == pytest.approx(0.7)
    four = torch.eye(4, dtype=torch.float64)
    four[3] = torch.tensor([0.4, 0.4, 0.4, 1.0])
    assert metrics.forgetting(four) == pytest.approx(0.6)
    assert metrics.backward_transfer(four) == pytest.approx(-0.6)


def test_forward_transfer_uses_the_untrained_learner():
    # Mammoth evaluates the current learner as the baseline, which makes FWT 0; continuum leaves the baseline out.
    r = torch.tensor([[1.0, 0.6], [1.0, 1.0]])
    assert metrics.forward_transfer(r, torch.tensor([0.5, 0.5])) == pytest.approx(0.1)


def test_inputs_are_left_alone():
    before = HAND.clone()
    table = rows_of(HAND, 2)
    metrics.forgetting_per_experience(HAND)
    metrics.summary(table)
    assert torch.equal(HAND, before)


def test_what_is_undefined_is_nan():
    one = torch.tensor([[0.5]])
    assert math.isnan(metrics.forgetting(one))
    assert math.isnan(metrics.backward_transfer(one))
    assert math.isnan(metrics.forward_transfer(one, torch.tensor([0.1])))
    assert all(math.isnan(value) for value in metrics.summary(ScoreTable(3)).values())
    table = ScoreTable(4)
    for i, row in enumerate(HAND):
        table.append(row, i, i)
    got = metrics.summary(table)
    assert {name for name, value in got.items() if math.isnan(value)} == {
        "forward_transfer", "intransigence", "omega", "minimum", "worst_case",
    }  # fmt: skip


def test_what_was_not_evaluated_does_not_count_as_zero():
    r = HAND.clone()
    r[0, 1:] = NAN
    r[1, 2:] = NAN
    r[2, 3:] = NAN
    assert metrics.forgetting(r) == pytest.approx(metrics.forgetting(HAND))
    assert metrics.average_incremental_accuracy(r) == pytest.approx(metrics.average_incremental_accuracy(HAND))
    assert math.isnan(metrics.forward_transfer(r, BASELINE))
    assert metrics.forgetting(r - 1) == pytest.approx(metrics.forgetting(HAND)), "scores may be negative"
    r[3, 0] = NAN
    assert math.isnan(metrics.average_accuracy(r))
    assert math.isnan(metrics.forgetting(r))


def test_a_row_between_that_missed_an_experience_does_not_count():
    table = ScoreTable(2)
    table.append([0.9, NAN], 0, 5)
    table.append([NAN, 0.3], 1, 6, final=False)
    table.append([0.6, 0.8], 1, 9)
    got = metrics.summary(table)
    assert got["minimum"] == pytest.approx(0.6)
    assert got["worst_case"] == pytest.approx(0.8 / 2 + 0.6 / 2)


def test_an_unfinished_run_is_judged_on_what_it_trained():
    table = ScoreTable(4)
    table.append(BASELINE, -1, 0)
    for i in range(2):
        table.append(HAND[i], i, i + 1)
    got = metrics.summary(table)
    assert table.finished == 2
    assert got["average"] == pytest.approx(0.8)
    assert got["forgetting"] == pytest.approx(-0.1)
    assert got["forward_transfer"] == pytest.approx(0.05)
    assert table.R[2:].isnan().all()


def test_a_loss_that_rose_is_forgetting():
    loss = ScoreTable(2, "bits_per_token", higher_is_better=False)
    loss.append([8.0, 8.0], -1, 0)
    loss.append([2.0, 7.0], 0, 10)
    loss.append([6.0, 3.0], 1, 11, final=False)
    loss.append([5.0, 2.5], 1, 20)
    got = metrics.summary(loss, reference=torch.tensor([[1.5, 9.0], [9.0, 2.0]], dtype=torch.float64))
    assert got["average"] == pytest.approx(3.75)
    assert got["average_incremental"] == pytest.approx((2 + 3.75) / 2)
    assert got["forgetting"] == pytest.approx(3.0)
    assert metrics.forgetting_so_far(loss) == got["forgetting"]
    assert got["backward_transfer"] == pytest.approx(-3.0)
    assert got["forward_transfer"] == pytest.approx(1.0)
    assert got["intransigence"] == pytest.approx(0.5)
    assert got["minimum"] == pytest.approx(6.0)
    assert got["worst_case"] == pytest.approx(2.5 / 2 + 6.0 / 2)
    assert math.isnan(got["omega"])


@given(matrices(least=2))
def test_signs_turn_round_exactly_once(r):
    up, down = ScoreTable(len(r)), ScoreTable(len(r), "loss", higher_is_better=False)
    for i, row in enumerate(r):
        up.append(row, i, i)
        down.append(-row, i, i)
    a, b = metrics.summary(up), metrics.summary(down)
    for level in ("average", "average_incremental"):
        assert same(a[level], -b[level])
    for change in ("forgetting", "backward_transfer"):
        assert same(a[change], b[change])


def test_masked_scores_have_no_forward_transfer():
    table = ScoreTable(2, masked=True)
    table.append([0.1, 0.1], -1, 0)
    table.append([0.9, 0.0], 0, 1)
    table.append([0.8, 0.9], 1, 2)
    assert math.isnan(metrics.summary(table)["forward_transfer"])


def test_rows_come_back_from_a_checkpoint():
    table = rows_of(HAND, 2)
    file = io.BytesIO()
    torch.save(table.state_dict(), file)
    file.seek(0)
    back = ScoreTable(4)
    back.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(back.rows, table.rows)
    assert (back.trained, back.step, back.final) == (table.trained, table.step, table.final)
    assert metrics.summary(back) == pytest.approx(metrics.summary(table), nan_ok=True)
    with pytest.raises(ValueError, match="of 4 experiences, this stream has 3"):
        ScoreTable(3).load_state_dict(table.state_dict())


def test_R_and_the_baseline_come_from_the_right_rows():
    table = ScoreTable(2)
    assert table.baseline.isnan().all()
    assert not table.has_between
    table.append([0.1, 0.2], -1, 0)
    assert not table.has_between
    table.append([0.3, 0.4], 0, 1, final=False)
    table.append([0.5, 0.6], 0, 2)
    assert table.has_between
    assert table.finished == 1
    assert table.baseline.tolist() == [0.1, 0.2]
    table.append([0.7, 0.8], 1, 3, final=False)
    assert table.R[0].tolist() == [0.5, 0.6]
    assert table.R[1].isnan().all()


@pytest.mark.parametrize(
    ("row", "trained", "step", "message"),
    [
        ([0.1], 1, 9, r"K = 2 entries, got shape \[1\]"),
        ([0.1, 0.2], 2, 9, r"-1\.\.1, got 2"),
        ([0.1, 0.2], -1, 9, "order of training: got experience -1"),
        ([0.1, 0.2], 1, 3, "step 3 after experience 0, step 5"),
        ([0.1, 0.2], 0, 9, "Experience 0 already has its final row"),
    ],
)
def test_a_wrong_row_is_refused(row, trained, step, message):
    table = ScoreTable(2)
    table.append([0.1, 0.2], 0, 5)
    with pytest.raises(ValueError, match=message):
        table.append(row, trained, step)
