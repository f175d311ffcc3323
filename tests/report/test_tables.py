"""The tables a person reads, and the file that a run leaves for them."""

import io
import json
import math
from typing import Any

import pytest
import yaml
from rich.console import Console

from clplat.report import tables as report
from clplat.report.summary import Names, RunSummary, read_run, summarise
from clplat.scores import Results

NAMES = Names(stream="split_digits", learner="lstm", strategy="ewc+replay")


def results(on: str = "test", masked: bool = True) -> Results:
    found = Results.empty(2, on=on)
    for row, trained, step in (([0.1, 0.2], -1, 0), ([0.9, 0.3], 0, 10), ([0.5, 0.8], 1, 20)):
        found.append(row, row if masked else [math.nan] * 2, trained, step)
    return found


def print_run(found: Results, *arguments, console: Console | None = None) -> None:
    report.print_run(found, summarise(NAMES, 7, found), *arguments, console=console)


def run(strategy: str, seed: int, average: float, **more: Any) -> RunSummary:
    given: dict[str, Any] = {"stream": "s", "learner": "l"} | more
    metrics = {"average": average, "forgetting": 0.25, "forward_transfer": math.nan}
    return RunSummary(strategy=strategy, seed=seed, metrics=metrics, **given)


def printed(show, *arguments) -> str:
    out = io.StringIO()
    show(*arguments, console=Console(file=out, width=200))
    return out.getvalue()


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


