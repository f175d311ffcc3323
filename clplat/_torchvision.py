"""Makes torchvision importable beside a torch that its compiled operators were not built for.

`pip install` may pair a CPU build of torch with torchvision's CUDA build. Then `import torchvision` ends in `operator
torchvision::nms does not exist`, and lightning and avalanche, which import it, end with it. Nothing here uses these
operators; it is enough to declare them.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
from importlib.util import find_spec

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def ensure_importable() -> None:
    """Call before the first import of torchvision, lightning or avalanche; later calls do nothing.

    Where torchvision is missing, was imported already, or its operators load, nothing is changed. Otherwise the
    schemas of `torchvision::nms` and `torchvision::qnms` are declared, without an implementation. torchvision itself
    is not imported here.
    """
    _declare_if_needed()


@cache
def _declare_if_needed() -> torch.library.Library | None:
    if "torchvision" in sys.modules or _operators_load() or _declared():
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")  # cached: the schemas live as long as this object
    for schema in _SCHEMAS:
        library.define(schema)
    return library


def _operators_load() -> bool:
    """Whether torchvision's extension library, found as torchvision finds it, loads; True without torchvision."""
    package = find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return True
    finder = FileFinder(package.submodule_search_locations[0], (ExtensionFileLoader, EXTENSION_SUFFIXES))
    extension = finder.find_spec("_C")
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return True


def _declared() -> bool:
    try:
        torch.ops.torchvision.nms  # noqa: B018  # the look-up is the question
    except AttributeError:
        return False
    return True
