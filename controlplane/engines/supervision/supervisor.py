"""Runs one engine: starts it, waits until it is ready, watches it, restarts it, stops it.

Threads: an :class:`EngineSupervisor` has a thread with an event loop, which owns all of its state and forks
the engine (the kernel ends the engine if that thread dies). The public methods may be called from any other
thread; they pass a command to the loop and wait. ``status`` is an immutable value that is replaced as a
whole. ``on_change`` is called in the supervisor's thread: it must be quick and must not call the supervisor.
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
from controlplane.engines.metrics_scraper import metric_sum
from controlplane.engines.supervision.commands import CommandInbox, SupervisorCommand
from controlplane.engines.supervision.external_watch import watch_address
from controlplane.engines.supervision.generation import GenerationRunner
from controlplane.engines.supervision.process import LogFile
from controlplane.engines.supervision.status import EngineStatus, StatusBoard, StructuredLog
from controlplane.errors import EngineStartError
from controlplane.http.fetch import fetch
from controlplane.paths import run_dir

_DRAIN_POLL_S = 0.2
_METRICS_TIMEOUT_S = 2.0
_DRAIN_SETTLED_S = 1.0
"""An engine's gauges lag behind, so it counts as idle once they have shown no requests for this long."""
_SETTLED = frozenset({EndpointState.READY, EndpointState.FAILED, EndpointState.STOPPED})


