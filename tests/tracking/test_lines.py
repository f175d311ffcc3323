"""Lines of the charts: named by what varies, own classes apart, repeated seeds once, colours that can be told apart."""

import itertools

import numpy as np
import pytest
from tracked import client, results, run_of

from clplat.report.summary import Names
from clplat.tracking.lines import MARKS, PALETTE, TrackedRun, _hash, lines
from clplat.tracking.tracker import Tracker

BASE = {"strategy.name": "replay", "learner.name": "lstm", "stream.name": "split_digits", "seed": "0"}


def named(*runs: dict[str, str], finished: tuple[int, ...] = ()) -> list[str | None]:
    """Lines of runs that differ from `BASE` as given, begun in this order."""
    made = [TrackedRun(str(i), BASE | change, i, i in finished) for i, change in enumerate(runs)]
    found = lines(made)
    return [found[str(i)][0].rstrip() if str(i) in found else None for i in range(len(runs))]


def test_a_line_is_named_by_its_strategy_if_nothing_else_varies():
    assert named({}, {"seed": "1", "strategy.replay.seed": "1"}, {"strategy.name": "ewc", "strategy.ewc.strength": "9"}) == [
        "replay", "replay", "ewc",
    ]  # fmt: skip


def test_learners_streams_and_varied_options_are_lines_of_their_own():
    assert named({}, {"learner.name": "gru"}, {"stream.name": "text"}) == [
        "replay, lstm, split_digits", "replay, gru, split_digits", "replay, lstm, text",
    ]  # fmt: skip
    ewc = {"strategy.name": "ewc"}
    assert named({}, ewc | {"strategy.ewc.strength": "1"}, ewc | {"strategy.ewc.strength": "9"}) == [
        "replay", "ewc, strength=1", "ewc, strength=9",
    ]  # fmt: skip
    assert named({"training.epochs": "1"}, {"training.epochs": "2"}) == ["replay, epochs=1", "replay, epochs=2"]


@pytest.mark.parametrize(
    "key", ["strategy.custom._target_", "learner.net.mixer._target_", "learner.net._target_", "stream._target_"]
)
def test_two_classes_of_ones_own_are_two_lines(key):
    assert named({key: "a.X"}, {key: "b.X"}) == ["replay, a.X", "replay, b.X"]


def test_a_seed_that_was_run_twice_is_in_the_line_once():
    assert named({}, {}) == [None, "replay"]
    assert named({}, {}, finished=(0,)) == ["replay", None]
    assert named({}, {}, {}, finished=(0, 1)) == [None, "replay", None]
    assert named({}, {"stream.order_seed": "1"}) == ["replay", "replay"]


def test_long_values_give_lines_of_their_own():
    found = named({"stream.files": "x" * 300 + "a"}, {"stream.files": "x" * 300 + "b"})
    assert len(set(found)) == 2
    assert all(len(name or "") < 100 for name in found)


def test_lines_get_the_colours_of_the_palette_in_the_order_in_which_they_began():
    made = [TrackedRun(f"{i}", BASE | {"strategy.name": f"s{i}"}, i, True) for i in range(2 * len(PALETTE))]
    found = lines(made[::-1])
    assert [found[str(i)][1] for i in range(2 * len(PALETTE))] == [*PALETTE, *PALETTE]
    for name, colour in found.values():
        assert MARKS[_hash(f"tag.line.{name}") % len(MARKS)] == colour
    later = lines([*made, TrackedRun("z", BASE, 99, True)])
    assert all(later[run_id][1] == colour for run_id, (_, colour) in found.items())


def test_the_hash_is_the_one_of_mlflows_page():
    # Fletcher's checksum over UTF-16, as its script has it (3.17).
    assert _hash("") == 0
    assert _hash("ab") == (97 + 98) | ((97 + 97 + 98) % 255) << 8
    assert _hash("\N{GRINNING FACE}") == (0xD83D + 0xDE00) % 255 | ((0xD83D + 0xD83D + 0xDE00) % 255) << 8


SEEN_BY = {  # Machado et al. 2009, severity 1: what an eye without one kind of cones sees, in linear RGB
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def lab(colour: str, eye: str) -> np.ndarray:
    """CIELAB of an sRGB colour as an eye sees it."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(SEEN_BY[eye]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    f = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(("count", "apart"), [(6, 20), (8, 14), (10, 12)])
def test_every_eye_can_tell_the_first_colours_apart(count, apart):
    for eye, (a, b) in itertools.product(SEEN_BY, itertools.combinations(PALETTE[:count], 2)):
        distance = np.linalg.norm(lab(a, eye) - lab(b, eye))
        assert distance > apart, f"{a} and {b} are {distance:.0f} apart for {eye}"


def test_runs_in_the_store_get_their_lines_and_change_them(tmp_path, store):
    def run(folder: str, strategy: str, learner: str = "lstm", seed: int = 0) -> Tracker:
        tracker = Tracker(tmp_path / folder, "lines", store, every=0.05)
        tracker.start(Names("split_digits", learner, strategy), {"seed": seed, "optimizer": {"lr": 0.1}})
        tracker.log_results(results(rows=1))
        assert tracker.close() == 0
        return tracker

    first = run("0", "replay")
    assert run_of(first).data.tags["line"].rstrip() == "replay"
    second = run("1", "replay", "gru")
    assert [run_of(t).data.tags["line"].rstrip() for t in (first, second)] == ["replay, lstm", "replay, gru"]
    assert [run_of(t).data.tags["mlflow.runColor"] for t in (first, second)] == [*PALETTE[:2]]
    again = run("2", "replay")
    assert "line" not in run_of(first).data.tags
    assert run_of(again).data.tags["line"].rstrip() == "replay, lstm"
    shown = client(first).search_runs([first.experiment_id], "tags.line != ''")
    assert {r.info.run_id for r in shown} == {second.run_id, again.run_id}
