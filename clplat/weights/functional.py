"""A module run with other weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def call(module: nn.Module, weights: Mapping[str, Tensor], *args: Any) -> Any:
    """module(*args) with `weights` in the places of the parameters and buffers of these names, which stay as they are.

    `torch.func.functional_call`, for modules that are registered in two places too (HGRN's bounds): torch (seen in 2.13)
    fills such a one twice and puts the new tensor back for good, in the place of the parameter. A parameter that two
    modules share is replaced in both.

    Args:
        module: any.
        weights: by name, as in `module.named_parameters()` and `named_buffers()`; the others are the module's own.
        args: of the module.

    Raises:
        KeyError: a name that the module does not have.
    """
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    named.update(module.named_buffers(remove_duplicate=False))
    given = {id(named[name]): tensor for name, tensor in weights.items()}
    places: dict[tuple[int, str], str] = {}
    for name in named:
        owner, _, attribute = name.rpartition(".")
        places.setdefault((id(module.get_submodule(owner)), attribute), name)
    full = {name: given[id(named[name])] for name in places.values() if id(named[name]) in given}
    return torch.func.functional_call(module, full, args, tie_weights=False)
