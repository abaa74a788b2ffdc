"""The capacity of one replica: how fast it generates at each batch size, learned while it runs.

A busy engine spends each second on prompts and on decode steps:

    1 = P * c  +  (G / b) * a  +  G * d

with P prompt tokens and G generated tokens a second, b sequences that decode at the same time, c seconds per
prompt token, and ``a + d * b`` seconds per decode step. (a, d, c) are estimated by recursive least squares
with forgetting (L. Ljung, "System Identification", 1999, ch. 11), starting from a prior (the roofline's
figures) that measurements soon outweigh. With Little's law the rest has a closed form: at r requests a second
with I prompt and O generated tokens

    b = r*O*a / (1 - r*(I*c + O*d)),        time per token = a + b * (I*c/O + d)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from controlplane.core.domain.request import RequestShape

_FORGET_S: Final = 14_400.0
_PRIOR_SD: Final = 0.5
"""Standard deviation of the prior, relative to it."""
_NOISE: Final = 0.1
"""Standard deviation of the equation's error for one pool of readings."""
_POOL_S: Final = 60.0
"""Readings are summed until they cover this much busy time, and then update the estimate. The equation is
linear, so summing loses nothing. Errors of short readings (a prompt that was computed in one interval and
counted in the next) cancel out; in a regression they would bias all parameters."""
_LEAST: Final = 0.02
"""No parameter falls below this ratio of its prior, because all three are times and must stay positive."""


@dataclass(frozen=True, slots=True)
class EngineObservation:
    """One busy engine over the last tick; :class:`ReplicaCapacity` learns its speed from this."""

    generation_tokens_per_s: float
    prompt_tokens_per_s: float
    """Computed tokens, without prefix cache hits."""
    batch: float
    """Mean number of sequences that decoded while it was busy."""
    busy_ratio: float
    """Fraction of the tick in which it was busy."""


@dataclass(frozen=True, slots=True)
class EngineSpeed:
    """How fast an engine is."""

    step_s: float
    """The fixed part of a decode step: reading the weights, and scheduling."""
    step_s_per_sequence: float
    prompt_s_per_token: float


def linear_speed(
    step_s: Callable[[float, float], float],
    prefill_s: Callable[[int], float],
    request: RequestShape,
    batch: float,
) -> EngineSpeed:
    """The speed of an engine, linearised around requests of that size and that batch: ``step_s`` maps a batch
    and the context of each sequence in tokens to the time of a decode step, ``prefill_s`` a prompt's tokens
    to its time."""
    context = request.input_tokens + request.output_tokens / 2
    one, many = step_s(1.0, context), step_s(max(batch, 2.0), context)
    slope = max((many - one) / (max(batch, 2.0) - 1.0), 1e-9)
    prompt = max(round(request.input_tokens), 1)
    return EngineSpeed(max(one - slope, 1e-9), slope, prefill_s(prompt) / prompt)


@dataclass(frozen=True, slots=True)
class LatencyBounds:
    """Upper bounds on the load of one replica."""

    sequences: float
    """Sequences that run at the same time: the tier's concurrency limit, or fewer if the KV cache holds
    fewer."""
    itl_s: float = math.inf
    """The time per token that the SLO requires."""


