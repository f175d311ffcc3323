"""The commands as a person types them: what they print, what they refuse, and how they end."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from clplat import checkpoint
from clplat.cli import main
from clplat.report.summary import Names
from clplat.train import train

QUICK = ["training.epochs=1", "progress=false", "learner.net.hidden=8", "tracking=none"]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def run(*arguments: str) -> int:
    return main(["train", *QUICK, *arguments])


def the_run(folder: Path = Path("runs")) -> Path:
    (found,) = folder.rglob("last.ckpt")
    return found.parent


def test_train_leaves_configuration_checkpoint_and_result(capsys):
    assert run("strategy=finetune", "seed=3") == 0
    folder = the_run()
    result = json.loads((folder / "result.json").read_text())
    assert result["strategy"] == "finetune" and result["seed"] == 3
    state = checkpoint.load(folder / "last.ckpt")
    assert state["complete"] and state["notes"]["config"]["seed"] == 3
    assert "average accuracy" in capsys.readouterr().out


def test_two_seeded_runs_are_equal_and_seeds_differ():
    hashes = []
    for number, seed in enumerate((1, 1, 2)):
        assert run("strategy=[replay,ewc]", f"seed={seed}", f"output_dir=out{number}") == 0
        state = checkpoint.load(the_run(Path(f"out{number}")) / "last.ckpt")
        hashes.append({k: v for k, v in state["learner"].items() if torch.is_tensor(v)})
    assert all(torch.equal(hashes[0][k], hashes[1][k]) for k in hashes[0])
    assert not all(torch.equal(hashes[0][k], hashes[2][k]) for k in hashes[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["strategy=repaly"], "strategy=repaly: unknown; did you mean 'replay'?"),
        (["stream=split_mnst"], "did you mean 'split_mnist'?"),
        (["sede=1"], "sede: unknown key; did you mean 'seed'?"),
        (["+sede=1"], "sede: unknown key; did you mean 'seed'?"),
        (["optimizer.lrr=0.1"], "optimizer.lrr: unknown key; did you mean 'lr'?"),
        (["+optimizer.lrr=0.1"], "optimizer.lrr: unknown key; did you mean 'lr'?"),
        (["optimizer.lr=fast"], "optimizer.lr: got 'fast', expected a number"),
        (["training.epochs=0"], "training.epochs: got 0, it must be at least 1"),
        (["training.epochs=2.5"], "training.epochs: got 2.5, expected a whole number or null"),
        (["optimizer.lr=-1"], "Invalid learning rate: -1"),
        (["optimizer.betas=3"], "optimizer.betas: got 3, expected a list."),
        (["optimizer.betas=[2.0,0.9]"], "optimizer: Invalid beta parameter at index 0: 2.0"),
        (["schedule=warmup_cosine", "schedule.warmup=2"], "schedule.warmup: got 2"),
        (["schedule=steps_down", "schedule.at=0.5"], "schedule.at: got 0.5, expected a list."),
        (["schedule=steps_down", "schedule.factor=-1"], "clplat: schedule.factor: got -1"),
        (["training=null"], "clplat: training=null: unknown. Allowed: default."),
        (["training=5"], "clplat: training=5: unknown. Allowed: default."),
        (["strategy=1"], "clplat: strategy=1: unknown. Allowed: agem, "),
        (["strategy=[1]"], "clplat: strategy=[1]: unknown. Allowed: agem, "),
        (["strategy.bogus=1"], "clplat: strategy.bogus: no strategy of that name was chosen. Chosen: replay;"),
        (["strategy=mas", "strategy.mas.seed={a:1}"], "clplat: strategy.mas.seed: got {'a': 1}, expected a whole number."),
        ([f"learner.net.layers={10**30}"], f"clplat: learner.net.layers: got {10**30}, a whole number must fit into 64 bits."),
        (["optimizer.lr=inf"], "clplat: optimizer.lr: got inf, it must be a finite number."),
        (["training._target_=clplat.run.Training"], "clplat.run.Training is called clplat.settings.Training since clplat 0.2"),
        (["threads=0"], "threads: got 0, it must lie in 1.."),
        (["threads=1000000"], "threads: got 1000000, it must lie in 1.."),
        (["training.steps=5"], "give one of the two"),
        (["seed=one"], "seed: got 'one', expected a whole number"),
        (["learner.head=task"], "learner.head: got 'task', which needs a task-incremental stream"),
        (["learner.head=many"], "learner.head: got 'many', allowed are 'auto'"),
        (["learner.clip_norm=-1"], "clplat: learner.clip_norm: got -1"),
        (["learner.net.layers=0"], "clplat: learner.net.layers: got 0, it must lie in 1..1000."),
        (["learner=mamba", "learner.net.hidden=-128"], "clplat: learner.net.hidden: got -128, it must lie in 1..100000."),
        (["stream=text", "stream.files=[a.txt]"], "clplat: stream.files: got ['a.txt'], expected a mapping or null."),
        (["strategy=ewc", "strategy.ewc.strenght=3"], "strategy.ewc.strenght: unknown key; did you mean 'strength'?"),
        (["strategy=freeze", "strategy.freez.blocks=1"], "strategy.freez: no strategy of that name was chosen; did you mean"),
        (["strategy=packnet"], "needs task labels (stream.task_incremental=true)"),
        (["strategy=chunked_hypernetwork", "strategy.chunked_hypernetwork.hidden=50"], "hidden: got 50, expected a list"),
        (["strategy=lwf", "strategy.lwf.strength=[1,x]"], "strategy.lwf.strength[1]: got 'x', expected a number"),
        (["strategy=freeze", "strategy.freeze.blocks=9"], "clplat: strategy.freeze.blocks: got 9, it must lie in 0..1"),
        (["strategy=remind", "strategy.remind.parts=7"], "clplat: strategy.remind.parts: got 7, vectors of width 8 can be cut"),
        (["strategy=remind", "strategy.remind.cut=9"], "clplat: strategy.remind.cut: got 9, the net has 1 blocks"),
        (["strategy=ewc", "stream=text"], "set fisher=sampled or fisher=empirical."),
        (["strategy=ewc", "strategy.ewc.fisher=x"], "clplat: strategy.ewc.fisher: got 'x', allowed are"),
        (["strategy=custom"], "strategy.custom._target_: no value given"),
        (["strategy=custom", "strategy.custom._target_=no_such.Thing"], "cannot import 'no_such.Thing'"),
        (["stream=split_mnist", "stream.source.data_root=/nowhere"], "/nowhere"),
        (["stream.layout=columns"], "layout"),
        (["stream.layout=pixels"], "set stream.layout=rows to read them row by row, or learner=mlp"),
        (["objective=regression"], "objective"),
        (["trainer.precision=16-mixed"], "trainer.precision: got '16-mixed', allowed are"),
        (["trainer.gradient_clip_val=1"], "set learner.clip_norm instead"),
        (["trainer.devices=2"], "trainer.devices: got 2"),
        (["resume=latest"], "resume=latest: no checkpoint under runs"),
        (["resume=/nowhere"], "resume=/nowhere: no checkpoint"),
        (["output_dir=/proc/nope"], "/proc/nope"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_one_line_before_training(arguments, said, capsys, monkeypatch):
    def never(*args: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr("clplat.loop.Run.go", never)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("clplat: ") and captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    assert not captured.out
    assert not [*Path("runs").glob("*/*")], "a refused run leaves no folder"


def test_a_gpu_that_is_not_there_is_refused_with_advice(capsys, monkeypatch):
    for kind in ("CUDA", "MPS"):
        monkeypatch.setattr(f"pytorch_lightning.accelerators.{kind}Accelerator.is_available", lambda: False)
    assert run("trainer=gpu") == 2
    assert capsys.readouterr().err.endswith(
        "trainer.accelerator: got 'gpu', and no GPU is found here (`clplat doctor` says why): set trainer=cpu.\n"
    )


def test_unwritable_directory_is_refused(tmp_path, capsys):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere; /proc stands for it in the test above")
    (tmp_path / "closed").mkdir(mode=0o500)
    assert run("output_dir=closed") == 2
    assert "output_dir" in capsys.readouterr().err


def test_debug_shows_the_traceback():
    with pytest.raises(Exception, match="strenght"):
        run("strategy=ewc", "strategy.ewc.strenght=3", "debug=true")


def test_nan_loss_ends_with_one_line_and_exit_code_1(capsys):
    assert run("strategy=finetune", "optimizer=sgd", "optimizer.lr=3e38", "training.epochs=3") == 1
    err = capsys.readouterr().err
    assert "became" in err and "experience" in err and err.count("\n") == 1


def test_experiment_null_is_the_default(capsys):
    assert run("strategy=finetune", "experiment=null") == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["strategy=finetune"], "40 steps of batch 40 an experience, on cpu"),
        (["strategy=[replay,ewc]", "training.epochs=null", "training.steps=2"], "2 steps of batch 40 an experience, on cpu"),
        (["strategy=joint"], "5 epochs of batch 40 for an experience's worth of what joint trains on, on cpu"),
        (["strategy=cumulative", "training.epochs=null", "training.steps=2"],
         "2 steps of batch 40 for an experience's worth of what cumulative trains on, on cpu"),
        (["strategy=gdumb"], "5 epochs of batch 40 for an experience's worth of what gdumb trains on, on cpu"),
        (["strategy=remind", "strategy.remind.parts=4"],
         "5 epochs of batch 40 for an experience's worth of what remind trains on, on cpu"),
    ],
)  # fmt: skip
def test_what_is_announced_is_what_will_be_trained(arguments, said, capsys, monkeypatch):
    def never(*args: object) -> None:
        raise Stopped

    class Stopped(Exception):
        pass

    monkeypatch.setattr("clplat.loop.Run.go", never)
    with pytest.raises(Stopped):
        run("training.epochs=5", "training.batch_size=40", *arguments)
    assert said in capsys.readouterr().out


def test_a_checkpoint_of_the_first_edition_is_refused(capsys):
    assert run("strategy=finetune") == 0
    path = the_run() / "last.ckpt"
    state = torch.load(path, weights_only=True)
    for layout, said in (
        (1, "was written by clplat before 0.2: its state is called otherwise now. Finish that run"),
        (9, "got layout 9"),
    ):
        torch.save(state | {"format": layout}, path)
        capsys.readouterr()
        assert main(["train", "resume=latest"]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


def test_training_from_python_leaves_the_process_as_it_was(tmp_path):
    """Threads and warnings belong to the command; a notebook has its own."""
    with initialize_config_module("clplat.conf", version_base="1.3"):
        cfg = compose("train", [*QUICK, "strategy=finetune", "threads=1", "training.epochs=null", "training.steps=1"])
    threads, filters = torch.get_num_threads(), list(warnings.filters)
    torch.set_num_threads(2)
    try:
        train(cfg, tmp_path, Names("s", "l", "finetune"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert [f for f in warnings.filters if f not in filters] == []


def test_resume_refuses_other_options_and_takes_none(capsys):
    assert run("strategy=finetune") == 0
    folder = the_run()
    capsys.readouterr()
    assert run("strategy=finetune", f"resume={folder}", "optimizer.lr=0.5") == 2
    assert "optimizer.lr: 0.001 in the run, 0.5 given" in capsys.readouterr().err
    assert main(["train", f"resume={folder}"]) == 0
    assert [p.parent for p in Path("runs").rglob("last.ckpt")] == [folder]


@pytest.mark.slow
def test_resume_takes_tracking_and_threads_from_the_run_unless_they_are_given(capsys):
    assert run("strategy=finetune", "learner=gru", "threads=1", "output_dir=elsewhere") == 0
    folder = next(Path("elsewhere").rglob("last.ckpt")).parent
    capsys.readouterr()

    def resumed(*arguments: str) -> DictConfig:
        assert main(["train", "resume=latest", "output_dir=elsewhere", *arguments]) == 0, capsys.readouterr().err
        return OmegaConf.load(folder / "config.yaml")  # type: ignore[return-value]  # a mapping

    own = resumed()
    assert own.threads == 1
    assert own.tracking._target_ == "clplat.tracking.base.NoTracker"
    assert own.learner.net.mixer._target_.endswith("GRU")
    assert resumed("threads=2", "optimizer.lr=0.001").threads == 2
    store = f"sqlite:///{Path('other.db').absolute()}"
    assert resumed("tracking=mlflow", f"tracking.uri={store}").tracking.uri == store
    assert not Path("mlruns.db").exists()
    assert main(["train", f"resume={folder}", "learner=lstm", "strategy=replay", "training.epochs=7"]) == 2
    err = capsys.readouterr().err
    assert "learner.net.mixer._target_: clplat.learners.mixers.gru.GRU in the run" in err
    assert " more. Give the same options, or none but resume, debug" in err


def test_a_sweep_prints_the_forgetting_table(capsys):
    assert run("-m", "strategy=finetune,replay", "seed=0,1") == 0
    out = capsys.readouterr().out
    assert "finetune" in out and "replay" in out and "±" in out
    assert "strategy=finetune seed=0: average 0." in out and "strategy=replay seed=1: average 0." in out
    assert len(list(Path("runs").rglob("result.json"))) == 4


def test_a_sweep_names_all_that_varies_in_it_and_nothing_else(tmp_path, capsys):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    swept = "{mode: MULTIRUN, sweeper: {params: {learner: 'gru,lstm'}}}"
    (folder / "two.yaml").write_text(f"# @package _global_\nstream: {{experiences: 2}}\nhydra: {swept}\n")
    more = ["experiment=two", "strategy=[replay,ewc],finetune", "optimizer.lr=0.1", "seed=3"]
    assert run("--config-dir", str(folder.parent), *more) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ": average " in line]
    assert sorted(line.partition(":")[0] for line in lines) == sorted(
        f"learner={learner} strategy={strategy}"
        for learner in ("gru", "lstm")
        for strategy in ("[replay,ewc]", "finetune")
    )


def test_list_names_every_option_with_a_line(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for word in ("finetune", "ewc", "replay", "custom", "lstm", "transformer", "split_digits", "mqar", "demo"):
        assert word in out
    root = Path(__file__).parents[2] / "conf"
    from clplat.cli import options

    shown = "".join(out.split())
    for group in root.iterdir():
        if group.is_dir() and group.name != "__pycache__":
            for line in options(group).values():
                assert len(line) > 3, group
                assert "[" not in line or line[line.index("[") : line.index("]") + 1] in shown


def test_unknown_command_and_group(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
    assert main(["list", "strategies"]) == 2
    assert "did you mean 'strategy'?" in capsys.readouterr().err


def test_doctor_reports_and_succeeds_here(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "MLflow store" in out and "digits" in out


@pytest.mark.slow
def test_doctor_imports_numba_and_says_nothing_beside_its_table(tmp_path):
    """A numba that is installed and cannot be imported, as with a numpy that it does not know."""
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs another NumPy')")
    done = subprocess.run([sys.executable, "-m", "clplat", "doctor"], capture_output=True, text=True, timeout=120)
    assert "UserWarning" not in done.stderr + done.stdout
    if importlib.util.find_spec("numba") is not None:
        assert done.returncode == 1
        said = " ".join(done.stdout.split())
        assert "CPU kernels note none" in said
        assert "import numba wrong Numba needs another NumPy: reinstall it (pip install 'clplat[cpu]')" in said


def test_help_imports_nothing_heavy():
    code = "import sys, clplat.cli; sys.argv=['clplat','--help']\ntry: clplat.cli.main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch','pytorch_lightning','mlflow','hydra','numpy') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


OWN = """
from clplat.strategy import Strategy

class Counting(Strategy):
    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.calls = limit, 0

    def batch(self, learner, batch):
        self.calls += 1
        if self.calls == self.limit:
            open("reached", "w").close()
        return batch
"""


def test_a_strategy_from_a_module_that_can_be_imported(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_module.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        run("strategy=[replay,custom]", "strategy.custom._target_=my_module.Counting", "strategy.custom.limit=4") == 0
    )
    assert "replay+custom" in capsys.readouterr().out
    assert (tmp_path / "reached").exists()


@pytest.mark.slow
def test_a_strategy_from_the_users_own_package(tmp_path):
    """As the README says, from a folder outside the repository, alone and in a list."""
    (tmp_path / "my_pkg.py").write_text(OWN)
    out = ""
    for strategy in ("custom", "[replay,custom]"):
        command = [sys.executable, "-m", "clplat", "train", *QUICK, f"strategy={strategy}"]
        command += ["strategy.custom._target_=my_pkg.Counting", "strategy.custom.limit=4"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        (tmp_path / "reached").unlink()
        out = done.stdout
    assert "replay+custom" in out
