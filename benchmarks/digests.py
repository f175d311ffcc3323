"""Digests of a run of every strategy and every learner: what a change of structure must leave as it is, bit for bit.

    python benchmarks/digests.py record old.json     # at the commit before the change
    python benchmarks/digests.py compare old.json    # after it, on the same machine with the same packages

Each run takes a few optimiser steps on each experience of a small stream, from the command line's own entry point, on
one thread. Digested are the weights, the strategy's state, R with and without unseen classes, optimiser and random
state of the last checkpoint, and MLflow's params and metrics. Each run has a process of its own, since compiled loops
may round otherwise behind others. Numbers depend on the processor and on versions, so
a record is never shipped. `--only NAME ...` takes some runs, `--part 0/2` every second one (for two processes).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[1]
SHORT = ["training.epochs=null", "training.steps=5", "training.batch_size=16", "training.log_every_n_steps=2"]
SMALL = ["learner.net.hidden=12", "stream=split_digits"]

STRATEGIES = {
    "ewc": ["strategy.ewc.examples=20"],
    "mas": ["strategy.mas.examples=20"],
    "refresh": ["strategy.refresh.examples=20"],
    "gpm": ["strategy.gpm.examples=20"],
    "ogd": ["strategy.ogd.examples=5", "strategy.ogd.capacity=12"],
    "packnet": ["stream.task_incremental=true"],
    "hypernetwork": ["strategy.hypernetwork.hidden=[6]", "strategy.hypernetwork.embedding=4"],
    "chunked_hypernetwork": [
        "stream.task_incremental=true",
        "strategy.chunked_hypernetwork.hidden=[8,8]",
        "strategy.chunked_hypernetwork.embedding=4",
        "strategy.chunked_hypernetwork.chunk=100",
        "strategy.chunked_hypernetwork.code=4",
    ],
    "recurrent_hypernetwork": [
        "stream.task_incremental=true",
        "strategy.recurrent_hypernetwork.hidden=8",
        "strategy.recurrent_hypernetwork.embedding=4",
        "strategy.recurrent_hypernetwork.chunk=100",
        "strategy.recurrent_hypernetwork.code=4",
    ],
    "generative_replay": ["strategy.generative_replay.hidden=8", "strategy.generative_replay.latent=3"],
    "icl": ["strategy.icl.random_features=12"],
    "remind": ["strategy.remind.capacity=40", "strategy.remind.parts=4"],
    "selective_init": ["strategy.selective_init.examples=10", "strategy.selective_init.steps=2"],
    "time_vectors": [],
    "custom": None,
}
"""What differs from a strategy's yaml, so that it acts in a few steps; None: no run of its own."""

LISTS = {
    "replay+ewc": ["strategy=[replay,ewc]", "strategy.ewc.examples=20"],
    "replay+center_loss+refresh": ["strategy=[replay,center_loss,refresh]", "strategy.refresh.examples=20"],
    "derpp+lwf": ["strategy=[derpp,lwf]"],
    "rewarming+replay": ["strategy=[rewarming,replay]", "schedule=warmup_cosine"],
    "hypernetwork+replay": [
        "strategy=[hypernetwork,replay]",
        "strategy.hypernetwork.hidden=[6]",
        "strategy.hypernetwork.embedding=4",
    ],
}
OTHERS = {
    "text": ["stream=text", "learner=lstm", "strategy=replay", "stream.bptt=10"],
    "text+nt_asgd": ["stream=text", "learner=awd_lstm", "strategy=finetune", "stream.bptt=10", "optimizer=nt_asgd"],
    "parity": ["stream=parity", "learner=gru", "strategy=replay"],
    "permuted_copy": ["stream=permuted_copy", "learner=elman", "strategy=ewc", "strategy.ewc.examples=20"],
    "selective_copy": ["stream=selective_copy", "learner=min_gru", "strategy=si"],
    "regular": ["stream=regular", "learner=lstm", "strategy=lwf"],
    "rotated_kept": ["stream=rotated_digits", "strategy=der", "learner.optimizer_state=kept", "learner.clip_norm=1.0"],
    "between": ["strategy=replay", "evaluation.every_n_steps=2", "evaluation.examples=20"],
    "growing": ["strategy=icarl", "learner.head=growing", "learner.logit_mask=seen"],
}


