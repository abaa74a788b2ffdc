"""The controller's periodic loops: what runs, how often, and what it may change. :data:`LOOPS` lists them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, NoReturn

import structlog
from ray.exceptions import RayError

from controlplane.config import ControllerConfig
from controlplane.controller.alerting import Alerting
from controlplane.controller.controller import Controller
from controlplane.controller.node_watch import NodeWatch
from controlplane.controller.ray_cordons import hold_gpus
from controlplane.controller.registry import Registry
from controlplane.controller.reports import Reports
from controlplane.controller.saved_state import SavedState
from controlplane.controller.scaling import PlaneScaler
from controlplane.engines.metrics_scraper import EngineScraper, scrape_targets

IDLE_EXIT_S: Final = 300.0
"""A controller ends after it has had neither a gateway nor a living endpoint for this long, so that nothing
of a deleted plane stays behind."""
SAVE_INTERVAL_S: Final = 30.0
"""State that changes without an event, such as the progress of a GPU's recovery, is saved this often."""
CORDONS_INTERVAL_S: Final = 30.0
"""How often unchanged cordons are compared with the actors that Ray has."""
SCRAPE_PAUSE: Final = 4.0
"""The pause after reading the engines' metrics is at least this many times the CPU time that it took."""

log = structlog.stdlib.get_logger(__name__)


