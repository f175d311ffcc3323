"""Product quantisation (Jégou, Douze & Schmid 2011, IEEE TPAMI 33(1)): a vector as a few bytes, by batched products.

Letters: N vectors, D their width, M parts, C codes a part.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat import checks
from clplat.errors import UserError
from clplat.state import StateModule

CHUNK = 2**20
"""Distances computed at once, at most: what is in work then stays in a processor's cache."""


class QuantizerError(UserError, ValueError):
    """A quantiser that cannot be made or asked; the message says what was given and what is allowed."""


class ProductQuantizer(StateModule):
    """Cuts a vector into M parts of equal width and replaces each by the nearest of the C centroids of that part.

    The centroids of all parts are found at once by k-means (Lloyd's iterations). They start as vectors drawn at
    random, all distinct rows of what is given; a centroid that nothing is nearest to moves to the vector that is
    represented worst in its part. Until `fit` (or a checkpoint) the quantiser is empty (False) and cannot be asked.

    Args:
        parts: M; the width D must be a multiple of it.
        codes: C, 2 to 256; fewer where fewer vectors are given to `fit`, which then loses nothing.
        iterations: of k-means, at most; it ends earlier when nothing moves any more.
        seed: of the start.

    Raises:
        ValueError: a number out of range.
    """

    codebooks: Tensor | None

    def __init__(self, parts: int, codes: int = 256, iterations: int = 25, seed: int = 0) -> None:
        super().__init__()
        checks.at_least(1, parts=parts, iterations=iterations)
        checks.within(2, 256, "so that a code is one byte", codes=codes)
        self.parts, self.codes, self.iterations, self.seed = parts, codes, iterations, seed
        self.register_buffer("codebooks", None)  # [M, C, D / M]

    def __bool__(self) -> bool:
        """Whether there are centroids."""
        return self.codebooks is not None

    def check_width(self, width: int) -> None:
        """Refuse a width that M parts do not divide.

        Raises:
            QuantizerError: names the numbers of parts that do.
        """
        if width % self.parts:
            allowed = ", ".join(str(m) for m in range(1, width + 1) if width % m == 0)
            raise QuantizerError(f"parts: got {self.parts}, vectors of width {width} can be cut into {allowed} parts.")

    @torch.no_grad()
    def fit(self, vectors: Tensor) -> None:
        """Find the centroids for `vectors` [N, D]; old ones are forgotten.

        Raises:
            QuantizerError: no vectors, not finite ones, or a width that M does not divide.
        """
        if vectors.ndim != 2 or len(vectors) == 0:
            raise QuantizerError(f"Fitting takes vectors [N, D] with N at least 1, got {list(vectors.shape)}.")
        self.check_width(vectors.shape[1])
        if not bool(torch.isfinite(vectors).all()):
            raise QuantizerError("Fitting takes finite vectors, got NaN or infinite ones: look at what made them.")
        x = self._cut(vectors)
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randperm(len(vectors), generator=generator)[: self.codes]
        centroids, nearest = x[:, start.to(x.device)], None
        for _ in range(self.iterations):
            found, errors = _assign(x, centroids)
            if nearest is not None and torch.equal(found, nearest):
                break
            nearest = found
            centroids = _moved(x, centroids, nearest, errors)
        self.codebooks = centroids.contiguous()

    @torch.no_grad()
    def encode(self, vectors: Tensor) -> Tensor:
        """Codes [..., M] uint8 of vectors [..., D]; equally near centroids: the first.

        Raises:
            QuantizerError: nothing fitted yet, or vectors of another width.
        """
        books = self._fitted()
        if vectors.shape[-1] != books.shape[0] * books.shape[2]:
            raise QuantizerError(
                f"The quantiser was fitted to vectors of width {books.shape[0] * books.shape[2]}, got "
                f"{vectors.shape[-1]}: fit it again."
            )
        x = self._cut(vectors.reshape(-1, vectors.shape[-1])).to(books.dtype)
        codes = torch.empty(x.shape[1], x.shape[0], dtype=torch.uint8, device=x.device)
        codes.copy_(_assign(x, books)[0].T)
        return codes.view(*vectors.shape[:-1], x.shape[0])

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors [..., D] of codes [..., M] uint8.

        Raises:
            QuantizerError: nothing fitted yet.
        """
        books = self._fitted()
        first = torch.arange(0, books.shape[0] * books.shape[1], books.shape[1], device=codes.device)
        return F.embedding(codes + first, books.flatten(0, 1)).flatten(-2)

    def stored_bytes(self) -> int:
        """Bytes of the centroids: C * D * 4 in single precision."""
        return 0 if self.codebooks is None else self.codebooks.numel() * self.codebooks.element_size()

    def _cut(self, vectors: Tensor) -> Tensor:
        """[M, N, D / M] from [N, D], in single precision at least."""
        x = vectors if vectors.dtype == torch.float64 else vectors.float()
        return x.view(len(x), self.parts, x.shape[1] // self.parts).transpose(0, 1).contiguous()

    def _fitted(self) -> Tensor:
        if self.codebooks is None:
            raise QuantizerError("The quantiser has no centroids yet: fit it, or load a checkpoint.")
        return self.codebooks


def _assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of the centroids [M, C, d] to each of x [M, N, d], and its squared distance; both [M, N]."""
    parts, codes, _ = centroids.shape
    half, turned = centroids.square().sum(-1)[:, None] / 2, centroids.transpose(1, 2)
    found = []
    with torch.autocast(x.device.type, enabled=False):
        for some in x.split(max(1, CHUNK // (parts * codes)), 1):
            # (|x|^2 - |x - c|^2) / 2, largest where c is nearest
            found.append((some @ turned).sub_(half).max(-1))
        nearest = torch.cat([f.indices for f in found], 1)
        return nearest, x.square().sum(-1) - 2 * torch.cat([f.values for f in found], 1)


def _moved(x: Tensor, centroids: Tensor, nearest: Tensor, errors: Tensor) -> Tensor:
    """The mean of what is nearest to each centroid, [M, C, d]; where nothing is, the vectors represented worst."""
    parts, codes, _ = centroids.shape
    counts = x.new_zeros(parts, codes).scatter_add_(1, nearest, torch.ones_like(errors))
    # Scattered additions are the fast way on a CPU; on a GPU their order, and so the sum, would differ every time.
    sums = (_scattered if x.device.type == "cpu" else _multiplied)(x, nearest, codes)
    moved = sums / counts.clamp(min=1)[..., None]
    for part in (counts == 0).any(1).nonzero().squeeze(1).tolist():
        empty = (counts[part] == 0).nonzero().squeeze(1)
        moved[part, empty] = x[part, errors[part].topk(len(empty)).indices]
    return moved


def _scattered(x: Tensor, nearest: Tensor, codes: int) -> Tensor:
    """The sum of x [M, N, d] over what is nearest to each centroid, [M, C, d], one addition after the other."""
    parts, _, width = x.shape
    return x.new_zeros(parts, codes, width).scatter_add_(1, nearest[..., None].expand(-1, -1, width), x)


def _multiplied(x: Tensor, nearest: Tensor, codes: int) -> Tensor:
    """The same as a product with a matrix of 0 and 1."""
    parts, _, width = x.shape
    sums, size = x.new_zeros(parts, codes, width), max(1, CHUNK // (parts * codes))
    for some, at in zip(x.split(size, 1), nearest.split(size, 1), strict=True):
        sums += x.new_zeros(*at.shape, codes).scatter_(2, at[..., None], 1).transpose(1, 2) @ some
    return sums