def runs() -> dict[str, list[str]]:
    """The overrides of every run, by name."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "conf" / "strategy").glob("*.yaml")):
        options = STRATEGIES.get(path.stem, [])
        if options is not None:
            found[f"strategy {path.stem}"] = [*SMALL, f"strategy={path.stem}", *options]
    for path in sorted((ROOT / "conf" / "learner").glob("*.yaml")):
        if not path.stem.startswith("_"):
            found[f"learner {path.stem}"] = ["stream=split_digits", f"learner={path.stem}", "strategy=replay"]
    found |= {f"list {name}": [*SMALL, *options] for name, options in LISTS.items()}
    found |= {f"other {name}": options for name, options in OTHERS.items()}
    return found


def digest(overrides: list[str], folder: Path) -> dict[str, str]:
    """Run `clplat train` with these overrides; digests of what it left behind, by key."""
    import torch
    from mlflow import MlflowClient

    from clplat.cli import main

    uri = f"sqlite:///{folder.parent}/mlruns.db"
    own = [f"hydra.run.dir={folder}", f"tracking.uri={uri}", "progress=false", "threads=1", "seed=3"]
    torch.manual_seed(0)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(["train", *SHORT, *overrides, *own])
    if code:
        return {"failed": said.getvalue().strip().splitlines()[-1]}
    state = torch.load(folder / "last.ckpt", weights_only=True)
    notes = state.pop("notes")
    flat = _flat("", state)
    run = MlflowClient(tracking_uri=uri).get_run(notes["run_id"])
    flat |= {f"params/{key}": value for key, value in run.data.params.items()}
    flat |= {f"metrics/{key}": repr(v) for key, v in run.data.metrics.items() if not key.endswith("_seconds")}
    return {key: _short(value) for key, value in flat.items()}


def _alone(overrides: list[str], folder: Path) -> dict[str, str]:
    # Forked, so that what is slow to import is imported once; nothing here has started a thread yet.
    import mlflow  # noqa: F401

    import clplat.cli
    import clplat.stepper  # noqa: F401

    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: theirs.send(digest(overrides, folder)))
    process.start()
    while not ours.poll(1):
        if not process.is_alive() and not ours.poll(1):
            return {"failed": f"its process ended with {process.exitcode}"}
    found = ours.recv()
    process.join()
    return found


def _flat(path: str, node: Any) -> dict[str, Any]:
    if isinstance(node, dict):
        return {k: v for key, child in node.items() for k, v in _flat(f"{path}/{key}", child).items()}
    if isinstance(node, list | tuple) and any(_has_tensor(child) for child in node):
        return {k: v for i, child in enumerate(node) for k, v in _flat(f"{path}/{i}", child).items()}
    return {path: node}


def _has_tensor(node: Any) -> bool:
    import torch

    if isinstance(node, dict):
        return any(map(_has_tensor, node.values()))
    return any(map(_has_tensor, node)) if isinstance(node, list | tuple) else torch.is_tensor(node)


def _short(value: Any) -> str:
    import torch

    if torch.is_tensor(value):
        value = value.detach().cpu().contiguous()
        raw = (
            value.view(torch.uint8).numpy().tobytes() if value.numel() and value.ndim else repr(value.tolist()).encode()
        )
        return f"{value.dtype} {list(value.shape)} {hashlib.sha256(raw).hexdigest()[:16]}"
    text = repr(value)
    return text if len(text) < 80 else hashlib.sha256(text.encode()).hexdigest()[:16]


RENAMED: list[tuple[str, str]] = [
    (r"^/learner/strategy\.(?!parts\.)", "/learner/strategy.parts.NAME."),
    (r"^/learner/together$", "/learner/same_experience"),
    (r"^params/((stream\.)+)as_$", r"params/\1layout"),
    (r"(\.blocks\.\d+)\.(expand|contract)\.", r"\1.dense.\2."),
    (r"^params/learner\.net\.readout$", "params/learner.net.pooling"),
    (r"^/results/(?!all/|seen/)", "/results/all/"),
    (r"^/seen_results/", "/results/seen/"),
    (r"^metrics/accuracy/average$", "metrics/average accuracy"),
    (r"^metrics/bits_per_token/average$", "metrics/average bits per token"),
    (r"^metrics/accuracy_seen/average$", "metrics/average accuracy - seen classes"),
]
"""Patterns of keys that have another name since, and that name."""

GONE: list[str] = [
    r"^params/tracking\.uri$",
    r"^/format$",
    r"^/learner/strategy\.parts\.\w+\._extra_state/inputs/",  # of generative_replay, known from the stream
    r"^params/tracking\.group_by$",
    r"^metrics/\w+/experience_\d+$",  # curves have the experiences' names; R is compared in the checkpoint
    r"^metrics/forgetting/average$",  # as summary/forgetting
]
"""Patterns of keys that are not there any more, or that differ from run to run."""

MOVED: dict[str, str] = {
    "clplat.learners.nets.transformer.residual": "clplat.learners.nets.residual.residual",
    "clplat.run.Training": "clplat.settings.Training",
    "clplat.run.Evaluation": "clplat.settings.Evaluation",
    "clplat.streams.text.markov_text": "clplat.streams.markov_text.markov_text",
    "clplat.tracking.Tracker": "clplat.tracking.tracker.Tracker",
}
"""Classes and functions that are found elsewhere since."""

NEW: list[str] = [
    r"^params/(evaluation\.on|stream\.normalize|sweep\.objective|tracking\.curves)$",
    r"^/(data|terms)\b",
    r"^metrics/(.* - \w+ (accuracy|bits per token)|forgetting|forgetting in .*|experiences learned)$",
]
"""Patterns of keys that were not there before."""


def compare(old: dict[str, dict[str, str]], new: dict[str, dict[str, str]]) -> list[str]:
    """What differs, one line each."""
    lines = []
    for name, before in old.items():
        if name not in new:
            lines.append(f"{name}: not run")
            continue
        if "failed" in new[name]:
            lines.append(f"{name}: {new[name]['failed']}")
            continue
        after, expected = dict(new[name]), {}
        for key, value in before.items():
            for pattern, replacement in RENAMED:
                key = re.sub(pattern, replacement.replace("NAME", _strategy(name)), key)
            if not any(re.search(p, key) for p in GONE):
                expected[key] = repr(MOVED[value[1:-1]]) if value[1:-1] in MOVED else value
        after = {k: v for k, v in after.items() if k in expected or not any(re.search(p, k) for p in [*NEW, *GONE])}
        for key in sorted(expected.keys() | after.keys()):
            if expected.get(key) != after.get(key):
                lines.append(f"{name}: {key}: {expected.get(key, 'absent')} -> {after.get(key, 'absent')}")
    return lines


def _strategy(name: str) -> str:
    kind, _, what = name.partition(" ")
    if kind == "strategy":
        return what
    given = next(o for o in [*runs()[name], "strategy=replay"] if o.startswith("strategy="))
    return given.removeprefix("strategy=")


def main() -> int:
    """Record digests, or compare with recorded ones; 1 if any differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="*", help="names, or parts of names")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th run, from the i-th")
    given = parser.parse_args()
    first, step = map(int, given.part.split("/"))
    chosen = {n: o for n, o in runs().items() if not given.only or any(word in n for word in given.only)}
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, overrides) in list(enumerate(chosen.items()))[first::step]:
            found[name] = _alone(overrides, Path(folder) / str(i))
            print(f"{name}: {found[name].get('failed', f'{len(found[name])} values')}", file=sys.stderr, flush=True)
    if given.what == "record":
        given.file.write_text(json.dumps(found, indent=1))
        return int(any("failed" in digests for digests in found.values()))
    recorded = {n: d for n, d in json.loads(given.file.read_text()).items() if n in found}
    lines = compare(recorded, found)
    print("\n".join(lines) or f"{len(recorded)} runs, {sum(map(len, recorded.values()))} values: all as before")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