class ControlLoops:
    """One round of each loop, and the tasks that repeat them. One event loop owns it.

    ``on_change`` is called after a round that may have changed the snapshot; ``on_idle`` is awaited once, in
    a task of its own and with the loops stopped, when the plane is gone.
    """

    def __init__(
        self,
        config: ControllerConfig,
        *,
        registry: Registry,
        controller: Controller,
        scaler: PlaneScaler,
        alerting: Alerting,
        reports: Reports,
        nodes: NodeWatch,
        saved: SavedState,
        on_change: Callable[[], None],
        on_idle: Callable[[], Awaitable[None]],
    ) -> None:
        self.config = config
        self.scaler = scaler
        self.alerting = alerting
        self.scrape_period_s = config.engine_interval_s
        """Longer than configured where the metrics of very many engines are read."""
        self.tick_s = 0.0
        """How long the last tick took."""
        self._registry = registry
        self._controller = controller
        self._reports = reports
        self._nodes = nodes
        self._saved = saved
        self._on_change = on_change
        self._on_idle = on_idle
        self._ending: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[NoReturn]] = []
        self._run_now = {loop.name: asyncio.Event() for loop in LOOPS}
        self._open = contextlib.AsyncExitStack()
        self._scraper = EngineScraper()
        self._ray_gpus: dict[str, int] = {}
        """Node id → the number of GPUs that Ray counts there."""
        self._cordons: dict[str, str] | None = None
        """The GPUs out of use as they were when Ray's accounting was changed last; None before that."""
        self._cordons_s = 0.0

    async def start(self) -> None:
        """Start every loop in the running event loop."""
        await self._open.enter_async_context(self._scraper)
        self._tasks = [asyncio.create_task(self._repeat(loop)) for loop in LOOPS]

    async def stop(self) -> None:
        """End every loop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._nodes.close()
        await self._open.aclose()

    def run_soon(self, loop: PeriodicLoop) -> None:
        """Begin a loop's next round without waiting for its period."""
        self._run_now[loop.name].set()

    async def _repeat(self, loop: PeriodicLoop) -> NoReturn:
        run_now = self._run_now[loop.name]
        while True:
            began_s = time.monotonic()
            run_now.clear()
            try:
                await loop.run(self)
            except Exception as error:
                log.exception("a control loop failed; it runs again", loop=loop.name, error=repr(error))
            left_s = max(0.0, began_s + loop.period_s(self) - time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await run_now.wait()

    # --- one round of each --------------------------------------------------------------------------------

    async def watch_nodes(self) -> None:
        """List Ray's nodes, and request samples from their agents."""
        alive = await self._nodes.poll()
        if alive is not None:
            self._ray_gpus = alive
            self._saved.observe_nodes(alive.keys())
            self._controller.observe_nodes(alive.keys())
            if self._nodes.living is not None:
                self._controller.observe_processes(self._nodes.living)
            self._on_change()

    async def tick(self) -> None:
        """Decide, and carry out the commands."""
        began_s = time.monotonic()
        self._controller.tick()
        self.tick_s = time.monotonic() - began_s
        self._commit()
        if self._registry.empty_for_s() > IDLE_EXIT_S and self._ending is None:
            self._ending = asyncio.create_task(self._end())

    async def read_engines(self) -> None:
        """Read the metrics of the engines that serve."""
        began_s, worked_s = time.monotonic(), time.thread_time()
        targets = scrape_targets(self._controller.endpoints.values())
        for sample in await self._scraper.scrape_all(targets):
            self._controller.observe_engine(sample)
        # Parsing a page takes milliseconds: with very many engines it is done less often.
        pause_s = SCRAPE_PAUSE * (time.thread_time() - worked_s)
        self.scrape_period_s = max(self.config.engine_interval_s, time.monotonic() - began_s + pause_s)

    async def scale(self) -> None:
        """Decide targets and recommendations."""
        self.scaler.tick()
        self._commit()

    async def apply_cordons(self) -> None:
        """Remove GPUs that are out of use from Ray's own accounting."""
        wanted = self._controller.gpus_out_of_use()
        now_s = time.monotonic()
        unchanged = wanted == self._cordons
        if not self._ray_gpus or (unchanged and (not wanted or now_s - self._cordons_s < CORDONS_INTERVAL_S)):
            return
        try:
            await asyncio.to_thread(hold_gpus, self.config.namespace, wanted, dict(self._ray_gpus))
            self._cordons, self._cordons_s = wanted, now_s
        except (RayError, RuntimeError, OSError) as error:
            log.warning("cordons are not in Ray's accounting yet", error=str(error))

    async def evaluate_alerts(self) -> None:
        """Evaluate the alert rules and send what is due."""
        if self._saved.restored:
            self.alerting.step()
            self._commit()

    async def sample_reports(self) -> None:
        """Record samples for reports."""
        self._reports.tick()

    async def save(self) -> None:
        """Save the state, whether or not there was an event."""
        self._saved.save()

    def _commit(self) -> None:
        self._on_change()
        self._saved.save_if_changed()

    async def _end(self) -> None:
        await self.stop()
        await self._on_idle()


@dataclass(frozen=True, slots=True)
class PeriodicLoop:
    """One loop. A failed round is logged; the next one begins on schedule."""

    name: str
    period_s: Callable[[ControlLoops], float]
    """From the beginning of one round to the next."""
    run: Callable[[ControlLoops], Awaitable[None]]
    changes: str
    """What a round may change, word for word as in docs/architecture.md."""


TICK: Final = PeriodicLoop(
    "tick",
    lambda loops: loops.config.tick_interval_s,
    ControlLoops.tick,
    "drops endpoints that missed five reports, and ends leases whose holder is gone; begins, advances and "
    "ends migrations; commands replicas to retire or restart; holds tiers whose replicas give up; marks "
    "cordoned GPUs as draining and drained",
)
SCALING: Final = PeriodicLoop(
    "scaling",
    lambda loops: loops.scaler.config.tick_s,
    ControlLoops.scale,
    "targets of tiers (followed in mode `apply`); recommendations every "
    "`controller.scaling.advice_interval_s`; the end of targets set by hand",
)
LOOPS: Final = (
    PeriodicLoop(
        "nodes",
        lambda loops: loops.config.tick_interval_s,
        ControlLoops.watch_nodes,
        "starts missing node agents; the health of GPUs, out of use or back; which nodes are lost; drops "
        "endpoints and gateways whose processes have ended",
    ),
    TICK,
    PeriodicLoop(
        "engine metrics",
        lambda loops: loops.scrape_period_s,
        ControlLoops.read_engines,
        "nothing: its readings serve the tick (stalled engines) and scaling",
    ),
    SCALING,
    PeriodicLoop(
        "cordons",
        lambda loops: loops.config.tick_interval_s,
        ControlLoops.apply_cordons,
        "the actors that hold cordoned GPUs in Ray's accounting",
    ),
    PeriodicLoop(
        "alerts",
        lambda loops: loops.alerting.config.interval_s,
        ControlLoops.evaluate_alerts,
        "alerts; notifications to the log and webhooks",
    ),
    PeriodicLoop(
        "reports",
        lambda loops: loops.config.tick_interval_s,
        ControlLoops.sample_reports,
        "samples for reports, every `controller.reports.interval_s`; reports in the log",
    ),
    PeriodicLoop("save", lambda _: SAVE_INTERVAL_S, ControlLoops.save, "the store"),
)
"""Every periodic loop of the controller."""