def test_a_result_comes_back_from_its_file(tmp_path):
    plain = summarise(NAMES, 7, results(on="valid")).plain()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["metrics"]["average"] == pytest.approx(0.65)
    assert plain["metrics"]["omega"] is None
    (tmp_path / "result.json").write_text(json.dumps(plain))
    config = {"seed": 7, "strategy": {"ewc": {"strength": 10.0, "_target_": "x.EWC"}}, "tracking": {"uri": None}}
    config["stream"] = {"order_seed": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    back = read_run(tmp_path / "result.json")
    assert (back.strategy, back.stream, back.learner, back.seed) == ("ewc+replay", "split_digits", "lstm", 7)
    assert back.metrics["forgetting"] == pytest.approx(0.4)
    assert math.isnan(back.metrics["omega"])
    assert back.seen["average"] == pytest.approx(0.65)
    assert (back.config, back.seeds) == (
        {"strategy.ewc.strength": "10.0", "strategy.ewc._target_": "x.EWC"},
        {"stream.order_seed": "4"},
    )
    assert (back.on, back.folder) == ("valid", tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"strategy": "x"}', '{"metrics": {}, "seen": {}, "who": 1}'])
def test_a_file_that_is_no_result_is_said(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=r"result\.json is not the result of a run"):
        read_run(tmp_path / "result.json")


def test_scores_without_classes_have_no_seen_column():
    found = results(masked=False)
    assert summarise(NAMES, 0, found).seen == {}
    assert "seen" not in printed(print_run, found)
    assert "seen classes" in printed(print_run, results())


def test_one_run_is_printed_with_its_matrix():
    text = printed(print_run, results(), NAMES, "http://host/#/x")
    assert "ewc+replay · lstm · split_digits" in text
    lines = rows(text)
    assert ["untrained", "0.100", "0.200"] in lines
    assert ["0", "0.900", "0.300"] in lines
    assert ["1", "0.500", "0.800"] in lines
    assert ["average", "accuracy", "0.6500", "0.6500"] in lines
    assert ["forward", "transfer", "0.1000", "-"] in lines
    assert "curves: http://host/#/x" in text
    assert "omega" not in text


def test_the_sweep_table_has_means_and_deviations_best_first():
    runs = [run("finetune", s, a) for s, a in enumerate((0.2, 0.4))] + [run("ewc", s, 0.5) for s in range(3)]
    text = printed(report.print_sweep, runs)
    ewc, finetune = rows(text)[-2:]
    assert ewc == ["ewc", "0.500", "±", "0.000", "0.250", "±", "0.000", "3"]
    assert finetune == ["finetune", "0.300", "±", "0.141", "0.250", "±", "0.000", "2"]
    assert "5 runs" in text
    assert "forward" not in text


def test_for_losses_the_lowest_comes_first():
    def loss(strategy, value):
        return run(strategy, 0, value, score="bits_per_token", higher_is_better=False)

    text = printed(report.print_sweep, [loss("a", 3.0), loss("b", 2.0)])
    assert [line[0] for line in rows(text)[-2:]] == ["b", "a"]
    assert "average bits per token" in text


def test_configurations_are_told_apart_by_what_differs():
    config = {"strategy.ewc.strength": "1", "optimizer.lr": "0.1"}
    runs = [
        run("ewc", 0, 0.5, config=config),
        run("ewc", 1, 0.5, config=config),
        run("ewc", 0, 0.6, config=config | {"strategy.ewc.strength": "9"}),
        run("replay", 0, 0.7, config={"optimizer.lr": "0.1", "strategy.replay.capacity": "50"}),
    ]
    groups = report.group(runs)
    assert [(key, len(members)) for key, members in groups] == [
        ({"strategy": "replay", "strategy.ewc.strength": ""}, 1),
        ({"strategy": "ewc", "strategy.ewc.strength": "9"}, 1),
        ({"strategy": "ewc", "strategy.ewc.strength": "1"}, 2),
    ]
    assert report.group([run("a", 0, 0.1), run("a", 0, 0.2, stream="t")])[0][0] == {
        "stream": "t",
        "strategy": "a",
    }


def test_what_is_undefined_for_a_seed_is_undefined_for_the_row():
    assert report.mean_and_spread([0.5, math.nan]) == "-"
    assert report.mean_and_spread([0.5]) == "0.500"
    assert report.mean_and_spread([0.25, 0.75]) == "0.500 ± 0.354"
    text = printed(report.print_sweep, [run("good", 0, 0.1), run("lost", 0, math.nan)])
    assert [line[0] for line in rows(text)[-2:]] == ["good", "lost"]


def test_the_note_is_markdown():
    from clplat.metrics import summary

    text = report.markdown(results(), summary(results().all), ["zero", "one"])
    assert "| average accuracy | 0.6500 |" in text
    assert "| one | 0.500 | 0.800 |" in text
    assert "omega" not in text
    assert "scored on" not in text
    assert "| scored on | valid |" in report.markdown(results("valid"), summary(results().all), ["zero", "one"])
    big = Results.empty(13)
    assert "after" not in report.markdown(big, summary(big.all), [str(i) for i in range(13)])


def test_print_to_standard_output(capsys):
    print_run(results())
    report.print_sweep([run("a", 0, 0.5)])
    out = capsys.readouterr().out
    assert "0.6500" in out
    assert "1 run," in out


def test_a_narrow_terminal_gets_whole_numbers_of_what_matters_most():
    metrics = summarise(NAMES, 0, results()).metrics
    runs = [RunSummary("finetune", "s", "l", seed, metrics) for seed in range(2)]
    out = io.StringIO()
    report.print_sweep(runs, Console(file=out, width=66))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 66
    assert "0.650 ± 0.000" in text
    assert "0.400 ± 0.000" in text
    assert "left out for want of room: incremental accuracy, forward transfer" in " ".join(text.split())


def test_tables_say_which_sets_were_scored():
    assert "tested on (columns)" in printed(print_run, results())
    assert "validated on (columns)" in printed(print_run, results(on="valid"))
    assert "2 runs on the validation sets, mean" in printed(
        report.print_sweep, [run("a", seed, 0.5, on="valid") for seed in range(2)]
    )
    mixed = printed(report.print_sweep, [run("a", 0, 0.5, on="valid"), run("a", 0, 0.4)])
    assert [line[:2] for line in rows(mixed)[-2:]] == [["a", "valid"], ["a", "test"]]
    assert "2 runs, mean" in mixed
