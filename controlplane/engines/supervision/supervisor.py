"""Keeps one engine serving: starts it, waits until it is ready, watches it, brings it back, ends it.

Threads: an :class:`EngineSupervisor` has one thread of its own with an event loop, where all its state
lives and where its engine is forked (the kernel ends the engine if that thread dies). The public methods may
be called from any thread but that one; they hand their wish to the loop and wait. ``status`` is an
immutable value that is replaced as a whole. ``on_change`` is called in the supervisor's thread: it must be
quick and must not call back.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path

from controlplane.config import TierConfig
from controlplane.core.domain.endpoint import EndpointState
from controlplane.core.reconcile.restart_backoff import RestartPolicy, decide_restart
from controlplane.engines import engine_for
from controlplane.engines.base import Diagnosis
from controlplane.engines.supervision.commands import CommandInbox, SupervisorCommand
from controlplane.engines.supervision.external_watch import watch_address
from controlplane.engines.supervision.generation import GenerationRunner
from controlplane.engines.supervision.probe import get, metric
from controlplane.engines.supervision.process import LogFile
from controlplane.engines.supervision.status import EngineStatus, StatusBoard, StructuredLog
from controlplane.errors import EngineStartError
from controlplane.paths import run_dir

__all__ = ["EngineStatus", "EngineSupervisor", "StructuredLog", "log_path"]

_DRAIN_POLL_S = 0.2
_DRAIN_SETTLED_S = 1.0
"""An engine's gauges lag: it counts as idle after it looked idle for so long."""
_ENDED = frozenset({EndpointState.READY, EndpointState.FAILED, EndpointState.STOPPED})


