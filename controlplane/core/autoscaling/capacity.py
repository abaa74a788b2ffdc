"""What one replica carries: tokens a second against batch size, learned while it runs.

An engine that is busy spends each second on prompts and on decode steps:

    1 = P * c  +  (G / b) * a  +  G * d

with P prompt tokens and G answer tokens a second, b sequences decoding at once, c seconds per prompt token,
and a step of ``a + d * b`` seconds. (a, d, c) are found by recursive least squares with forgetting (L. Ljung,
"System Identification", 1999, ch. 11) around a prior, the roofline's figures, which is soon outweighed. With
Little's law the rest is closed form: at r requests a second of I prompt and O answer tokens

    b = r*O*a / (1 - r*(I*c + O*d)),        time per token = a + b * (I*c/O + d)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from controlplane.core.sizing.roofline import Roofline

_FORGET_S: Final = 14_400.0
_PRIOR_SD: Final = 0.5
"""How far the truth may be from the prior, as a share of it."""
_NOISE: Final = 0.1
"""How far a pool of readings is from the equation."""
_POOL_S: Final = 60.0
"""Readings are added up to so much busy time before they teach anything. The equation is linear, so nothing
is lost, and what a short reading gets wrong (a prompt counted in it that was worked on before) evens out: in
a regression such errors would pull all figures off."""
_LEAST: Final = 0.02
"""A figure never falls under this share of its prior: all three are times."""


@dataclass(frozen=True, slots=True)
class EngineSpeed:
    """How long an engine takes."""

    step_s: float
    """A decode step for nothing: weights, scheduling."""
    step_s_per_sequence: float
    prompt_s_per_token: float


def speed_of(line: Roofline, input_tokens: float, output_tokens: float, batch: float = 16.0) -> EngineSpeed:
    """The roofline as the three figures, straightened around that length and batch."""
    context = input_tokens + output_tokens / 2
    one = line.step_s(1.0, context)
    many = line.step_s(max(batch, 2.0), context)
    slope = max((many - one) / (max(batch, 2.0) - 1.0), 1e-9)
    prompt = max(round(input_tokens), 1)
    return EngineSpeed(max(one - slope, 1e-9), slope, line.prefill_s(prompt) / prompt)


@dataclass(frozen=True, slots=True)
class RequestShape:
    """The mean request of a tier."""

    input_tokens: float
    """Prompt tokens that are computed: without what the prefix cache has."""
    output_tokens: float


@dataclass(frozen=True, slots=True)
class LatencyBounds:
    """What a replica must keep."""

    sequences: float
    """At once: the tier's concurrency limit or the KV cache, whichever is less."""
    itl_s: float = math.inf
    """Time per token that is promised."""


