"""Scores of class probabilities: of a network alone, and of a student beside its teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stillroom.evaluation.metrics import calibration_error
from stillroom.evaluation.scores import Score

ACCURACY = Score("accuracy", "Accuracy", label="Accuracy")
CLASSIFICATION = (
    Score("nll", "Log loss", "lower", unit="nats"),
    Score("ece", "Calibration error, 15 bins", "lower"),
)
PAIR = (
    Score("agreement", "Agreement with the teacher"),
    Score("kl", "KL(teacher || student), nats", "lower", unit="nats"),
)


def classification_scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """``accuracy``, ``nll`` (nats) and ``ece`` of ``[N, classes]`` and ``[N]``."""
    return {
        "accuracy": float((probabilities.argmax(-1) == labels).float().mean()),
        "nll": float(F.nll_loss(probabilities.clamp_min(1e-12).log(), labels)),
        "ece": calibration_error(probabilities, labels),
    }


def pair_scores(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Of two networks' probabilities ``[N, classes]`` on the same rows: ``agreement``, the share of rows with the same
    most probable class, and ``kl``, the mean ``KL(teacher || student)`` in nats."""
    t, s = teacher.double().clamp_min(1e-12), student.double().clamp_min(1e-12)
    return {
        "agreement": float((student.argmax(-1) == teacher.argmax(-1)).float().mean()),
        "kl": float((t * (t.log() - s.log())).sum(-1).mean()),
    }
