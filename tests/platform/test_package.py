"""What a user gets who installs clplat: the wheel's files, and that they work far from the repository.

The wheel is built from a copy of what git knows (new files that it does not ignore included), so that the checkout stays
clean and nothing that lies about in it can slip in.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("clplat", "conf", "strategies", "kernels")
LINKS = ("conf", "strategies", "kernels")


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Standard output of a command that has to succeed, with `path` first among the places of modules."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def files() -> list[str]:
    """The files of the repository, as git lists them."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    return [name for name in listed if name and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def wheel(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without an internet connection."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in files:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", built, source, cwd=source)
    (found,) = built.iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, without what it depends on."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel]
    run(*pip, cwd=target)
    return target


def packaged(name: str) -> str | None:
    """Where a file of the repository lies in the wheel; None: it does not belong there."""
    top = name.split("/")[0]
    if top not in FOLDERS or not (name.endswith((".py", ".yaml")) or Path(name).name == "py.typed"):
        return None
    return name if top == "clplat" else f"clplat/{name}"


def test_the_wheel_holds_every_file_and_no_other(wheel: Path, files: list[str]) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {name.split("/")[0].split("-")[0] for name in inside} == {"clplat"}
    modules = {name for name in inside if not name.split("/")[0].endswith(".dist-info")}
    expected = {place for name in files if (place := packaged(name)) is not None}
    assert len(expected) > 80
    assert sorted(modules - expected) == [], "should not be in the wheel"
    assert sorted(expected - modules) == [], "should be in the wheel"
    for must in ("clplat/conf/train.yaml", "clplat/conf/__init__.py", "clplat/strategies/replay.py", "clplat/py.typed"):
        assert must in modules


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    assert "Requires-Python: >=3.11" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    for name in ("torch", "pytorch-lightning", "hydra-core", "mlflow"):
        assert any(line.startswith(f"Requires-Dist: {name}") and "extra ==" not in line for line in required), name
    assert all("<" in line for line in required), "every requirement has an upper bound"


def test_the_links_are_relative_links_and_git_knows_them() -> None:
    for name in LINKS:
        link = ROOT / "clplat" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"
    assert (ROOT / "conf" / "__init__.py").is_file(), "Hydra needs it"
    for name in ("kernels", "strategies"):
        # With it, `import kernels` at the root is ours, and not the package of that name that other libraries mean.
        assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize("name", ["kernels", "strategies"])
def test_a_folder_at_the_root_hides_no_package_of_its_name(name: str) -> None:
    code = f"import importlib.util; s = importlib.util.find_spec({name!r}); print(None if s is None else s.origin)"
    origin = run(sys.executable, "-c", code, cwd=ROOT).strip()
    assert origin == "None" or "site-packages" in Path(origin).parts


AS_A_MODULE = """
import runpy, sys
# An editable install of the checkout would fill in whatever the installed package lacks.
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
runpy.run_module("clplat", run_name="__main__", alter_sys=True)
"""
"""What `python -m clplat` does, with nothing but what is installed."""


def test_the_installed_package_works_in_another_folder(installed: Path, tmp_path: Path) -> None:
    code = "import clplat, clplat.cli; print(clplat.__file__)"
    where = Path(run(sys.executable, "-c", code, cwd=tmp_path, path=installed).strip())
    assert where.is_relative_to(installed)
    listed = run(sys.executable, "-c", AS_A_MODULE, "list", cwd=tmp_path, path=installed)
    for name in ("replay", "transformer", "split_digits", "demo"):
        assert f"  {name} " in listed
    shown = run(
        sys.executable, "-c", AS_A_MODULE, "train", "--cfg", "job", "strategy=ewc", "learner=gru",
        cwd=tmp_path, path=installed,
    )  # fmt: skip
    assert "_target_: clplat.strategies.ewc.EWC" in shown
    assert "_target_: clplat.learners.mixers.gru.GRU" in shown
    assert "clplat train" in run(sys.executable, "-m", "clplat", "--help", cwd=tmp_path, path=installed)


def test_imports_go_one_way() -> None:
    """The contracts of import-linter in pyproject.toml."""
    tool = Path(sys.executable).parent / "lint-imports"
    if not tool.exists():
        pytest.skip("needs import-linter")
    assert "0 broken" in run(tool, "--no-cache", cwd=ROOT)


def test_run_is_a_function_and_where_a_runs_classes_are() -> None:
    """Importing the module takes the function's place in the package, so it is one itself."""
    code = (
        "import clplat; assert clplat.run is __import__('clplat.notebook').notebook.run\n"
        "from clplat.run import Run, Training\n"
        "import clplat.loop, clplat.notebook, clplat.settings\n"
        "assert (Run, Training) == (clplat.loop.Run, clplat.settings.Training)\n"
        "clplat.run.__class__.__call__.__globals__['run'] = lambda *a, **k: (a, k)\n"
        "assert clplat.run(1, epochs=2) == ((1,), {'epochs': 2})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
