"""From one noise level to a higher one: the forward kernel ``q(x_t | x_s)``, and what a network that is shown ``x_s``
alone has to learn from it to know the score of its noised law."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.diffusion.process import Process, expand


@dataclass(frozen=True)
class Transition:
    """``x_t = a x_s + b eps`` with ``a = alpha_t / alpha_s`` and ``b^2 = sigma_t^2 - a^2 sigma_s^2``, from the time
    ``s``, a scalar, to times ``t >= s``, ``[B]`` or scalar, of one process. s: None: x_s is clean data.

    With x_s given and not the data behind it, ``-eps / b`` is an unbiased estimate of the score of the noised x_s; so
    are these of the denoiser's and the noise's posterior means and of the velocity (arXiv 2510.27684, eq. 11):

        x0  <-  x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 b) eps
        eps <-  sigma_t / b eps

    From clean data they are the data and eps themselves. They grow without bound as t nears s: a loss on them has to be
    weighted (:meth:`weight`).
    """

    process: Process
    s: Tensor | None
    t: Tensor

    @property
    def _from(self) -> tuple[Tensor | float, Tensor | float]:
        """``alpha_s`` and ``sigma_s``."""
        return (1.0, 0.0) if self.s is None else (self.process.alpha(self.s), self.process.sigma(self.s))

    @property
    def a(self) -> Tensor:
        return self.process.alpha(self.t) / self._from[0]

    @property
    def b(self) -> Tensor:
        """At least 1e-3, in float32 or better."""
        return (self.process.sigma(self.t) ** 2 - (self.a * self._from[1]) ** 2).clamp_min(1e-6).sqrt()

    def noised(self, x_s: Tensor, eps: Tensor) -> Tensor:
        """A sample of ``q(x_t | x_s)`` from unit noise, shape of x_s."""
        return expand(self.a, x_s) * x_s + expand(self.b, x_s) * eps

    def velocity(self, x_s: Tensor, eps: Tensor) -> Tensor:
        """The unbiased velocity target of ``noised(x_s, eps)``, in the process's own velocity space. Of a rectified
        flow: ``(alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 b) eps - x_s / alpha_s``."""
        p, q = self.process.velocity_weights(self.t)
        alpha_s, sigma_s = self._from
        of_noise = (q * self.process.sigma(self.t) - p * self.process.alpha(self.t) * (sigma_s / alpha_s) ** 2) / self.b
        return expand(p / alpha_s, x_s) * x_s + expand(of_noise, x_s) * eps

    def biased_velocity(self, x_s: Tensor, eps: Tensor) -> Tensor:
        """``p x_s + q eps``: x_s taken for clean data, which it is at ``s = 0`` alone."""
        p, q = self.process.velocity_weights(self.t)
        return expand(p, x_s) * x_s + expand(q, x_s) * eps

    def weight(self, most: float) -> Tensor:
        """``min(1 / b^2, most) b^2``, of squared errors of the velocity: 1, but less where t is near s (the paper's
        clamp on the weight of errors that are multiplied by b). most: 0 is 1 throughout."""
        return torch.ones_like(self.b) if not most else (most * self.b**2).clamp(max=1)

    def score_weight(self) -> Tensor:
        """``a alpha_t / sigma_t^2``: what a difference of two x0-predictions at x_t is multiplied by to be the
        difference of their scores, taken back to x_s (eq. 13)."""
        return self.a * self.process.alpha(self.t) / self.process.sigma(self.t) ** 2
