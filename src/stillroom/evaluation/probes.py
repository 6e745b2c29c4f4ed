"""What an encoder's features are good for: probes with few or many labels, on clean and on damaged images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.data.source import ArrayData
from stillroom.errors import UserError
from stillroom.losses.features import cka_loss, relation
from stillroom.networks.mae import block, encode, learned, patchify
from stillroom.networks.vit import PooledClassifier, encoder_of
from stillroom.surgery.taps import Taps, projection_path, split_heads

NEIGHBOURS = 10
OCCLUDED = 1 / 3
"""Share of the patches that are covered on occluded images."""
NOISE = 0.4
"""Standard deviation of the noise on noisy images; pixels lie in [-1, 1]."""
FEW = 10
"""Labelled images per class for fine-tuning."""
NAMES = {
    "probe": "Linear probe",
    "knn": f"{NEIGHBOURS} nearest neighbours",
    "tuned": f"Fine-tuned on {FEW} images per class",
    "probe_occluded": "Linear probe, a third of the patches covered",
    "probe_noisy": f"Linear probe, noise {NOISE}",
    "agreement": "Linear probe agrees with the teacher's",
    "cka": "CKA with the teacher",
}
"""The scores by name, in words."""


class Encoder(Protocol):
    """What describes images ``[N, C, H, W]``: by one vector each, ``[N, D]``, and by one for each patch,
    ``[N, patches, D]``, both on the CPU."""

    network: nn.Module

    def features(self, images: Tensor) -> Tensor: ...

    def tokens(self, images: Tensor) -> Tensor: ...


def linear_probe(train: Tensor, labels: Tensor, *tests: Tensor) -> list[Tensor]:
    """Classes that logistic regression on standardised features ``[N, D]`` predicts for each of ``tests``."""
    from sklearn.linear_model import LogisticRegression

    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    fitted = LogisticRegression(max_iter=1000).fit(((train - mean) / std).numpy(), labels.numpy())
    return [torch.from_numpy(fitted.predict(((test - mean) / std).numpy())) for test in tests]


def nearest_neighbours(train: Tensor, labels: Tensor, test: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The commonest class among the ``k`` training rows of greatest cosine, or all where there are fewer."""
    cosines = F.normalize(test, dim=-1) @ F.normalize(train, dim=-1).T
    votes = F.one_hot(labels[cosines.topk(min(k, len(train)), dim=1).indices], int(labels.max()) + 1).sum(1)
    return votes.argmax(1)


def smallest_class(labels: Tensor) -> int:
    """Rows of the class that has the fewest, of those that occur."""
    return int(torch.unique(labels, return_counts=True)[1].min())


def few_labels(labels: Tensor, each: int) -> Tensor:
    """Row numbers of the first ``each`` rows of every class. Raises UserError where a class has fewer."""
    rows = [torch.nonzero(labels == c)[:each, 0] for c in torch.unique(labels)]
    if any(len(found) < each for found in rows):
        raise UserError(f"a class has fewer than {each} labelled images", cure="ask for fewer per class")
    return torch.cat(rows)


