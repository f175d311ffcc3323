"""Names of clplat 0.1 that are others now, so that an old configuration is refused by a sentence that helps."""

from __future__ import annotations

MOVED = {
    "clplat.run.Training": "clplat.settings.Training",
    "clplat.run.Evaluation": "clplat.settings.Evaluation",
    "clplat.tracking.Tracker": "clplat.tracking.tracker.Tracker",
    "clplat.buffers": "clplat.rehearsal.buffer",
    "clplat.fisher": "clplat.importance.fisher",
    "clplat.generator": "clplat.rehearsal.vae",
    "clplat.learners.nets.hyper": "clplat.per_task.generators",
    "clplat.learners.nets.masked": "clplat.per_task.masked",
    "clplat.learners.nets.per_task": "clplat.per_task.net",
    "clplat.output_regularizer": "clplat.per_task.regularizer",
    "clplat.path": "clplat.importance.path_integral",
    "clplat.penalty": "clplat.importance.penalty",
    "clplat.quantize": "clplat.rehearsal.product_quantizer",
    "clplat.task_strategies": "clplat.per_task.strategy",
    "clplat.streams.text.markov_text": "clplat.streams.markov_text.markov_text",
    "clplat.teacher": "clplat.weights.teacher",
    "stream.as_": "stream.layout",
}
"""Old import paths, of a class or of a module with all in it, and keys; and what they are called now."""


def name_now(name: str) -> str | None:
    """What an import path or a key of clplat 0.1 is called now; None if it is no old one."""
    for old, new in MOVED.items():
        if f"{name}.".startswith(f"{old}."):
            return new + name[len(old) :]
    return None
