"""Runs one engine process, from resolving its model until the process has stopped."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from socket import socket

from controlplane.config import TierConfig
from controlplane.core.domain.endpoint import EndpointState
from controlplane.engines.base import Command, Diagnosis, Engine, Launch
from controlplane.engines.supervision.commands import CommandInbox, SupervisorCommand
from controlplane.engines.supervision.process import (
    GRACE_S,
    EngineOutput,
    EngineProcess,
    LogFile,
    reserve_port,
    start,
)
from controlplane.engines.supervision.status import StatusBoard, StructuredLog
from controlplane.errors import ConfigError, EngineError, EngineStartError, SetupError
from controlplane.http.fetch import Page, fetch

_PROBE_FIRST_S = 0.05
_PROBE_LONGEST_S = 0.5
"""Time between two probes of a starting engine; grows from the first value to the longest."""
_STARTING_PROBE_S = 2.0
_PORT_TRIES = 10
_HUNG_GRACE_S = 2.0
"""How long a hung engine may take to exit after SIGTERM."""


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """Why a generation ended: by a ``command``, or without one because the process exited or hung."""

    diagnosis: Diagnosis
    was_ready: bool = False
    command: SupervisorCommand | None = None
    grace_s: float = GRACE_S
    """How long its process may take to exit after SIGTERM."""


@dataclass(slots=True)
class GenerationRunner:
    """Starts and watches one engine process after another, in the supervisor's event loop."""

    tier: TierConfig
    replica_id: str
    engine: Engine
    host: str
    gpu_ids: tuple[str, ...]
    cores: int
    resolve_model: Callable[[str, Callable[[str], None]], str]
    board: StatusBoard
    inbox: CommandInbox
    log: StructuredLog
    log_file: LogFile
    _model: str = ""

    async def run(self) -> GenerationEnd:
        """Run one generation to its end. If another process takes its port, it starts again on another
        port."""
        end = GenerationEnd(Diagnosis("there is no free port"))
        for _ in range(_PORT_TRIES):
            self.inbox.clear_restart()
            try:
                end = await self._run_once()
            except (ConfigError, SetupError, EngineStartError) as error:
                return GenerationEnd(Diagnosis(str(error), permanent=True))
            except OSError as error:
                return GenerationEnd(Diagnosis(f"the engine's process can't be started: {error}"))
            if end.was_ready or end.command or not end.diagnosis.port_taken:
                break
            self.log.info("port taken", replica=self.replica_id, port=self.board.status.port)
        return end

    async def _run_once(self) -> GenerationEnd:
        if not self._model:
            try:
                self._model = await self._resolve()
            except (ConfigError, SetupError, EngineStartError):
                raise
            except EngineError as error:
                return GenerationEnd(Diagnosis(str(error)))
            except Exception as error:
                return GenerationEnd(Diagnosis(f"the model '{self.tier.model}' can't be downloaded: {error}"))
        if self.inbox.pending is SupervisorCommand.STOP:
            return GenerationEnd(Diagnosis("stopped"), command=SupervisorCommand.STOP)
        secret = secrets.token_urlsafe(32)
        with reserve_port(self.host) as reserved:
            port = int(reserved.getsockname()[1])
            launch = Launch(self.host, port, secret, self._model, self.gpu_ids, self.cores)
            command = self.engine.command(self.tier, launch)
            process = await self._start(command, launch)
            end = GenerationEnd(Diagnosis("the supervisor failed"))
            try:
                end = await self._watch(process, reserved)
                self._announce(end)
                return end
            finally:
                await process.stop(end.grace_s)

    async def _resolve(self) -> str:
        """Resolve the model, and wait until it may start on this node; "" after a stop command.

        A download shows as a phase. It runs in a separate thread instead of the loop's executor, because it
        can't be interrupted and the loop would wait for its executor when it ends.
        """
        loop = asyncio.get_running_loop()
        found: asyncio.Future[str] = loop.create_future()
        self.board.publish(phase="looking for the model")

        def progress(text: str) -> None:
            loop.call_soon_threadsafe(self._phase, text)

        def deliver(result: str | BaseException) -> None:
            if found.done():
                return
            if isinstance(result, str):
                found.set_result(result)
            else:
                found.set_exception(result)

        def work() -> None:
            result: str | BaseException
            try:
                result = self.resolve_model(self.tier.model, progress)
            except Exception as error:
                result = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(deliver, result)

        threading.Thread(target=work, name=f"model-{self.replica_id}", daemon=True).start()
        ended = asyncio.Event()
        found.add_done_callback(lambda _: ended.set())
        while not ended.is_set():
            if await self.inbox.wait(None, ended) is SupervisorCommand.STOP:
                return ""
            self.inbox.clear_restart()
        return found.result()

    async def _start(self, command: Command, launch: Launch) -> EngineProcess:
        output = EngineOutput(launch.secret, self.log_file, self._line)
        marker = f"{self.tier.name}/{self.replica_id}/{secrets.token_hex(8)}"
        generation = self.board.status.generation + 1
        host = f"[{launch.host}]" if ":" in launch.host else launch.host
        self.board.publish(
            phase="starting the process",
            generation=generation,
            base_url=f"http://{host}:{launch.port}",
            port=launch.port,
            secret=launch.secret,
            started_unix_s=time.time(),
        )
        process = await start(command, output, marker)
        self.log.info(
            "engine started",
            replica=self.replica_id,
            port=launch.port,
            generation=generation,
            cores=launch.cores or None,
        )
        return process

    async def _watch(self, process: EngineProcess, reserved: socket) -> GenerationEnd:
        """Watches the started process until it exits, hangs, or a command stops it."""
        tier = self.tier
        url = self.board.status.base_url + self.engine.ready_path
        ready = False
        failures = 0
        wait_s = _PROBE_FIRST_S
        deadline_s = time.monotonic() + tier.startup_timeout_s
        while True:
            command = await self.inbox.wait(wait_s, process.ended)
            self.board.publish(pid=process.pid)
            if command is not None:
                reason = "stopped" if command is SupervisorCommand.STOP else self.inbox.reason
                return GenerationEnd(Diagnosis(reason), ready, command)
            if process.ended.is_set():
                lines = process.output.lines
                return GenerationEnd(self.engine.diagnose(lines, process.exit_code), ready)
            response = await self._probe(url, process, ready=ready)
            if response.ok and not ready:
                # A healthy engine may not serve yet, and another server may have taken the port: only ours
                # accepts the secret.
                response = await self._probe(f"{self.board.status.base_url}/v1/models", process, ready=False)
            if response.ok:
                failures = 0
                wait_s = tier.health_interval_s
                if not ready:
                    ready = True
                    reserved.close()
                    self._became_ready(process)
            elif process.ended.is_set():
                continue
            elif ready:
                failures += 1
                self.log.info("probe failed", replica=self.replica_id, error=str(response), times=failures)
                if failures >= tier.health_failures:
                    text = f"the engine hung: {failures} health probes in a row failed, the last: {response}"
                    lines = process.output.lines[-20:]
                    return GenerationEnd(Diagnosis(text, last_lines=lines), True, grace_s=_HUNG_GRACE_S)
            else:
                wait_s = min(wait_s * 1.5, _PROBE_LONGEST_S)
                if time.monotonic() > deadline_s:
                    return GenerationEnd(self._startup_timeout(process, response), grace_s=_HUNG_GRACE_S)

    def _announce(self, end: GenerationEnd) -> None:
        """Publishes that the engine no longer serves, before its process is stopped, which may take
        seconds."""
        if end.command is SupervisorCommand.STOP:
            self.board.publish(EndpointState.DRAINING, phase="stopping")
        elif end.was_ready:
            self.board.publish(
                None if self.inbox.draining else EndpointState.RESTARTING,
                phase="ending the old process",
                diagnosis=end.diagnosis.summary,
            )

    async def _probe(self, url: str, process: EngineProcess, *, ready: bool) -> Page:
        """A GET that is abandoned when the process ends."""
        timeout_s = self.tier.health_timeout_s
        if not ready:
            timeout_s = min(timeout_s, _STARTING_PROBE_S)
        probing = asyncio.ensure_future(fetch(url, secret=self.board.status.secret, timeout_s=timeout_s))
        ending = asyncio.ensure_future(process.ended.wait())
        await asyncio.wait({probing, ending}, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if probing.done():
            return probing.result()
        probing.cancel()
        return Page(0, error="the process ended")

    def _startup_timeout(self, process: EngineProcess, last: Page) -> Diagnosis:
        return Diagnosis(
            f"not ready after {self.tier.startup_timeout_s:g} s (startup_timeout_s); the last phase was: "
            f"{self.board.status.phase}; the last probe: {last}",
            last_lines=process.output.lines[-20:],
        )

    def _became_ready(self, process: EngineProcess) -> None:
        status = self.board.status
        took_s = round(time.time() - status.started_unix_s, 2)
        state = EndpointState.DRAINING if self.inbox.draining else EndpointState.READY
        self.board.publish(state, phase="", diagnosis="", pid=process.pid)
        self.log.info("engine ready", replica=self.replica_id, generation=status.generation, took_s=took_s)

    def _line(self, line: str) -> None:
        if self.board.status.state in (EndpointState.STARTING, EndpointState.RESTARTING):
            phase = self.engine.phase(line)
            if phase:
                self._phase(phase)

    def _phase(self, phase: str) -> None:
        self.board.publish(phase=phase)
