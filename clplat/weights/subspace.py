"""Subspaces of row vectors: collected in one pass, extended until they hold enough of the energy, and projected out.

All decompositions are made in float64. Letters: N rows, P their width, M directions of a basis.
"""

from __future__ import annotations

import torch
from torch import Tensor


def collect(triangle: Tensor | None, rows: Tensor) -> Tensor:
    """The triangular factor R [min(N, P), P] of all rows so far, with R^T R = X^T X.

    R has the singular values and right singular vectors of X itself (least squares and subspaces need no more), in
    memory that does not grow with N and without the squared condition number of X^T X.

    Args:
        triangle: what an earlier call returned, None before the first rows.
        rows: [N, P] more rows of X.
    """
    rows = rows.double()
    return torch.linalg.qr(rows if triangle is None else torch.cat([triangle, rows]), mode="r").R


def extended(basis: Tensor | None, rows: Tensor, energy: float, tolerance: float, room: int | None = None) -> Tensor:
    """An orthonormal basis [P, M'] of the span of `basis` and of the leading directions of what it misses of `rows`.

    Directions are added, largest singular value first, until the squared norm of the projected rows reaches
    `energy` times their own (Saha et al. 2021, arXiv 2103.09762, eq. 9 for the later tasks and eq. 5 for the first).

    Args:
        basis: [P, M] orthonormal columns, None for none.
        rows: [N, P]; a triangular factor of `collect` serves as well.
        energy: in 0..1; 1 takes every direction that is not rounding.
        tolerance: singular values below this fraction of the rows' largest are rounding.
        room: the most directions added, None: any number.
    """
    rows = rows.double()
    old = rows.new_zeros(rows.shape[1], 0) if basis is None else basis.double()
    missed = without(without(rows, old), old)
    sizes, directions = _right_singular(missed)
    whole, gained = rows.square().sum(), sizes.square()
    held = whole - gained.sum() + gained.cumsum(0) - gained  # before each direction is added
    rank = int((sizes > tolerance * _norm(rows)).sum()) if rows.numel() else 0
    count = rank if energy == 1 else min(rank, int((held < energy * whole).sum()))
    count = count if room is None else min(count, room)
    new = directions[:count].mT
    # What is left of the old directions in the new ones is rounding, relative to small singular values though.
    new = new - old @ (old.mT @ new)
    # Columns so nearly orthonormal are made so by one Cholesky factor, at a fraction of what a QR decomposition costs.
    new = torch.linalg.solve_triangular(torch.linalg.cholesky(new.mT @ new).mT, new, upper=True, left=False)
    return torch.cat([old, new], 1)


def _right_singular(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values [K] of the rows [N, P] and right singular vectors [K, P], K = min(N, P), largest first."""
    if rows.shape[0] < rows.shape[1]:  # LAPACK takes several times as long for wide rows as for their triangle
        wide, triangle = torch.linalg.qr(rows.mT)
        _, sizes, directions = torch.linalg.svd(triangle.mT, full_matrices=False)
        return sizes, (wide @ directions.mT).mT
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    return sizes, directions


def _norm(rows: Tensor) -> Tensor:
    """The largest singular value, from the smaller Gram matrix, which has it to full precision."""
    gram = rows @ rows.mT if rows.shape[0] < rows.shape[1] else rows.mT @ rows
    return torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt()


def without(rows: Tensor, basis: Tensor) -> Tensor:
    """rows - rows B B^T: the part [N, P] of `rows` that is orthogonal to the columns of the orthonormal B [P, M]."""
    with torch.autocast(rows.device.type, enabled=False):  # in bfloat16 the part would not be orthogonal
        return rows - (rows @ basis) @ basis.mT


def rounding(dtype: torch.dtype) -> float:
    """The fraction below which singular values of values computed in `dtype` are taken for rounding."""
    return torch.finfo(dtype).eps ** 0.75
