"""One tier of a simulation: its fleet, the record of its requests, and its observations and samples."""

from __future__ import annotations

from controlplane.core.autoscaling.capacity import EngineObservation
from controlplane.core.autoscaling.decision import TierObservation
from controlplane.core.domain.endpoint import EndpointState
from controlplane.core.routing.endpoint_table import TierPool
from controlplane.core.telemetry.series import known_now, missing
from controlplane.simulation.fleet import TierFleet
from controlplane.simulation.policies import PolicyInput
from controlplane.simulation.results import START_UNIX_S, TierRecord, TierSample
from controlplane.simulation.scenario import TierScenario

_NO_END = missing("no request ended in the interval")


class SimulatedTier:
    """One tier of a run; the private counters count since the last observation."""

    def __init__(self, scenario: TierScenario, fleet: TierFleet) -> None:
        self.scenario = scenario
        self.fleet = fleet
        self.record = TierRecord(scenario.policy.name)
        self.samples: list[TierSample] = []
        self.queued = 0
        """Requests in the gateway's queue."""
        self.unfinished = 0
        """Requests that wait or run."""
        self.ended_total = 0
        self.limited_decisions = 0
        """Decisions for which the GPU budget allowed fewer replicas than the tier wanted."""
        self.recorded_shortfall = 0
        """Replicas that the budget withheld in the last recorded decision."""
        self._unfinished_s = 0.0
        """``unfinished`` integrated over time."""
        self._changed_s = 0.0
        self._observed_s = 0.0
        self._arrived = self._ended = self._missed = 0
        self._answered = self._prompt_tokens = self._output_tokens = 0
        self._last_sample = (0.0, 0, 0, 0)
        """Time of the last sample, and the requests that had arrived, met the SLO and ended by then."""

    def count_arrival(self, input_tokens: int, now_s: float) -> None:
        """Count a new request."""
        self._arrived += 1
        self.record.arrived += 1
        self.record.prompt_tokens += input_tokens
        self._change_unfinished(+1, now_s)

    def count_response(
        self, *, ttft_s: float, itl_s: float, total_s: float, output_tokens: int, computed_tokens: int
    ) -> None:
        """Count a complete response; call :meth:`count_end` afterwards."""
        record = self.record
        record.ttft_s.append(ttft_s)
        record.itl_s.append(itl_s)
        record.total_s.append(total_s)
        record.output_tokens += output_tokens
        record.computed_tokens += computed_tokens
        self._answered += 1
        self._prompt_tokens += computed_tokens
        self._output_tokens += output_tokens

    def count_end(self, now_s: float, *, within_slo: bool) -> None:
        """Count the end of a request, with or without a response."""
        self._ended += 1
        self.ended_total += 1
        if within_slo:
            self.record.within_slo += 1
        else:
            self._missed += 1
        self._change_unfinished(-1, now_s)

    def observe(self, now_s: float, pool: TierPool) -> PolicyInput:
        """The input of a scaling policy; begins the next interval."""
        interval_s = now_s - self._observed_s
        self._change_unfinished(0, now_s)
        engines: list[EngineObservation] = []
        busy = 0.0
        ready = 0
        for replica in self.fleet.replicas.values():
            engine = replica.engine
            if engine is None:
                continue
            meter = engine.read()
            alive_s = min(interval_s, now_s - replica.ready_s)
            if alive_s <= 0:
                continue
            if replica.endpoint.state is EndpointState.READY:
                ready += 1
                busy += meter.busy_s / alive_s
            if meter.busy_s > 0:
                engines.append(
                    EngineObservation(
                        meter.generated_tokens / alive_s,
                        meter.prompt_tokens / alive_s,
                        meter.batch_s / meter.busy_s,
                        meter.busy_s / alive_s,
                    )
                )
        answered = self._answered
        observation = TierObservation(
            tier=self.scenario.policy.name,
            now_s=now_s,
            unix_s=START_UNIX_S + now_s,
            target=self.fleet.target,
            ready=self.fleet.ready,
            interval_s=interval_s,
            arrivals=known_now(self._arrived),
            in_flight=known_now(pool.in_flight),
            queued=known_now(self.queued),
            input_tokens=known_now(self._prompt_tokens / answered) if answered else _NO_END,
            output_tokens=known_now(self._output_tokens / answered) if answered else _NO_END,
            finished=self._ended,
            missed=self._missed,
            engines=tuple(engines),
        )
        found = PolicyInput(
            observation,
            unfinished=self._unfinished_s / interval_s if interval_s > 0 else float(self.unfinished),
            busy_ratio=busy / ready if ready else 0.0,
            slots=pool.limit,
        )
        self._observed_s = now_s
        self._unfinished_s = 0.0
        self._arrived = self._ended = self._missed = 0
        self._answered = self._prompt_tokens = self._output_tokens = 0
        return found

    def sample(self, now_s: float, pool: TierPool) -> None:
        """Record a point of the plot."""
        record = self.record
        at_s, arrived, within_slo, ended = self._last_sample
        span_s = now_s - at_s
        newly_ended = self.ended_total - ended
        self.samples.append(
            TierSample(
                now_s,
                (record.arrived - arrived) / span_s if span_s > 0 else 0.0,
                self.fleet.placed,
                self.fleet.ready,
                pool.in_flight,
                self.queued,
                (record.within_slo - within_slo) / newly_ended if newly_ended else 1.0,
                self.fleet.waiting,
            )
        )
        self._last_sample = (now_s, record.arrived, record.within_slo, self.ended_total)

    def _change_unfinished(self, by: int, now_s: float) -> None:
        self._unfinished_s += self.unfinished * (now_s - self._changed_s)
        self._changed_s = now_s
        self.unfinished += by