class ReplicaCapacity:
    """Learns the speed of a tier's engines, and derives rates, latencies and replica counts from it."""

    def __init__(self, prior: EngineSpeed) -> None:
        # Parameters are in units of their priors, so that one variance suits all three.
        self._scale = (prior.step_s, prior.step_s_per_sequence, prior.prompt_s_per_token)
        self._theta = [1.0, 1.0, 1.0]
        variance = _PRIOR_SD * _PRIOR_SD
        self._cov = [[variance if i == j else 0.0 for j in range(3)] for i in range(3)]
        self.speed = self._estimate()
        """The present estimate."""
        self._pool = [0.0] * 5
        """The three terms, busy time and whole time since the last update, summed over engines."""
        self.observed_s = 0.0
        """Busy time on which the estimate is based."""

    @property
    def confidence(self) -> float:
        """How much of the estimate is measured rather than assumed, in [0, 1]."""
        return self.observed_s / (self.observed_s + 120.0)

    def observe(self, engine: EngineObservation, interval_s: float) -> None:
        """Learn from one replica's engine over ``interval_s``. Readings of a mostly idle engine, and
        impossible ones, are ignored."""
        generated, prompted = engine.generation_tokens_per_s, engine.prompt_tokens_per_s
        batch, busy_ratio = engine.batch, engine.busy_ratio
        figures = (generated, prompted, batch, busy_ratio, interval_s)
        if not all(math.isfinite(figure) and figure >= 0 for figure in figures):
            return
        if batch < 0.5 or busy_ratio < 0.2 or interval_s <= 0:
            return
        rows = (generated / batch, generated, prompted)
        pool = self._pool
        for index, row in enumerate(rows):
            pool[index] += row * interval_s
        pool[3] += min(busy_ratio, 1.0) * interval_s
        pool[4] += interval_s
        self.observed_s += interval_s * min(busy_ratio, 1.0)
        if pool[3] >= _POOL_S:
            x = [pool[i] / pool[4] * self._scale[i] for i in range(3)]
            self._update(x, pool[3] / pool[4], pool[4])
            self._pool = [0.0] * 5

    def _update(self, x: Sequence[float], y: float, weight: float) -> None:
        keep = math.exp(-weight / _FORGET_S)
        most = _PRIOR_SD * _PRIOR_SD
        # Forgetting increases the variance, but never beyond that of the prior.
        cov = self._cov
        widened = min(1.0 / keep, max(1.0, most / max(cov[i][i] for i in range(3))))
        cov = [[value * widened for value in row] for row in cov]
        px = [sum(cov[i][j] * x[j] for j in range(3)) for i in range(3)]
        noise = _NOISE * _NOISE
        denominator = noise + sum(x[i] * px[i] for i in range(3))
        error = y - sum(x[i] * self._theta[i] for i in range(3))
        self._theta = [self._theta[i] + px[i] / denominator * error for i in range(3)]
        # Both halves are computed from the same products: forgetting would make any difference between them
        # grow without bound, and the figures with it.
        self._cov = [
            [cov[min(i, j)][max(i, j)] - px[min(i, j)] * px[max(i, j)] / denominator for j in range(3)]
            for i in range(3)
        ]
        self._keep_positive()
        self.speed = self._estimate()

    def _keep_positive(self) -> None:
        """Raise each parameter that fell below its minimum to the minimum, and adjust the others so that all
        three still explain the measurements (projection: D. Simon, "Kalman filtering with state constraints",
        2010). If all batches have the same size, ``a`` and ``d`` can't be distinguished: without this, one
        would grow while the other falls below 0."""
        for index in sorted(range(3), key=lambda i: self._theta[i]):
            short, variance = _LEAST - self._theta[index], self._cov[index][index]
            if short > 0 and variance > 0:
                along = [self._cov[i][index] / variance for i in range(3)]
                self._theta = [self._theta[i] + along[i] * short for i in range(3)]

    def _estimate(self) -> EngineSpeed:
        return EngineSpeed(*(max(t, _LEAST) * s for t, s in zip(self._theta, self._scale, strict=True)))

    def batch(self, requests_per_s: float, request: RequestShape) -> float:
        """Sequences that decode at the same time on a replica at that rate; infinity if it can't keep up."""
        speed = self.speed
        left = 1.0 - requests_per_s * _request_s(speed, request)
        if left <= 0:
            return math.inf
        return requests_per_s * request.output_tokens * speed.step_s / left

    def itl_s(self, batch: float, request: RequestShape) -> float:
        """Time per token with that many sequences, including the prompts of other requests in between."""
        speed = self.speed
        return speed.step_s + batch * _request_s(speed, request) / max(request.output_tokens, 1.0)

    def most_sequences(self, request: RequestShape, bounds: LatencyBounds) -> float:
        """The largest batch inside the bounds; at least 1, even if a single sequence is too slow."""
        speed = self.speed
        per_sequence_s = _request_s(speed, request) / max(request.output_tokens, 1.0)
        by_itl = (bounds.itl_s - speed.step_s) / per_sequence_s if per_sequence_s > 0 else math.inf
        return max(1.0, min(bounds.sequences, by_itl))

    def requests_per_s(self, request: RequestShape, sequences: float) -> float:
        """The rate at which a replica has that many sequences at the same time."""
        speed = self.speed
        busy = sequences * _request_s(speed, request) + request.output_tokens * speed.step_s
        return sequences / busy if busy > 0 else math.inf

    def residence_s(self, requests_per_s: float, request: RequestShape) -> float:
        """The mean time that a request spends at a replica which serves that rate (Little's law)."""
        if requests_per_s <= 0:
            speed = self.speed
            return request.input_tokens * speed.prompt_s_per_token + request.output_tokens * (
                speed.step_s + speed.step_s_per_sequence
            )
        return self.batch(requests_per_s, request) / requests_per_s

    def replicas(self, requests_per_s: float, request: RequestShape, bounds: LatencyBounds) -> int:
        """The smallest number of replicas that can serve the rate within the bounds."""
        if requests_per_s <= 0:
            return 0
        each_per_s = self.requests_per_s(request, self.most_sequences(request, bounds))
        return max(1, math.ceil(requests_per_s / each_per_s - 1e-9))


def _request_s(speed: EngineSpeed, request: RequestShape) -> float:
    """The engine time that one request adds, apart from the fixed part of the steps."""
    return request.input_tokens * speed.prompt_s_per_token + request.output_tokens * speed.step_s_per_sequence