class ReplicaCapacity:
    """The speed of a tier's engines, and what follows from it."""

    def __init__(self, prior: EngineSpeed) -> None:
        self.prior = prior
        # In units of the prior, so that one number says how much each of the three is trusted.
        self._scale = (prior.step_s, prior.step_s_per_sequence, prior.prompt_s_per_token)
        self._theta = [1.0, 1.0, 1.0]
        variance = _PRIOR_SD * _PRIOR_SD
        self._cov = [[variance if i == j else 0.0 for j in range(3)] for i in range(3)]
        self.speed = self._believed()
        """As it is believed now."""
        self._pool = [0.0] * 5
        """The three rows, the busy time and the whole time since the last update, summed over engines."""
        self.observed_s = 0.0
        """Busy seconds it has learned from."""

    @property
    def confidence(self) -> float:
        """How much is measured rather than assumed, in [0, 1]."""
        return self.observed_s / (self.observed_s + 120.0)

    def observe(
        self,
        *,
        generation_tokens_per_s: float,
        prompt_tokens_per_s: float,
        batch: float,
        busy_ratio: float,
        interval_s: float,
    ) -> None:
        """One replica over ``interval_s``: means while it was busy, and the share of the time it was.

        An engine that was mostly idle, or a reading that no engine could give, teaches nothing.
        """
        figures = (generation_tokens_per_s, prompt_tokens_per_s, batch, busy_ratio, interval_s)
        if not all(math.isfinite(figure) and figure >= 0 for figure in figures):
            return
        if batch < 0.5 or busy_ratio < 0.2 or interval_s <= 0:
            return
        rows = (generation_tokens_per_s / batch, generation_tokens_per_s, prompt_tokens_per_s)
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
        # Forgetting widens what is believed, but never beyond what was believed at first.
        cov = self._cov
        widened = min(1.0 / keep, max(1.0, most / max(cov[i][i] for i in range(3))))
        cov = [[value * widened for value in row] for row in cov]
        px = [sum(cov[i][j] * x[j] for j in range(3)) for i in range(3)]
        noise = _NOISE * _NOISE
        denominator = noise + sum(x[i] * px[i] for i in range(3))
        error = y - sum(x[i] * self._theta[i] for i in range(3))
        self._theta = [self._theta[i] + px[i] / denominator * error for i in range(3)]
        # Both halves from the same products: forgetting would make a difference between them grow without
        # bound, and the figures with it.
        self._cov = [
            [cov[min(i, j)][max(i, j)] - px[min(i, j)] * px[max(i, j)] / denominator for j in range(3)]
            for i in range(3)
        ]
        self._keep_positive()
        self.speed = self._believed()

    def _keep_positive(self) -> None:
        """Puts a figure that fell under the least back to it, and moves the others along so that together
        they still say of the engine what was seen (projection: D. Simon, "Kalman filtering with state
        constraints", 2010). Batches of one size can't tell ``a`` from ``d``: without this one of them would
        grow as the other falls under 0."""
        for index in sorted(range(3), key=lambda i: self._theta[i]):
            short, variance = _LEAST - self._theta[index], self._cov[index][index]
            if short > 0 and variance > 0:
                along = [self._cov[i][index] / variance for i in range(3)]
                self._theta = [self._theta[i] + along[i] * short for i in range(3)]

    def _believed(self) -> EngineSpeed:
        return EngineSpeed(*(max(t, _LEAST) * s for t, s in zip(self._theta, self._scale, strict=True)))

    def batch(self, requests_per_s: float, work: RequestShape) -> float:
        """Sequences that decode at once on a replica at that rate; infinity: it can't keep up."""
        speed = self.speed
        left = 1.0 - requests_per_s * _request_s(speed, work)
        if left <= 0:
            return math.inf
        return requests_per_s * work.output_tokens * speed.step_s / left

    def itl_s(self, batch: float, work: RequestShape) -> float:
        """Time per token with that many sequences, prompts of their like coming in between."""
        speed = self.speed
        return speed.step_s + batch * _request_s(speed, work) / max(work.output_tokens, 1.0)

    def most_sequences(self, work: RequestShape, bounds: LatencyBounds) -> float:
        """The largest batch inside the bounds; at least 1, even where one alone is too slow."""
        speed = self.speed
        per_sequence_s = _request_s(speed, work) / max(work.output_tokens, 1.0)
        by_itl = (bounds.itl_s - speed.step_s) / per_sequence_s if per_sequence_s > 0 else math.inf
        return max(1.0, min(bounds.sequences, by_itl))

    def requests_per_s(self, work: RequestShape, sequences: float) -> float:
        """The rate at which a replica has that many sequences at once."""
        speed = self.speed
        busy = sequences * _request_s(speed, work) + work.output_tokens * speed.step_s
        return sequences / busy if busy > 0 else math.inf

    def hold_s(self, requests_per_s: float, work: RequestShape) -> float:
        """How long a request is with a replica that gets that rate (Little's law)."""
        if requests_per_s <= 0:
            speed = self.speed
            return work.input_tokens * speed.prompt_s_per_token + work.output_tokens * (
                speed.step_s + speed.step_s_per_sequence
            )
        return self.batch(requests_per_s, work) / requests_per_s

    def replicas(
        self,
        requests_per_s: float,
        work: RequestShape,
        bounds: LatencyBounds,
        *,
        dispersion: float = 1.0,
        z: float = 0.0,
    ) -> int:
        """The fewest replicas that carry the rate and still have room for its fluctuation.

        The number in flight has about mean L and variance D*L (D: how bursty arrivals are), so the slots
        must be L + z*sqrt(D*L): square-root staffing (S. Halfin, W. Whitt, 1981), with peakedness
        (W. Whitt, "Heavy-traffic approximations for service systems with blocking", 1984).
        """
        if requests_per_s <= 0:
            return 0
        slots = self.most_sequences(work, bounds)
        most = self.requests_per_s(work, slots)
        count = max(1, math.ceil(requests_per_s / most - 1e-9))
        while count < 100_000:
            flight = count * self.batch(requests_per_s / count, work)
            if flight + z * math.sqrt(max(dispersion, 0.0) * flight) <= count * slots + 1e-9:
                return count
            count += max(1, count // 50)
        return count


def _request_s(speed: EngineSpeed, work: RequestShape) -> float:
    """Time of the engine that one request takes for itself."""
    return work.input_tokens * speed.prompt_s_per_token + work.output_tokens * speed.step_s_per_sequence