def fine_tune(
    encoder: nn.Module,
    images: Tensor,
    labels: Tensor,
    classes: int,
    steps: int = 100,
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
) -> PooledClassifier:
    """A copy of ``encoder`` with a head on its mean patch token, all of it trained on labels: AdamW, weight decay 0.05,
    a tenth of the steps as warm-up, then cosine. The caller's network and random state stay as they are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = PooledClassifier(copy.deepcopy(encoder_of(encoder)), classes).requires_grad_(True).train()
        trained = list(learned(dict(network.named_parameters())).values())
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.05)
        warm = max(1, steps // 10)
        law = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda s: min((s + 1) / warm, 0.5 * (1 + torch.cos(torch.tensor(torch.pi * s / steps)).item())),
        )
        for _ in range(steps):
            rows = torch.randint(len(labels), (batch,))
            loss = F.cross_entropy(network(images[rows]), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            law.step()
    return network.eval()


def occluded(images: Tensor, patch: int, seed: int = 0, share: float = OCCLUDED) -> Tensor:
    """Images with this share of their patches (rounded) covered in mid-grey, other ones on each image."""
    n, _, height, width = images.shape
    across = width // patch
    patches = height // patch * across
    order = torch.rand(n, patches, generator=torch.Generator().manual_seed(seed)).argsort(1)
    covered = (order.argsort(1) < round(share * patches)).view(n, 1, -1, across)
    mask = covered.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return images.masked_fill(mask, 0.0)


def noisy(images: Tensor, seed: int = 0, std: float = NOISE) -> Tensor:
    """Images with normal noise."""
    return images + std * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def accuracy(classifier: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch: int = 250) -> float:
    """Share of images that ``classifier``, images to class logits, gets right."""
    found = torch.cat([classifier(part).argmax(-1) for part in images.split(batch)])
    return float((found == labels).float().mean())


def probe_scores(
    encoder: Encoder,
    train: ArrayData,
    test: ArrayData,
    teacher: Encoder | None = None,
    tuning: int = 100,
) -> dict[str, float]:
    """Accuracies under the names of :data:`NAMES`; ``agreement`` and ``cka`` with the teacher where one is given,
    ``tuned`` where every class has :data:`FEW` images. ``tuning``: steps of fine-tuning.

    The probes learn from the clean images of ``train`` and are asked about those of ``test``, then about the same
    images damaged.
    """
    images, truth = test.images(), test.labels
    config: Any = encoder.network.config
    damaged = {"probe_occluded": occluded(images, config.patch_size), "probe_noisy": noisy(images)}
    seen = encoder.features(train.images())
    features = [encoder.features(x) for x in (images, *damaged.values())]
    clean, *others = linear_probe(seen, train.labels, *features)

    def share(found: Tensor, right: Tensor = truth) -> float:
        return float((found == right).float().mean())

    scores = {"probe": share(clean), "knn": share(nearest_neighbours(seen, train.labels, features[0]))}
    if smallest_class(train.labels) >= FEW:
        few = few_labels(train.labels, FEW)
        tuned = fine_tune(encoder.network, train.images(few), train.labels[few], len(train.classes), tuning)
        scores["tuned"] = accuracy(tuned, images, truth)
    scores |= {name: share(found) for name, found in zip(damaged, others, strict=True)}
    if teacher is not None:
        theirs = teacher.features(images)
        (told,) = linear_probe(teacher.features(train.images()), train.labels, theirs)
        scores |= {"agreement": share(clean, told), "cka": 1 - float(cka_loss(features[0], theirs))}
    return scores


def dense_probe(
    encoder: Encoder, images: Tensor, targets: Tensor, test: Tensor, truth: Tensor, rows: int = 5000
) -> float:
    """Accuracy of a linear probe on single tokens, which learns from ``rows`` of them at random; targets
    ``[N, patches]``."""
    seen, asked = (encoder.tokens(x).flatten(0, 1) for x in (images, test))
    chosen = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[:rows]
    (found,) = linear_probe(seen[chosen], targets.flatten()[chosen], asked)
    return float((found == truth.flatten()).float().mean())


@torch.no_grad()
def attention_collapse(network: Any, images: Tensor) -> float:
    """Mean cosine of two heads' attention maps in the last layer, over images and pairs of heads: 1 where all heads
    look alike. Maps are softmax of scaled products of queries and keys."""
    last = block(network, -1)
    taps = {part: projection_path(network, last, part) for part in ("query", "key")}
    with Taps(network, taps) as reading, reading.recording() as features:
        encode(network, images)
    heads = network.config.num_attention_heads
    maps = relation(*(split_heads(features[part], heads) for part in ("query", "key"))).softmax(-1)
    unit = F.normalize(maps.flatten(2), dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    return float(cosines[:, ~torch.eye(heads, dtype=torch.bool)].mean())


def patch_targets(dense: Tensor, patch: int) -> Tensor:
    """The commonest class in each patch: int ``[N, H, W]`` (classes from 0) to ``[N, patches]``."""
    pixels = patchify(dense[:, None].float(), patch).long()
    return pixels.mode(-1).values
