"""clplat: continual learning on sequences.

The names below load when they are first used. Everything else is imported from its module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clplat.composition import Composite
    from clplat.learners.learner import Learner
    from clplat.learners.mixers.gru import GRU
    from clplat.learners.mixers.lstm import LSTM
    from clplat.learners.nets.heads import head_for
    from clplat.learners.nets.mlp import mlp
    from clplat.learners.nets.recurrent import recurrent
    from clplat.learners.nets.transformer import transformer
    from clplat.learners.objectives import Classification, objective_for
    from clplat.notebook import Result, run
    from clplat.strategy import Strategy
    from clplat.streams.permuted import permuted
    from clplat.streams.sources import digits, mnist
    from clplat.streams.split import split

__version__ = "0.2.0"

_PLACES = {
    "Classification": "learners.objectives",
    "Composite": "composition",
    "GRU": "learners.mixers.gru",
    "LSTM": "learners.mixers.lstm",
    "Learner": "learners.learner",
    "Result": "notebook",
    "Strategy": "strategy",
    "digits": "streams.sources",
    "head_for": "learners.nets.heads",
    "mlp": "learners.nets.mlp",
    "mnist": "streams.sources",
    "objective_for": "learners.objectives",
    "permuted": "streams.permuted",
    "recurrent": "learners.nets.recurrent",
    "run": "notebook",
    "split": "streams.split",
    "transformer": "learners.nets.transformer",
}

__all__ = [
    "GRU", "LSTM", "Classification", "Composite", "Learner", "Result", "Strategy", "digits", "head_for", "mlp", "mnist",
    "objective_for", "permuted", "recurrent", "run", "split", "transformer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a public name (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module 'clplat' has no attribute {name!r}")
    return getattr(import_module(f"clplat.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
