"""The saved charts view in a real browser: its form is internal to MLflow, so only looking at the page can tell.

Run with `CLPLAT_BROWSER=1 pytest -m browser`. It needs Chromium and its driver (Debian: chromium, chromium-driver) and
selenium (the extra `browser`). $CLPLAT_SCREENSHOT names a file for the picture.
"""

import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from clplat.report import folder as report
from clplat.report.summary import Names, summarise
from clplat.scores import Results
from clplat.tracking.tracker import Tracker
from clplat.tracking.view import charts_url

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not os.environ.get("CLPLAT_BROWSER"), reason="set CLPLAT_BROWSER=1 to run tests in Chromium"),
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
    ),
]

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1640,2400"
)
TIDY = """
    document.head.insertAdjacentHTML('beforeend', '<style>.modebar { display: none }</style>');
    const close = 'button[aria-label="Close"], [data-component-id*="assistant"][data-component-id*="close"]';
    document.querySelectorAll(close).forEach(button => button.click());
"""
"""For the picture: no toolbars over the charts (without a mouse they always show), no assistant beside them."""

LOSSES = {"finetune": (0.42, 0.03), "ewc": (0.2, 0.06), "replay": (0.06, 0.02)}
"""Of each strategy: how much of an experience's accuracy the next one costs, and how much seeds differ."""


def scores(strategy: str, seed: int, experiences: int = 5) -> Results:
    """Made-up forgetting of a believable shape."""
    loss, spread = LOSSES[strategy]
    draw = random.Random(f"{strategy}{seed}")
    found = Results.empty(experiences)
    found.append([0.1] * experiences, [0.1] * experiences, -1, 0)
    accuracy = [0.1] * experiences
    for i in range(experiences):
        accuracy = [a * (1 - loss) + draw.gauss(0, spread) if j < i else a for j, a in enumerate(accuracy)]
        accuracy[i] = draw.uniform(0.96, 0.99)
        row = [min(max(a, 0), 1) for a in accuracy]
        found.append(row, row, i, 200 * (i + 1))
    return found


def log_sweep(folder: Path, uri: str) -> str:
    """Three strategies with three seeds; returns the MLflow experiment id."""
    experiment_id = ""
    for strategy in LOSSES:
        for seed in range(3):
            found = scores(strategy, seed)
            names = Names(stream="split_digits", learner="lstm", strategy=strategy, sweep="demo")
            tracker = Tracker(folder / f"{strategy}{seed}", experiment="forgetting", uri=uri)
            tracker.start(names, {"seed": seed})
            for step in range(0, 1000, 50):
                tracker.log({"train/loss": 2.3 * 0.99 ** (step % 200)}, step)
            growing, table = Results.empty(found.all.experiences), found.all
            for row, trained, at in zip(table.rows.tolist(), table.trained, table.step, strict=True):
                growing.append(row, row, trained, at)
                tracker.log_results(growing)
            summary = summarise(names, seed, growing)
            labels = [f"digits {j}" for j in range(table.experiences)]
            report.finish(tracker.folder, summary, growing, labels, tracker.where())
            tracker.finish(summary.metrics, growing.all.finished)
            assert tracker.close() == 0
            experiment_id = tracker.experiment_id
    return experiment_id


@pytest.fixture
def ui(tmp_path):
    """A sweep, and the UI that `clplat ui` serves for it; gives the experiment's id and the host."""
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    experiment_id = log_sweep(tmp_path, uri)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from clplat.tracking.server import ui; ui({uri!r}, {port})"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    host = f"http://127.0.0.1:{port}"
    try:
        link = next(line for line in server.stdout if "forgetting curves of" in line)
        assert charts_url(host, experiment_id) in link
        yield experiment_id, host
    finally:
        server.terminate()
        server.stdout.close()
        assert server.wait(20) == 0
        with pytest.raises(OSError):
            urllib.request.urlopen(host, timeout=2)


def test_forgetting_curves_are_there_at_once(ui, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")  # the extra `browser`, which CI does not install
    experiment_id, host = ui
    options = webdriver.ChromeOptions()
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path / 'chromium'}"]:
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or ""
    driver = webdriver.ChromeService(shutil.which("chromedriver") or "")
    browser = webdriver.Chrome(options=options, service=driver)
    try:
        browser.get(charts_url(host, experiment_id))
        wanted = [
            "Average accuracy, forgetting",
            "Forgetting curves",
            "average accuracy",
            "forgetting",
            *(f"experience {j} - split_digits" for j in range(5)),
            *LOSSES,
        ]
        missing, text = wanted, ""
        for _ in range(60):
            text = browser.execute_script("return document.body.innerText")
            missing = [word for word in wanted if word not in text]
            if not missing and browser.execute_script("return document.querySelectorAll('.js-line').length") >= 12:
                break
            time.sleep(0.5)
        browser.set_window_size(1640, 1330)  # charts below the fold are only drawn in a tall window
        browser.execute_script(TIDY)
        time.sleep(2)
        picture = Path(os.environ.get("CLPLAT_SCREENSHOT") or tmp_path / "charts.png")
        browser.save_screenshot(str(picture))
        (tmp_path / "page.html").write_text(browser.page_source)
        assert not missing, f"not on the page: {missing}; see {picture}"
        lines = browser.execute_script("return document.querySelectorAll('.js-line').length")
        assert lines >= 3 * 3, f"{lines} lines on the page: the curves were not drawn"
        assert text.index("experience 4 - split_digits") < text.index("train/loss"), "our sections are not the first"
        link = browser.execute_script("return [...document.querySelectorAll('a')].map(a => a.href)")
        assert any("viewStateShareKey=clplat" in href for href in link), "the note has no link to the charts"
    finally:
        browser.quit()
