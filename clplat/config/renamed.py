"""Names of clplat 0.1 that are others now, so that an old configuration is refused by a sentence that helps."""

from __future__ import annotations

MOVED = {
    "clplat.buffers": "clplat.rehearsal.buffer",
    "clplat.fisher": "clplat.importance.fisher",
    "clplat.generator": "clplat.rehearsal.vae",
    "clplat.learners.nets.hyper": "clplat.per_task.generators",
    "clplat.learners.nets.masked": "clplat.per_task.masked",
    "clplat.learners.nets.per_task": "clplat.per_task.net",
    "clplat.learners.nets.transformer.residual": "clplat.learners.nets.residual.residual",
    "clplat.output_regularizer": "clplat.per_task.regularizer",
    "clplat.path": "clplat.importance.path_integral",
    "clplat.penalty": "clplat.importance.penalty",
    "clplat.quantize": "clplat.rehearsal.product_quantizer",
    "clplat.run.Evaluation": "clplat.settings.Evaluation",
    "clplat.run.Run": "clplat.loop.Run",
    "clplat.run.Silent": "clplat.tracking.base.NoTracker",
    "clplat.run.Training": "clplat.settings.Training",
    "clplat.streams.text.markov_text": "clplat.streams.markov_text.markov_text",
    "clplat.task_strategies": "clplat.per_task.strategy",
    "clplat.teacher": "clplat.weights.teacher",
    "clplat.tracking.Tracker": "clplat.tracking.tracker.Tracker",
}
"""Import paths, of a class or of a module with all in it: the old one, and what it is called now."""

KEYS = {
    "as_": "layout",
    "readout": "pooling",
}
"""Keys, wherever they stand in a configuration: the old one, and what it is called now."""


def path_now(path: str) -> str | None:
    """What an import path of clplat 0.1 is called now; None if it is no old one."""
    for old, new in MOVED.items():
        if f"{path}.".startswith(f"{old}."):
            return new + path[len(old) :]
    return None