class EngineSupervisor:
    """One tier replica's engine, from its start to its end."""

    def __init__(
        self,
        tier: TierConfig,
        *,
        replica_id: str,
        host: str = "127.0.0.1",
        gpu_ids: tuple[str, ...] = (),
        resolve_model: Callable[[str, Callable[[str], None]], str],
        on_change: Callable[[EngineStatus], None],
        log: StructuredLog,
    ) -> None:
        self.tier = tier
        self.replica_id = replica_id
        self._host = host
        self._gpu_ids = gpu_ids
        self._resolve_model = resolve_model
        self._log = log
        self._engine = engine_for(tier)
        self._policy = RestartPolicy(
            max_restarts=tier.restart.max_restarts,
            window_s=tier.restart.window_s,
            backoff_initial_s=tier.restart.backoff_initial_s,
            backoff_max_s=tier.restart.backoff_max_s,
        )
        self._board = StatusBoard(on_change, log)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wishes: CommandInbox | None = None
        self._calling = threading.Lock()
        """Held where the loop is called or declared gone."""
        self._runner: GenerationRunner | None = None
        self._draining: asyncio.Task[None] | None = None
        self._was_ready = False

    # For any thread.

    @property
    def status(self) -> EngineStatus:
        """The engine's state now."""
        return self._board.status

    @property
    def output(self) -> tuple[str, ...]:
        """The last lines of the engine's output, without its secret."""
        runner = self._runner
        return runner.output.lines if runner is not None and runner.output is not None else ()

    def start(self) -> None:
        """Begin; returns once the supervisor's thread runs, long before the engine is ready.

        Raises SetupError if the folder for logs can't be made.
        """
        if self._thread is not None:
            raise RuntimeError("the supervisor was started before")
        running: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._thread_main, args=(running,), name=f"engine-{self.replica_id}", daemon=True
        )
        self._thread.start()
        running.result()

    def wait_ready(self, timeout_s: float) -> EngineStatus:
        """Wait until the engine is ready.

        Raises EngineStartError with the diagnosis when it was given up or stopped, and with what it is
        doing when ``timeout_s`` is over.
        """
        status = self._board.wait_for(_ENDED, timeout_s)
        if status.state is EndpointState.READY:
            return status
        if status.state in _ENDED:
            why = status.diagnosis or "it was stopped"
            raise EngineStartError(f"tier '{self.tier.name}' can't be served: {why}")
        before = f"; before: {status.diagnosis}" if status.diagnosis else ""
        raise EngineStartError(
            f"tier '{self.tier.name}' is not ready after {timeout_s:g} s, it is still at: "
            f"{status.phase or status.state.value}{before}"
        )

    def restart(self, reason: str) -> None:
        """Replace the engine process; starts one that was given up anew. Not while it drains."""
        if self._wishes is not None:
            self._call(self._wishes.restart, reason)

    def drain(self, timeout_s: float, still_running: Callable[[], int] | None = None) -> bool:
        """Wait until the engine runs nothing, then :meth:`stop`; whether it got idle in ``timeout_s``.

        The state is DRAINING meanwhile, so that nothing new is sent. Idle is what the engine's own metrics
        say and, if given, ``still_running``, the caller's count of requests (called in another thread).
        """
        idle: Future[bool] = Future()
        thread = self._thread
        if thread is None or not self._call(self._begin_drain, timeout_s, still_running, idle):
            idle.set_result(True)
        try:
            while True:
                try:
                    return idle.result(timeout=1.0)
                except TimeoutError:
                    # The loop may have ended between the call and its turn.
                    if thread is not None and not thread.is_alive():
                        return False
        except CancelledError:
            return False  # The engine was lost meanwhile.
        finally:
            self.stop()

    def stop(self) -> None:
        """End the engine with every process of it, then the supervisor's thread; returns when all is gone."""
        if self._thread is None:
            self._board.publish(EndpointState.STOPPED)
            return
        if self._wishes is not None:
            self._call(self._wishes.stop)
        self._thread.join()

    def _call(self, wish: Callable[..., None], *values: object) -> bool:
        """Have the loop do it; False if the loop has ended."""
        with self._calling:
            if self._loop is None:
                return False
            self._loop.call_soon_threadsafe(wish, *values)
            return True

    # In the supervisor's thread.

    def _thread_main(self, running: Future[None]) -> None:
        try:
            # Not the process's own kind of loop: this one is known to work with pipes in any thread.
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self._main(running))
        except Exception as error:
            if not running.done():
                running.set_exception(error)
                return
            self._log.warning("supervisor failed", replica=self.replica_id, error=repr(error))
            self._board.publish(EndpointState.FAILED, diagnosis=f"the supervisor failed: {error!r}")

    async def _main(self, running: Future[None]) -> None:
        self._wishes = CommandInbox()
        try:
            await self._serve(running)
        finally:
            with self._calling:
                self._loop = None
            if self._draining is not None:
                self._draining.cancel()
        self._board.publish(EndpointState.STOPPED, phase="", pid=None)

    async def _serve(self, running: Future[None]) -> None:
        assert self._wishes is not None
        if not self._engine.has_process:
            self._loop = asyncio.get_running_loop()
            running.set_result(None)
            await watch_address(self.tier, self._engine, self._board, self._wishes)
        else:
            log_file = LogFile(log_path(self.tier.name, self.replica_id))
            try:
                self._loop = asyncio.get_running_loop()
                running.set_result(None)
                await self._supervise(log_file)
            finally:
                log_file.close()

    async def _supervise(self, log_file: LogFile) -> None:
        """One generation after the other, until the wish to stop."""
        assert self._wishes is not None
        wishes = self._wishes
        self._runner = GenerationRunner(
            tier=self.tier,
            replica_id=self.replica_id,
            engine=self._engine,
            host=self._host,
            gpu_ids=self._gpu_ids,
            resolve_model=self._resolve_model,
            board=self._board,
            wishes=wishes,
            log=self._log,
            log_file=log_file,
        )
        restarted_s: list[float] = []
        while True:
            end = await self._runner.run()
            self._was_ready |= end.was_ready
            if end.wish is SupervisorCommand.STOP or wishes.draining:
                return
            if end.wish is SupervisorCommand.RESTART:
                self._restarting(end.diagnosis, 0.0, "asked to")
                continue
            now_s = time.monotonic()
            # What was ready once is not ruled out by its settings.
            permanent = end.diagnosis.permanent and not end.was_ready
            decision = decide_restart(self._policy, restarted_s, now_s, permanent=permanent)
            if decision.restart:
                restarted_s.append(now_s + decision.delay_s)
                self._restarting(end.diagnosis, decision.delay_s, decision.reason)
                wish = await wishes.wait(decision.delay_s)
            else:
                self._give_up(end.diagnosis, decision.reason)
                wish = await wishes.wait(None)
                restarted_s.clear()
                if wish is SupervisorCommand.RESTART:
                    self._restarting(end.diagnosis, 0.0, wishes.reason)
            if wish is SupervisorCommand.STOP:
                return

    def _restarting(self, diagnosis: Diagnosis, delay_s: float, reason: str) -> None:
        self._log.warning(
            "engine restarts",
            replica=self.replica_id,
            diagnosis=diagnosis.summary,
            reason=reason,
            delay_s=delay_s,
        )
        self._board.publish(
            EndpointState.RESTARTING if self._was_ready else EndpointState.STARTING,
            phase=f"starting again in {delay_s:g} s" if delay_s else "starting again",
            diagnosis=diagnosis.summary,
            restarts=self._board.status.restarts + 1,
            pid=None,
            port=None,
            base_url="",
            secret="",
        )

    def _give_up(self, diagnosis: Diagnosis, reason: str) -> None:
        text = f"{diagnosis.summary} ({reason})"
        self._log.warning(
            "engine given up",
            replica=self.replica_id,
            diagnosis=text,
            last_lines=list(diagnosis.last_lines[-5:]),
        )
        self._board.publish(
            EndpointState.FAILED, phase="", diagnosis=text, pid=None, port=None, base_url="", secret=""
        )

    def _begin_drain(
        self, timeout_s: float, still_running: Callable[[], int] | None, idle: Future[bool]
    ) -> None:
        async def work() -> None:
            try:
                idle.set_result(await self._drain(timeout_s, still_running))
            except asyncio.CancelledError:
                idle.cancel()
            except Exception as error:
                idle.set_exception(error)

        self._draining = asyncio.get_running_loop().create_task(work())

    async def _drain(self, timeout_s: float, still_running: Callable[[], int] | None) -> bool:
        loop = asyncio.get_running_loop()
        assert self._wishes is not None
        if self._board.state in (EndpointState.FAILED, EndpointState.STOPPED):
            return True
        self._wishes.draining = True
        self._board.publish(EndpointState.DRAINING, phase="finishing what runs")
        # The caller's zero needs no waiting for lagging gauges.
        settled_s = 0.0 if still_running else _DRAIN_SETTLED_S
        deadline_s = time.monotonic() + timeout_s
        idle_since_s: float | None = None
        tokens: float | None = None
        while True:
            callers = await loop.run_in_executor(None, still_running) if still_running else 0
            busy, tokens_now = await self._load()
            now_s = time.monotonic()
            if callers or busy or tokens_now != tokens:
                idle_since_s = None
            if not callers and not busy:
                idle_since_s = now_s if idle_since_s is None else idle_since_s
                if tokens_now is None or now_s - idle_since_s >= settled_s:
                    return True
            tokens = tokens_now
            if now_s + _DRAIN_POLL_S > deadline_s:
                return False
            await asyncio.sleep(_DRAIN_POLL_S)

    async def _load(self) -> tuple[float, float | None]:
        """Requests running and waiting, and the token counter; 0 and None from an engine that can't say."""
        status = self._board.status
        if not (self._engine.metrics_path and status.base_url):
            return 0.0, None
        answer = await get(status.base_url + self._engine.metrics_path, status.secret, 2.0)
        if not answer.ok:
            return 0.0, None
        names = self._engine.metric_names
        running = metric(answer.body, names.running) or 0.0
        waiting = metric(answer.body, names.waiting) or 0.0
        return running + waiting, metric(answer.body, names.generation_tokens_total) or 0.0


def log_path(tier: str, replica_id: str) -> Path:
    """Where an engine's whole output is written."""
    return run_dir() / "logs" / f"{tier}-{replica_id}.log"
