"""The product quantiser: against a search over all centroids, a reference k-means, and what it must lose or keep."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

import clplat.rehearsal.product_quantizer
from clplat.rehearsal.product_quantizer import ProductQuantizer, QuantizerError, _multiplied, _scattered

N, D = 600, 12


def vectors(n: int = N, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    middle = 3 * torch.randn(9, D, generator=generator)
    return middle[torch.randint(9, (n,), generator=generator)] + torch.randn(n, D, generator=generator)


def fitted(parts: int = 4, codes: int = 16, x: Tensor | None = None, **options: Any) -> ProductQuantizer:
    made = ProductQuantizer(parts, codes, **options)
    made.fit(vectors() if x is None else x)
    return made


def loss(quantizer: ProductQuantizer, x: Tensor) -> float:
    return float((quantizer.decode(quantizer.encode(x)) - x).square().mean())


def books(quantizer: ProductQuantizer) -> Tensor:
    assert quantizer.codebooks is not None
    return quantizer.codebooks


def test_a_code_is_the_nearest_centroid_of_its_part() -> None:
    made, x = fitted(), vectors(50, seed=8)
    codes = made.encode(x)
    assert codes.dtype == torch.uint8
    for row, code in zip(x.double().view(50, 4, 3), codes, strict=True):
        for part in range(4):
            distances = [float((row[part] - c).square().sum()) for c in books(made)[part].double()]
            assert int(code[part]) == distances.index(min(distances))


def test_decoding_puts_the_centroids_side_by_side() -> None:
    made = fitted()
    codes = torch.randint(16, (7, 4), dtype=torch.uint8)
    right = torch.stack([torch.cat([books(made)[m, int(row[m])] for m in range(4)]) for row in codes])
    assert torch.equal(made.decode(codes), right)


@pytest.mark.parametrize("codes", [16, 256])
def test_encoding_what_was_decoded_gives_the_codes_back(codes: int) -> None:
    made = fitted(codes=codes, x=vectors(2000))
    found = torch.randint(codes, (500, 4)).to(torch.uint8)
    assert torch.equal(made.encode(made.decode(found)), found)


def test_the_error_falls_with_parts_and_with_codes() -> None:
    x = vectors()
    by_parts = [loss(fitted(parts=m, codes=8), x) for m in (1, 2, 4, 12)]
    by_codes = [loss(fitted(codes=c), x) for c in (2, 4, 16, 64, 256)]
    for errors in (by_parts, by_codes):
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.5 * errors[0]


def test_centroids_are_the_means_of_what_is_nearest_to_them() -> None:
    made, x = fitted(iterations=500), vectors()
    codes, cut = made.encode(x), x.view(N, 4, 3)
    for part in range(4):
        for code in range(16):
            members = cut[codes[:, part] == code, part]
            assert len(members) > 0
            torch.testing.assert_close(books(made)[part, code], members.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sums", [_scattered, _multiplied])
def test_sums_over_what_is_nearest(sums: Callable[[Tensor, Tensor, int], Tensor], monkeypatch: Any) -> None:
    monkeypatch.setattr(clplat.rehearsal.product_quantizer, "CHUNK", 200)
    x, nearest = vectors(90).double().view(90, 4, 3).transpose(0, 1), torch.randint(7, (4, 90))
    right = torch.stack([torch.stack([x[m, nearest[m] == c].sum(0) for c in range(7)]) for m in range(4)])
    torch.testing.assert_close(sums(x, nearest, 7), right)


def test_the_error_is_that_of_another_k_means() -> None:
    x = vectors(2000)
    made = fitted(parts=3, codes=16, x=x, iterations=100)
    options: dict[str, Any] = {"n_clusters": 16, "init": "random", "n_init": 3, "random_state": 0}
    other = 0.0
    for part in x.view(2000, 3, 4).unbind(1):
        found = KMeans(**options).fit(part.numpy())
        other += float((part - torch.from_numpy(found.cluster_centers_[found.labels_])).square().sum())
    assert loss(made, x) * x.numel() == pytest.approx(other, rel=0.05)


def test_fewer_vectors_than_codes_lose_nothing() -> None:
    x = vectors(40)
    made = fitted(codes=256, x=x)
    assert books(made).shape == (4, 40, 3)
    assert torch.equal(made.decode(made.encode(x)), x)


def test_centroids_that_nothing_needs_move_to_what_is_represented_worst() -> None:
    few = vectors(6)
    x = torch.cat([few[:1].expand(500, -1), few])  # most of what the start draws is one and the same vector
    made = fitted(codes=8, x=x)
    torch.testing.assert_close(made.decode(made.encode(x)), x, rtol=1e-4, atol=1e-4)
    assert torch.equal(made.encode(made.decode(made.encode(x))), made.encode(x))


def test_the_seed_alone_decides() -> None:
    one, two, three = fitted(seed=1), fitted(seed=1), fitted(seed=2)
    torch.rand(5)  # the global generator has no part in it
    assert torch.equal(books(one), books(two))
    assert not torch.equal(books(one), books(three))


def test_portions_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = vectors().double()
    whole = fitted(x=x)
    monkeypatch.setattr(clplat.rehearsal.product_quantizer, "CHUNK", 64)
    portions = fitted(x=x)
    torch.testing.assert_close(books(whole), books(portions))
    assert torch.equal(whole.encode(x), portions.encode(x))


@pytest.mark.parametrize("shape", [(D,), (5, D), (2, 3, D), (0, D)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    made, x = fitted(), torch.randn(shape)
    codes = made.encode(x)
    assert codes.shape == (*shape[:-1], 4)
    assert made.decode(codes).shape == shape
    assert torch.equal(codes.view(-1, 4), made.encode(x.view(-1, D)))


def test_reduced_precision_around_it_changes_no_code() -> None:
    made, x = fitted(codes=256, x=vectors(3000)), vectors(200, seed=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = made.encode(x)
    assert torch.equal(inside, made.encode(x))
    assert torch.equal(made.encode(x.bfloat16()), made.encode(x.bfloat16().float()))


def test_double_precision_stays() -> None:
    made = fitted(x=vectors().double())
    assert made.decode(made.encode(vectors().double())).dtype == torch.float64


def test_the_state_goes_through_a_checkpoint() -> None:
    made, other = fitted(codes=256, x=vectors(100)), ProductQuantizer(4)
    assert made
    assert not other
    torch.save(made.state_dict(), file := io.BytesIO())
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(books(other), books(made))
    assert other.stored_bytes() == made.stored_bytes() == 100 * D * 4


def test_bytes_of_full_codebooks() -> None:
    assert fitted(codes=256, x=vectors(1000)).stored_bytes() == 256 * D * 4
    assert ProductQuantizer(4).stored_bytes() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": 0}, "parts: got 0, it must be at least 1"),
        ({"codes": 1}, "codes: got 1, it must lie in 2..256"),
        ({"codes": 257}, "codes: got 257"),
        ({"iterations": 0}, "iterations: got 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProductQuantizer(**{"parts": 4, **options})


def test_wrong_vectors_are_refused() -> None:
    made = ProductQuantizer(5)
    with pytest.raises(QuantizerError, match="no centroids yet"):
        made.encode(vectors())
    with pytest.raises(QuantizerError, match="no centroids yet"):
        made.decode(torch.zeros(2, 5, dtype=torch.uint8))
    with pytest.raises(QuantizerError, match="width 12 can be cut into 1, 2, 3, 4, 6, 12 parts"):
        made.fit(vectors())
    with pytest.raises(QuantizerError, match="at least 1, got"):
        made.fit(vectors(0))
    with pytest.raises(QuantizerError, match="NaN or infinite"):
        made.fit(torch.full((3, 10), float("nan")))
    with pytest.raises(QuantizerError, match="fitted to vectors of width 12, got 8"):
        fitted().encode(torch.randn(3, 8))


def to_faiss(quantizer: ProductQuantizer) -> Any:
    """A faiss quantiser with these centroids, whose codes are the same bytes."""
    faiss = pytest.importorskip("faiss")
    centroids = books(quantizer)
    parts, codes, width = centroids.shape
    # faiss has 256 centroids for codes of one byte; a repeated first one is never nearer than the first.
    full = torch.cat([centroids, centroids[:, :1].expand(-1, 256 - codes, -1)], 1)
    made = faiss.ProductQuantizer(parts * width, parts, 8)
    faiss.copy_array_to_vector(full.numpy().ravel(), made.centroids)
    return made


def from_faiss(quantizer: Any) -> ProductQuantizer:
    """The quantiser with the centroids of one of faiss."""
    faiss = pytest.importorskip("faiss")
    made = ProductQuantizer(quantizer.M, quantizer.ksub)
    centroids = torch.from_numpy(faiss.vector_to_array(quantizer.centroids))
    made.codebooks = centroids.view(quantizer.M, quantizer.ksub, quantizer.dsub).clone()
    return made


@pytest.mark.parametrize("n", [100, 2000])
def test_faiss_gives_the_same_codes(n: int) -> None:
    x, made = vectors(500, seed=4), fitted(codes=256, x=vectors(n))
    other = to_faiss(made)
    assert torch.equal(torch.from_numpy(other.compute_codes(x.numpy())), made.encode(x))
    torch.testing.assert_close(torch.from_numpy(other.decode(made.encode(x).numpy())), made.decode(made.encode(x)))


def test_the_error_is_that_of_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    x = vectors(3000)
    other = faiss.ProductQuantizer(D, 4, 6)
    other.train(x.numpy())
    theirs = loss(from_faiss(other), x)
    assert loss(fitted(codes=64, x=x), x) == pytest.approx(theirs, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_codes_are_the_same_on_a_gpu() -> None:
    made, x = fitted(codes=256, x=vectors(2000)), vectors(500, seed=4)
    codes = made.encode(x)
    assert torch.equal(made.cuda().encode(x.cuda()).cpu(), codes)
