"""A variational autoencoder of sequences (Kingma & Welling 2014; recurrent as in Bowman et al. 2016), for replay.

Letters: B batch, T time, D input features, V tokens, H hidden, Z latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clplat.streams.experience import Batch


class SequenceVAE(nn.Module):
    """q(z | x) from the last state of a GRU, p(x | z) from a GRU that sees z and its own step number, so that every
    step is given z and nothing of the steps before it: what is generated does not drift.

    Float inputs [B, T, D] or [B, D] are Gaussian with a fixed deviation, token inputs [B, T] categorical. All have
    the length T for which it was built.

    Args:
        steps: T; 0 for inputs without a time axis.
        features: D, None for tokens.
        vocabulary: V, None for floats.
        hidden: H of both GRUs.
        latent: Z.
        deviation: of float inputs given z, above 0: how much detail counts.
    """

    def __init__(
        self, steps: int, features: int | None, vocabulary: int | None, hidden: int, latent: int, deviation: float
    ) -> None:
        super().__init__()
        self.steps, self.features, self.latent, self.deviation = steps, features, latent, deviation
        if features is not None:
            self.embed, width, outputs = nn.Identity(), features, features
        else:
            assert vocabulary is not None
            self.embed, width, outputs = nn.Embedding(vocabulary, hidden), hidden, vocabulary
        self.encoder = nn.GRU(width, hidden, batch_first=True)
        self.posterior = nn.Linear(hidden, 2 * latent)
        self.position = nn.Parameter(0.1 * torch.randn(max(steps, 1), hidden))
        self.begin = nn.Linear(latent, hidden)
        self.decoder = nn.GRU(hidden, hidden, batch_first=True)
        self.emit = nn.Linear(hidden, outputs)

    def decode(self, z: Tensor) -> Tensor:
        """Means [B, T, D] (or [B, D]) or logits [B, T, V] of p(x | z), z [B, Z]."""
        given = self.begin(z)[:, None] + self.position
        out = self.emit(self.decoder(given, torch.tanh(self.begin(z))[None].contiguous())[0])
        return out[:, 0] if self.steps == 0 else out

    def loss(self, batch: Batch, noise: Tensor) -> Tensor:
        """Minus the evidence lower bound in nats an example (up to a constant), a scalar.

        Args:
            batch: its inputs.
            noise: [B, Z] standard normal numbers.
        """
        given = batch.x.long() if self.features is None else batch.x.to(self.begin.weight.dtype)
        x = given[:, None] if self.steps == 0 else given
        last = self.encoder(self.embed(x))[1][0]
        mean, log_variance = self.posterior(last).chunk(2, -1)
        out = self.decode(mean + (0.5 * log_variance).exp() * noise)
        if self.features is None:
            misfit = F.cross_entropy(out.transpose(1, 2), given, reduction="none").sum(1)
        else:
            misfit = 0.5 * ((out - given) / self.deviation).square().flatten(1).sum(1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return (misfit + divergence).mean()

    @torch.no_grad()
    def generate(self, z: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Inputs for z [B, Z]: means of floats; tokens drawn by inverting their distribution at `uniform` [B, T]."""
        out = self.decode(z)
        if self.features is not None:
            return out
        assert uniform is not None
        below = out.softmax(-1).cumsum(-1) < uniform[..., None]
        return below.sum(-1).clamp_max(out.shape[-1] - 1)
