"""Distances between samples, in float64. Every number that depends on the sample size is printed beside the value that
real data reach at the same size (its floor), and every number that depends on a feature space names its extractor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stillroom.errors import UserError

BLOCK = 1024
"""Rows of a distance matrix that are in memory at once."""


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1], ``[N, C, H, W]``, as the uint8 grey levels of a file; uint8 passes unchanged.

    Raises :class:`~stillroom.errors.UserError` for NaN or infinite pixels: they have no grey level.
    """
    if images.dtype == torch.uint8:
        return images
    if not torch.isfinite(images).all():
        raise UserError("the samples hold NaN or infinite pixels", cure="the model that made them has diverged")
    return images.add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


# --- in a feature space -------------------------------------------------------------------------------------------
def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[d]`` and unbiased covariance ``[d, d]`` of features ``[N, d]``, float64."""
    x = _rows(features, least=2)
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to features ``a [N, d]`` and ``b [M, d]``.

    ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`` (Dowson & Landau 1982; as a score for generators,
    arXiv:1706.08500 eq. 6). The trace of the root is the sum of the roots of the eigenvalues of the symmetric
    ``S_a^(1/2) S_b S_a^(1/2)``, which exists for singular covariances as well. Two samples of N from one white
    Gaussian give ``(d^2 + 5d) / (2N)`` on average, to first order in 1/N: compare equal N only.
    """
    return frechet_of_moments(*mean_and_covariance(a), *mean_and_covariance(b))


def frechet_of_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """:func:`frechet_distance` from means ``[d]`` and covariances ``[d, d]``."""
    values, vectors = torch.linalg.eigh(cov_a.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov_b.double() @ root).clamp(min=0).sqrt().sum()
    gap = (mean_a.double() - mean_b.double()).square().sum()
    return max(float(gap + cov_a.trace() + cov_b.trace() - 2 * overlap), 0.0)