class EngineSupervisor:
    """Supervises the engine of one tier replica, from start to stop."""

    def __init__(
        self,
        tier: TierConfig,
        *,
        replica_id: str,
        host: str = "127.0.0.1",
        gpu_ids: tuple[str, ...] = (),
        cores: int = 0,
        resolve_model: Callable[[str, Callable[[str], None]], str],
        on_change: Callable[[EngineStatus], None],
        log: StructuredLog,
    ) -> None:
        self.tier = tier
        self.replica_id = replica_id
        self._host = host
        self._gpu_ids = gpu_ids
        self._cores = cores
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
        self._inbox: CommandInbox | None = None
        self._loop_lock = threading.Lock()
        """Held while calling the loop, and while recording that it has ended."""
        self._draining: asyncio.Task[None] | None = None
        self._was_ready = False

    # For any thread.

    @property
    def status(self) -> EngineStatus:
        """The engine's latest status."""
        return self._board.status

    def start(self) -> None:
        """Start the supervisor's thread; returns long before the engine is ready.

        Raises SetupError if the folder for logs can't be created.
        """
        if self._thread is not None:
            raise RuntimeError("the supervisor has already been started")
        running: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._thread_main, args=(running,), name=f"engine-{self.replica_id}", daemon=True
        )
        self._thread.start()
        running.result()

    def wait_ready(self, timeout_s: float) -> EngineStatus:
        """Wait until the engine is ready.

        Raises EngineStartError: with the diagnosis if the engine was given up or stopped, with its phase if
        it is not ready after ``timeout_s``.
        """
        status = self._board.wait_for(_SETTLED, timeout_s)
        if status.state is EndpointState.READY:
            return status
        if status.state in _SETTLED:
            reason = status.diagnosis or "it was stopped"
            raise EngineStartError(f"tier '{self.tier.name}' can't be served: {reason}")
        earlier = f"; the previous attempt failed: {status.diagnosis}" if status.diagnosis else ""
        raise EngineStartError(
            f"tier '{self.tier.name}' is not ready after {timeout_s:g} s; its phase is: "
            f"{status.phase or status.state.value}{earlier}"
        )

    def restart(self, reason: str) -> None:
        """Replace the engine process, or start an engine again that was given up. Ignored while it drains."""
        if self._inbox is not None:
            self._call(self._inbox.restart, reason)

    def drain(self, timeout_s: float, still_running: Callable[[], int] | None = None) -> bool:
        """Wait up to ``timeout_s`` until the engine is idle, then :meth:`stop`; returns whether it became
        idle.

        Meanwhile the state is DRAINING, so that no new requests are sent. Idle means that the engine's
        metrics, and ``still_running`` if given, show no requests. ``still_running`` is the caller's own count
        of requests; it is called in another thread.
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
                    # The loop may have ended before it ran the call.
                    if thread is not None and not thread.is_alive():
                        return False
        except CancelledError:
            return False  # The engine failed meanwhile.
        finally:
            self.stop()

    def stop(self) -> None:
        """Stops all processes of the engine, then the supervisor's thread; returns when all have stopped."""
        if self._thread is None:
            self._board.publish(EndpointState.STOPPED)
            return
        if self._inbox is not None:
            self._call(self._inbox.stop)
        self._thread.join()

    def _call(self, function: Callable[..., None], *values: object) -> bool:
        """Have the loop call ``function``; False if the loop has ended."""
        with self._loop_lock:
            if self._loop is None:
                return False
            self._loop.call_soon_threadsafe(function, *values)
            return True

    # In the supervisor's thread.

    def _thread_main(self, running: Future[None]) -> None:
        try:
            # Not the process's default event loop: this one supports pipes in any thread.
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self._main(running))
        except Exception as error:
            if not running.done():
                running.set_exception(error)
                return
            self._log.warning("supervisor failed", replica=self.replica_id, error=repr(error))
            self._board.publish(EndpointState.FAILED, diagnosis=f"the supervisor failed: {error!r}")

    async def _main(self, running: Future[None]) -> None:
        self._inbox = CommandInbox()
        try:
            await self._serve(running)
        finally:
            with self._loop_lock:
                self._loop = None
            if self._draining is not None:
                self._draining.cancel()
        self._board.publish(EndpointState.STOPPED, phase="", pid=None)

    async def _serve(self, running: Future[None]) -> None:
        assert self._inbox is not None
        if not self._engine.has_process:
            self._loop = asyncio.get_running_loop()
            running.set_result(None)
            await watch_address(self.tier, self._engine, self._board, self._inbox)
        else:
            log_file = LogFile(log_path(self.tier.name, self.replica_id))
            try:
                self._loop = asyncio.get_running_loop()
                running.set_result(None)
                await self._supervise(log_file)
            finally:
                log_file.close()

    async def _supervise(self, log_file: LogFile) -> None:
        """Run one generation after another until the stop command."""
        assert self._inbox is not None
        inbox = self._inbox
        runner = GenerationRunner(
            tier=self.tier,
            replica_id=self.replica_id,
            engine=self._engine,
            host=self._host,
            gpu_ids=self._gpu_ids,
            cores=self._cores,
            resolve_model=self._resolve_model,
            board=self._board,
            inbox=inbox,
            log=self._log,
            log_file=log_file,
        )
        restarted_s: list[float] = []
        while True:
            end = await runner.run()
            self._was_ready |= end.was_ready
            if end.command is SupervisorCommand.STOP or inbox.draining:
                return
            if end.command is SupervisorCommand.RESTART:
                self._restarting(end.diagnosis, 0.0, "requested")
                continue
            now_s = time.monotonic()
            # If the engine was ready once, its settings can't be the cause.
            permanent = end.diagnosis.permanent and not end.was_ready
            decision = decide_restart(self._policy, restarted_s, now_s, permanent=permanent)
            if decision.restart:
                restarted_s.append(now_s + decision.delay_s)
                self._restarting(end.diagnosis, decision.delay_s, decision.reason)
                command = await inbox.wait(decision.delay_s)
            else:
                self._give_up(end.diagnosis, decision.reason)
                command = await inbox.wait(None)
                restarted_s.clear()
                if command is SupervisorCommand.RESTART:
                    self._restarting(end.diagnosis, 0.0, inbox.reason)
            if command is SupervisorCommand.STOP:
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
        assert self._inbox is not None
        if self._board.status.state in (EndpointState.FAILED, EndpointState.STOPPED):
            return True
        self._inbox.draining = True
        self._board.publish(EndpointState.DRAINING, phase="finishing running requests")
        # The caller's own count does not lag behind the engine.
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
        """Requests running and waiting, and the token counter; 0 and None if the engine has no metrics."""
        status = self._board.status
        if not (self._engine.metrics_path and status.base_url):
            return 0.0, None
        url = status.base_url + self._engine.metrics_path
        page = await fetch(url, secret=status.secret, timeout_s=_METRICS_TIMEOUT_S)
        if not page.ok:
            return 0.0, None
        names = self._engine.metric_names
        running = metric_sum(page.text, names.running) or 0.0
        waiting = metric_sum(page.text, names.waiting) or 0.0
        return running + waiting, metric_sum(page.text, names.generation_tokens_total) or 0.0


def log_path(tier: str, replica_id: str) -> Path:
    """The file to which an engine's output is written."""
    return run_dir() / "logs" / f"{tier}-{replica_id}.log"
