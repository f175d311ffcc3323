"""Sliding-window attention (Beltagy, Peters & Cohan 2020) with rotary positions; a step costs the same at any time.

Letters: B batch, T time, S keys a block of queries sees, W window, D features, H hidden, N heads, M key heads,
d = H / N features a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat import checks
from clplat.learners.mixers.attention import rotate
from clplat.learners.mixers.mixer import Mixer, State
from clplat.learners.mixers.norms import head_width


class LocalAttention(Mixer):
    """Causal attention over the current step and the window - 1 steps before it, without biases.

    Iz Beltagy, Matthew Peters, Arman Cohan, "Longformer: The Long-Document Transformer", 2020, arXiv 2004.05150; with
    one key head for all queries (Shazeer 2019) the local attention of Griffin (De et al. 2024, arXiv 2402.19427,
    section 2.3), whose published code turns only half of a head's features by their positions; here all are turned.

    The state is (keys, values, count): keys before rotation and values [B, P, M, d] of the last P steps, of all since the
    first call but at most W - 1, and [B] how many of these belong to the current sequence; the others are zeros.
    Positions count from the start of each call, which products of rotated queries and keys do not notice: angles stay
    small in sequences without end.

    Time and memory are O(T W), in blocks of at most W queries.

    Args:
        features: D, width of the inputs.
        hidden: H, width of the outputs, a multiple of 2 * heads.
        heads: N.
        window: W, the current step included.
        key_heads: M, a divisor of heads; 1 for multi-query, `heads` for multi-head attention.
        base: of the rotary positions.

    Raises:
        ValueError: `hidden` is not a multiple of 2 * heads, or heads not one of key_heads; a window below 1.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        heads: int = 4,
        window: int = 1024,
        key_heads: int = 1,
        base: float = 10_000.0,
    ) -> None:
        super().__init__()
        head_width(hidden, heads, parts=2)  # rotary positions turn pairs of features
        if key_heads < 1 or heads % key_heads:
            raise ValueError(f"key_heads: got {key_heads} with heads={heads}; it must divide heads: change either.")
        checks.at_least(1, "the current step", window=window)
        checks.above(0, base=base)
        self.width, self.heads, self.window, self.key_heads, self.base = hidden, heads, window, key_heads, base
        self.queries = nn.Linear(features, hidden, bias=False)
        self.keys_values = nn.Linear(features, 2 * key_heads * (hidden // heads), bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        rows, steps, _ = x.shape
        before, time = self.window - 1, torch.arange(x.shape[1], device=x.device)
        q = self.queries(x).unflatten(-1, (self.heads, -1))
        keys, values = self.keys_values(x).unflatten(-1, (2, self.key_heads, -1)).unbind(2)
        count = time.new_zeros(rows)
        if state is not None:
            past_keys, past_values, count = state
            keys = torch.cat([past_keys.to(keys.dtype), keys], 1)
            values = torch.cat([past_values.to(values.dtype), values], 1)
        # [B, T] when each step's sequence started, in this call's time: negative if before it.
        start = -count[:, None].expand(-1, steps)
        if reset is not None:
            start = torch.where(reset, time, start).cummax(1).values
        new_count = (steps - start[:, -1]).clamp(max=before)
        size = min(before, keys.shape[1])
        mine = torch.arange(size - 1, -1, -1, device=x.device) < new_count[:, None]
        last_keys, last_values = (
            torch.where(mine[..., None, None], s[:, s.shape[1] - size :], 0) for s in (keys, values)
        )
        if steps > self.window:  # several blocks of queries, each of which may look back by W - 1 steps
            missing = before + steps - keys.shape[1]
            keys, values = (F.pad(s, (0, 0, 0, 0, missing, 0)) for s in (keys, values))
        return self._attend(q, keys, values, start), (last_keys, last_values, new_count)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, start: Tensor) -> Tensor:
        """Outputs [B, T, H] for q [B, T, N, d] over keys and values [B, P + T, M, d], the last of which are those of
        the same T steps; P is W - 1 where T is above W."""
        rows, steps = start.shape
        past, block = keys.shape[1] - steps, min(self.window, steps)
        blocks = -(-steps // block)
        padding = blocks * block - steps
        time = torch.arange(-past, steps + padding, device=q.device)
        q, keys, values = (F.pad(s, (0, 0, 0, 0, 0, padding)).transpose(1, 2) for s in (q, keys, values))
        q, keys = rotate(q, time[past:], self.base), rotate(keys, time, self.base)
        # The steps that a block of queries can see, overlapping with those of the next: [B, M, blocks, S, d].
        keys, values = (s.unfold(2, past + block, block).transpose(-1, -2) for s in (keys, values))
        q = q.unflatten(2, (blocks, block))
        q_time = time[past:].view(blocks, block, 1)
        k_time = time.unfold(0, past + block, block)[:, None]
        start = F.pad(start, (0, padding)).view(rows, blocks, block, 1)
        seen = (k_time <= q_time) & (k_time > q_time - self.window) & (k_time >= start)  # [B, blocks, block, S]
        shared = self.heads // self.key_heads
        keys, values = (s.repeat_interleave(shared, 1) if shared > 1 else s for s in (keys, values))
        q, keys, values = (s.transpose(1, 2).flatten(0, 1) for s in (q, keys, values))  # [B blocks, N, ., d]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen.flatten(0, 1)[:, None])
        y = y.unflatten(0, (rows, blocks)).transpose(2, 3).flatten(-2).flatten(1, 2)  # [B, blocks * block, H]
        return self.out(y[:, :steps])