def kid(a: Tensor, b: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Kernel distance of features ``a [N, d]`` and ``b [M, d]``: mean and standard deviation over random subsets.

    The unbiased estimate of the squared maximum mean discrepancy with the kernel ``(x.y / d + 1)^3``
    (arXiv:1801.01401, sections 3 and 4). Unbiased: about 0 for equal distributions at any size, and it may be negative.
    ``size`` is cut to the smaller set.
    """
    a, b = _rows(a, least=2), _rows(b, least=2)
    size = min(size, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size]]
        y = b[torch.randperm(len(b), generator=generator)[:size]]
        values.append(_mmd(x, y))
    each = torch.stack(values)
    return float(each.mean()), float(each.std()) if subsets > 1 else 0.0


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    d, n = x.shape[1], len(x)
    xx, yy, xy = ((p @ q.T / d + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return within - 2 * xy.mean()


def precision_recall_density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """Fidelity and diversity apart, from features ``real [N, d]`` and ``fake [M, d]``.

    A point's ball reaches to its k-th nearest neighbour in its own set. *Precision*: share of fakes inside some real
    ball; *recall*: share of reals inside some fake ball (arXiv:1904.06991 eq. 1-2). *Density*: real balls that hold a
    fake, per fake and k, may exceed 1; *coverage*: share of real balls that hold at least one fake
    (arXiv:2002.09797 eq. 3-4). All depend on N and M: compare equal sizes.
    """
    real, fake = _rows(real, least=k + 1), _rows(fake, least=k + 1)
    real_reach, fake_reach = _kth_neighbour(real, k), _kth_neighbour(fake, k)
    precision = density = 0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    nearest_fake = torch.full((len(real),), torch.inf, dtype=torch.float64)
    for rows, distance in _distances(fake, real):
        inside = distance <= real_reach
        precision += int(inside.any(1).sum())
        density += int(inside.sum())
        recalled |= (distance <= fake_reach[rows, None]).any(0)
        nearest_fake = torch.minimum(nearest_fake, distance.min(0).values)
    return {
        "precision": precision / len(fake),
        "recall": float(recalled.double().mean()),
        "density": density / (k * len(fake)),
        "coverage": float((nearest_fake <= real_reach).double().mean()),
    }


def _kth_neighbour(x: Tensor, k: int) -> Tensor:
    """Distance to the k-th nearest other point of the same set."""
    reach = torch.empty(len(x), dtype=torch.float64)
    for rows, distance in _distances(x, x):
        own = torch.arange(rows.start, rows.stop)
        distance[own - rows.start, own] = torch.inf
        reach[rows] = distance.topk(k, largest=False).values[:, -1]
    return reach


def nearest_train_distance(samples: Tensor, train: Tensor) -> float:
    """Median over ``samples [N, ...]`` of the Euclidean distance to the nearest row of ``train [M, ...]``.

    A memorising generator lies far below the value of held-out real data, which belongs beside it. Distances of uint8
    images are exact: a copy has distance 0.
    """
    nearest = [distance.min(1).values for _, distance in _distances(_rows(samples), _rows(train), block=128)]
    return float(torch.cat(nearest).median())


def _distances(a: Tensor, b: Tensor, block: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
    """Euclidean distances of ``a``'s rows to all of ``b``'s, a block of rows at a time."""
    squares = b.square().sum(1)
    for start in range(0, len(a), block):
        part = a[start : start + block]
        squared = part.square().sum(1, keepdim=True) + squares - 2 * (part @ b.T)
        yield slice(start, start + len(part)), squared.clamp_(min=0).sqrt_()


# --- by a classifier ----------------------------------------------------------------------------------------------
def class_agreement(logits: Tensor, labels: Tensor) -> float:
    """Share of samples that the extractor puts into the class asked for: ``logits [N, K]``, ``labels [N]``."""
    return float((logits.argmax(1) == labels).double().mean())


def class_histogram_tv(logits: Tensor, labels: Tensor) -> float:
    """Total variation, in [0, 1], between the extractor's class histogram of the samples and that of the classes asked
    for: ``1/2 sum_k |p_k - q_k|``. Dropped classes show here even where samples look real."""
    classes = logits.shape[1]
    seen = torch.bincount(logits.argmax(1), minlength=classes).double() / len(logits)
    asked = torch.bincount(labels, minlength=classes).double() / len(labels)
    return float((seen - asked).abs().sum() / 2)


# --- on points ----------------------------------------------------------------------------------------------------
def energy_distance(a: Tensor, b: Tensor) -> float:
    """``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` over all pairs of ``a [N, d]`` and ``b [M, d]``, own pairs included.

    Szekely & Rizzo 2013 (doi:10.1016/j.jspi.2013.03.018) eq. 6. Never negative, and 0 only for equal sets; two samples
    of one distribution give about ``E|X - X'| (1/N + 1/M)``, the floor.
    """
    a, b = _rows(a), _rows(b)
    return 2 * _mean_distance(a, b) - _mean_distance(a, a) - _mean_distance(b, b)


def _mean_distance(a: Tensor, b: Tensor) -> float:
    # cdist without its matrix-product short cut, which loses half of the digits for near points
    total = sum(
        float(torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist").sum()) for part in a.split(BLOCK)
    )
    return total / (len(a) * len(b))


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error of ``[N, classes]`` against labels ``[N]`` (arXiv 1706.04599): the gap of accuracy and
    mean confidence in each of ``bins`` equal intervals of the confidence, weighted by the share of rows in it."""
    confidence, found = probabilities.double().max(-1)
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, (found == labels).double() - confidence)
    return float(gaps.abs().sum() / len(labels))


def conditional_energy_distance(a: Tensor, labels_a: Tensor, b: Tensor, labels_b: Tensor) -> float:
    """Mean over the classes of ``b`` of the :func:`energy_distance` inside the class. A class that ``a`` lacks is an
    error: the distance to nothing is not defined."""
    classes = torch.unique(labels_b)
    missing = sorted(set(classes.tolist()) - set(torch.unique(labels_a).tolist()))
    if missing:
        raise ValueError(f"no samples of class {missing[0]}: draw every class that the data have")
    return sum(energy_distance(a[labels_a == c], b[labels_b == c]) for c in classes) / len(classes)


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 128, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of equally many points ``a [N, d]`` and ``b [N, d]``.

    ``sqrt(mean over directions of mean_i (a_(i) - b_(i))^2)`` with the sorted projections (Bonneel et al. 2015,
    doi:10.1007/s10851-014-0506-3). In 2-D the directions are evenly spaced on the half circle, else random by ``seed``.
    """
    a, b = _rows(a), _rows(b)
    if a.shape != b.shape:
        raise ValueError(f"sliced_wasserstein compares equally many points, got {list(a.shape)} and {list(b.shape)}")
    if a.shape[1] == 2:
        angle = torch.arange(projections, dtype=torch.float64) * torch.pi / projections
        directions = torch.stack([angle.cos(), angle.sin()])
    else:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
        directions = directions / directions.norm(dim=0)
    gaps = (a @ directions).sort(0).values - (b @ directions).sort(0).values
    return float(gaps.square().mean().sqrt())


def _rows(x: Tensor, least: int = 1) -> Tensor:
    if len(x) < least:
        raise ValueError(f"this metric needs at least {least} samples, got {len(x)}")
    return x.detach().flatten(1).double()
