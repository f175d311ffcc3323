"""A home folder where nothing can be written, and a package that is read-only: a container, a shared machine."""

import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import clplat
from clplat._home import unheard
from clplat.config.check import _imported
from clplat.config.refusing import ConfigError

HOME_MODULE = """
import os
os.makedirs(os.path.expanduser('~/.settings'))
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder below a file: root, too, can write nothing there."""
    (tmp_path / "file").write_text("")
    home = tmp_path / "file" / "home"
    monkeypatch.setenv("HOME", str(home))
    return home


def test_a_module_that_cannot_write_to_the_home_folder_is_named_as_such(home, tmp_path, monkeypatch):
    (tmp_path / "writes_home.py").write_text(HOME_MODULE)
    (tmp_path / "writes_elsewhere.py").write_text("open('/nowhere/file', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError, match=r"stream\.benchmark\._target_: .*set HOME to a folder that can be written\.$"
    ):
        _imported("stream.benchmark._target_", "writes_home.two")
    with pytest.raises(ConfigError, match="Give an importable path"):
        _imported("stream.benchmark._target_", "writes_elsewhere.two")


def test_matplotlib_is_unheard_only_inside(caplog):
    logger = logging.getLogger("matplotlib.font_manager")
    with unheard():
        logger.warning("inside")
    logger.warning("outside")
    assert [record.message for record in caplog.records] == ["outside"]


def test_a_solver_that_avalanche_lacks_is_no_matter_of_clplat():
    with unheard():
        warnings.warn("no QP solver found on your system", UserWarning, stacklevel=1)
    with pytest.warns(UserWarning, match="no QP"):
        warnings.warn("no QP solver found on your system", UserWarning, stacklevel=1)


def run(site: Path, where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    unset = ("MPLCONFIGDIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    env = {key: value for key, value in os.environ.items() if key not in unset}
    command = [sys.executable, "-m", "clplat", *arguments]
    env |= {"PYTHONPATH": str(site), "COLUMNS": "400"}
    return subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_a_read_only_install_trains_in_silence_and_doctor_says_what_to_set(home, tmp_path):
    site, where = tmp_path / "site", tmp_path / "where"
    where.mkdir()
    package = shutil.copytree(
        Path(clplat.__file__).parent, site / "clplat", ignore=shutil.ignore_patterns("__pycache__")
    )
    (package / "kernels" / "__pycache__").write_text("")  # no folder can be made there, by root neither
    short = ("strategy=finetune", "stream.experiences=2", "training.epochs=1", "tracking=none", "threads=1")
    done = run(site, where, "train", "learner=min_gru,elman", *short, "progress=false", "--multirun")
    assert done.returncode == 0, done.stderr
    assert len(list(where.rglob("result.json"))) == 2
    assert "atplotlib" not in done.stdout + done.stderr and "mkdir" not in done.stderr
    doctor = run(site, where, "doctor")
    assert (doctor.returncode, doctor.stderr) == (0, "")
    lines = {" ".join(line.split()) for line in doctor.stdout.splitlines()}
    for start, cure in (("import avalanche note", "HOME"), ("matplotlib note", "MPLCONFIGDIR")):
        assert any(line.startswith(start) and f"set {cure} to" in line for line in lines), (start, lines)
    assert any(line.startswith("CPU kernels note") for line in lines)  # without numba, that it is missing
    assert "reinstall" not in doctor.stdout
