"""Multi-head attention (Vaswani et al. 2017) with rotary positions (Su et al. 2021), on torch's fused kernels.

Letters: B batch, T time, S steps remembered, D features, H hidden, N heads, d = H / N features a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.norms import head_width


def rotate(x: Tensor, position: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary positions: the pair (i, i + d/2) of x [..., T, d] turned by position * base^(-2i/d).

    The product of a query at p and a key at q then depends on p - q only.

    Args:
        x: [..., T, d], d even.
        position: [..., T] integers, broadcast against x without its last dimension.
        base: the longest wave is 2 * pi * base steps.
    """
    half = x.shape[-1] // 2
    # Angles of late positions need more digits than bfloat16 has.
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = base ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = position[..., None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Attention(Mixer):
    """Scaled dot-product attention over the steps of a sequence, without biases or dropout.

    The state is (keys, values, position) after the last of the T steps: keys (rotated) and values [B, N, S, d] of all
    S steps seen so far, and [B] the number of steps of the current sequence, which are the last of those S. It grows
    by T with every call. A bidirectional mixer has no state.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs, a multiple of 2 * heads.
        heads: N.
        causal: False lets every step see the whole sequence; there is then no state, reset or `step`.
        base: of the rotary positions.

    Raises:
        ValueError: `hidden` is not a multiple of 2 * heads.
    """

    def __init__(self, features: int, hidden: int, heads: int = 4, causal: bool = True, base: float = 10_000.0) -> None:
        super().__init__()
        head_width(hidden, heads, parts=2)  # rotary positions turn pairs of features
        checks.above(0, base=base)
        self.width, self.heads, self.causal, self.base = hidden, heads, causal, base
        self.project = nn.Linear(features, 3 * hidden, bias=False)  # queries, keys, values
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """Outputs [B, T, H] for x [B, T, D] and the state after step T; arguments as for `Mixer.forward`.

        Raises:
            ValueError: a bidirectional mixer is given a state or a reset.
        """
        time = torch.arange(x.shape[1], device=x.device)
        if not self.causal:
            if state is not None or reset is not None:
                raise ValueError(
                    "Bidirectional attention sees the whole sequence at once and takes neither state nor reset: "
                    "give one whole sequence a row, or set causal: true."
                )
            q, k, v = self._heads(x, time)
            valid = None if lengths is None else (time < lengths[:, None])[:, None, None, :]
            return self._join(F.scaled_dot_product_attention(q, k, v, attn_mask=valid)), None
        if state is None and reset is None:
            q, k, v = self._heads(x, time)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self._join(y), (k, v, time.new_full((len(x),), len(time)))
        return self._resume(x, time, state, reset)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """One step: output [B, H] for x [B, D], and the state, which is one step longer.

        Raises:
            ValueError: the mixer is bidirectional.
        """
        if not self.causal:
            raise ValueError(
                "Bidirectional attention cannot go step by step: call it on whole sequences, or set causal: true."
            )
        return super().step(x, state)

    def _resume(self, x: Tensor, time: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        """Causal attention where sequences started before this call, or start within it."""
        before = time.new_zeros(len(x)) if state is None else state[2]
        # [B, T] when each step's sequence started, in this call's time: negative if before it.
        start = -before[:, None].expand(-1, len(time))
        if reset is not None:
            start = torch.where(reset, time, start).cummax(1).values
        position = time - start
        q, k, v = self._heads(x, position[:, None])
        if state is not None:
            k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
        key_time = torch.arange(len(time) - k.shape[2], len(time), device=x.device)
        seen = (key_time <= time[:, None]) & (key_time >= start[..., None])  # [B, T, S]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
        return self._join(y), (k, v, position[:, -1] + 1)

    def _heads(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys and values of x [B, T, D], each [B, N, T, d]."""
        rows, steps, _ = x.shape
        qkv = self.project(x).view(rows, steps, 3, self.heads, self.width // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2], position, self.base).unbind(0)
        return q, k, qkv[2]

    def _join(self, y: Tensor) -> Tensor:
        """[B, T, H] from [B, N, T, d]."""
        return self.out(y.transpose(1, 2).flatten(2))
