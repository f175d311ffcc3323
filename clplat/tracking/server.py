"""The MLflow UI on loopback, with links to the forgetting curves. Nothing here imports mlflow: `clplat ui` starts fast."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request

from clplat.tracking.base import TrackingError
from clplat.tracking.sqlite import relocate
from clplat.tracking.store import check_server, database_path, default_uri, without_password
from clplat.tracking.view import VIEW_TAG, charts_url

PORT = 5000
HOST = f"http://127.0.0.1:{PORT}"
"""Where `ui` serves by default."""


def ui(uri: str | None = None, port: int = PORT) -> int:
    """Serve the MLflow UI on loopback until it is told to stop, and print the links to the forgetting curves.

    With an http(s) store there is nothing to serve: the links are printed, and that is all.

    Args:
        uri: the store; None for `default_uri()`.
        port: on 127.0.0.1.

    Returns:
        The server's exit code, 0 if it was told to stop.

    Raises:
        TrackingError: the store is missing or down, the port is taken, or the server ended while starting.
    """
    uri = without_password(uri) if uri else default_uri()
    if uri.startswith(("http://", "https://")):
        check_server(uri)
        _print_links(uri)
        return 0
    database = database_path(uri)
    if database is not None and not database.exists():
        raise TrackingError(f"There is no store at {database}. Train something here first, or name another store.")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise TrackingError(f"Port {port} on 127.0.0.1 is taken. Give another one.")
    if database is not None:
        with contextlib.suppress(sqlite3.Error):  # a store that cannot be changed can be looked at
            relocate(database)
    host = f"http://127.0.0.1:{port}"
    # Without these two the server takes 2 GB and ten processes.
    environment = {
        "PYTHONWARNINGS": "ignore",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]  # a line for every request would bury the links
    command += ["--backend-store-uri", uri if database is None else f"sqlite:///{database}"]
    if database is not None:
        command += ["--artifacts-destination", (database.resolve().parent / "mlruns").as_uri()]
    # In a session of its own the server and its worker can be stopped together.
    server = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        _signal_group(server, signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while server.poll() is None and not stopped:
            try:
                check_server(host, timeout=1.0)
            except TrackingError:
                time.sleep(0.2)
            else:
                _print_links(host)
                break
        else:
            if not stopped:
                raise TrackingError(f"The MLflow server ended while starting (exit code {server.returncode}).")
        code = server.wait()
        return 0 if stopped else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signal_group(server, signal.SIGKILL)


def _signal_group(server: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, number)


def _print_links(host: str) -> None:
    request = urllib.request.Request(
        f"{host.rstrip('/')}/api/2.0/mlflow/experiments/search",
        data=json.dumps({"max_results": 1000}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            experiments = json.load(answer).get("experiments", [])
    except (OSError, ValueError):
        experiments = []
    print(f"MLflow UI: {host}", flush=True)
    for experiment in experiments:
        if any(tag["key"] == VIEW_TAG for tag in experiment.get("tags", [])):
            link = charts_url(host, experiment["experiment_id"])
            print(f"forgetting curves of {experiment['name']}: {link}", flush=True)
