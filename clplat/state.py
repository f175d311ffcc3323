"""A module whose tensors may change shape between checkpoints."""

from __future__ import annotations

from typing import Any

from torch import nn


class StateModule(nn.Module):
    """Base of what keeps tensors of unknown number and shape: strategies, buffers, penalties.

    A buffer that was None or smaller when this object was built takes the saved tensor, whatever its shape; one that
    holds a tensor where the checkpoint has none becomes None. What is not a tensor goes through `get_extra_state`
    and `set_extra_state`, as plain values and tensors only (checkpoints are read without running pickled code).
    """

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch gives all by position
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        for name in self._buffers:
            if name in self._non_persistent_buffers_set:
                continue
            saved = state_dict.get(prefix + name)
            self._buffers[name] = None if saved is None else saved.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
