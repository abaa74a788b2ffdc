"""One gateway replica: its routes, its life cycle, and its state from the last snapshot.

The same handlers serve requests on Serve's ingress (:attr:`Gateway.app`) and on the gateway's own port
(:meth:`Gateway.start`); all of it runs in one event loop. Nothing on a request's path calls Ray, the
controller or a disk. A request for an engine goes through :mod:`controlplane.gateway.proxy`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from dataclasses import asdict
from time import monotonic
from typing import TYPE_CHECKING, Final

import structlog

from controlplane.config import PlaneConfig
from controlplane.core.access.keys import KeyTable
from controlplane.core.access.principal import ANONYMOUS
from controlplane.core.access.roles import Permission
from controlplane.core.admission.queue import AdmissionQueue, AdmissionSettings
from controlplane.core.cluster.snapshot import ClusterSnapshot, GatewayInfo, merge
from controlplane.core.domain.endpoint import Endpoint
from controlplane.core.domain.request import RequestOutcome
from controlplane.core.recommendations.views import as_json_value
from controlplane.core.routing.dispatcher import Dispatcher
from controlplane.core.routing.endpoint_table import EndpointTable, LoadSettings
from controlplane.core.routing.tier_table import Api
from controlplane.engines.context import context_tokens
from controlplane.errors import EngineRefused, Forbidden, RequestError, UnknownRoute, WrongMethod, shown
from controlplane.gateway.access.authentication import Authenticator, challenge
from controlplane.gateway.api import agents, operator_queries, pages, report_page, responses, ui
from controlplane.gateway.api.alert_page import alerts
from controlplane.gateway.api.controller_queries import ControllerQueries, query_controller
from controlplane.gateway.api.openapi import GatewayRoute, document
from controlplane.gateway.proxy.attempts import Attempts
from controlplane.gateway.proxy.connections import ConnectionTable
from controlplane.gateway.proxy.dispatch import RequestDispatch
from controlplane.gateway.proxy.relay import Relay
from controlplane.gateway.proxy.responses import error_event, response_headers
from controlplane.gateway.proxy.timeouts import SWEEP_S, AttemptTimeouts, TimeoutWatcher
from controlplane.gateway.request_context import APIS, MAX_REQUEST_ID, RequestContext
from controlplane.gateway.telemetry.accounting import UsageLedger
from controlplane.gateway.telemetry.metrics import Metrics, merge_expositions
from controlplane.gateway.telemetry.request_log import RequestLog
from controlplane.gateway.telemetry.traffic import TrafficCounter
from controlplane.http.access import AccessRules, is_loopback
from controlplane.http.asgi import AsgiApp
from controlplane.http.intake import IntakeSettings
from controlplane.http.limits import ReceivingBudget
from controlplane.http.messages import Request, Responder, send_error, send_json
from controlplane.http.server import HttpServer
from controlplane.http.tls import ServerTls

if TYPE_CHECKING:
    from controlplane.gateway.telemetry.tracing import Tracing

_REQUEST_ID: Final = re.compile(rf"^[A-Za-z0-9._:-]{{1,{MAX_REQUEST_ID}}}$")
CLIENT_CLOSED_REQUEST: Final = 499
ENGINE_REFUSED: Final = "engine_refused"
BODY_LIMIT_SETTING: Final = "gateway.max_body_bytes"
EVERY_ADDRESS: Final = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 (recognised, not bound)

log = structlog.stdlib.get_logger(__name__)

ONE_MODEL: Final = "/v1/models/{id}"
_MODELS: Final = "/v1/models/"
METRICS: Final = "/metrics"
_SUMMARIES: Final = {
    "/v1/chat/completions": "OpenAI's chat completions",
    "/v1/completions": "OpenAI's completions",
    "/v1/responses": "OpenAI's responses",
    "/v1/messages": "Anthropic's messages",
    "/v1/messages/count_tokens": "how many tokens a prompt of Anthropic's messages has",
    "/v1/embeddings": "OpenAI's embeddings",
}
"""What :data:`APIS` are, which are relayed to an engine."""


class Gateway:
    """Serves requests according to the latest snapshot applied. Create it inside a running event loop."""

    def __init__(self, config: PlaneConfig, gateway_id: str) -> None:
        self.config = config
        self.gateway_id = gateway_id
        self.loop = asyncio.get_running_loop()
        self.started_unix_s = time.time()
        self.snapshot: ClusterSnapshot | None = None
        self.controller: ControllerQueries | None = None
        """For pages whose data only the controller has; never used for inference."""
        settings = config.gateway
        tier_table = config.route_table()
        slos = {tier.name: tier.slo.slo() for tier in config.tiers}
        self.traffic = TrafficCounter(tier_table, slos)
        self.metrics = Metrics(self.traffic)
        self.request_log = RequestLog([policy.name for policy in tier_table.policies])
        self.metrics.request_log = self.request_log
        self.endpoint_table = EndpointTable(
            tier_table, LoadSettings(reserved_ratio=settings.queue.reserved_ratio)
        )
        self.queue = AdmissionQueue(
            AdmissionSettings(
                capacity=settings.queue.capacity,
                age_after_s=settings.queue.age_after_s,
                aged_ratio=settings.queue.aged_ratio,
            )
        )
        self.ledger = UsageLedger([tier.name for tier in config.tiers])
        self._connections = ConnectionTable(config, self.loop)
        timeouts = AttemptTimeouts(
            first_token_s=settings.first_token_timeout_s,
            token_gap_s=settings.token_timeout_s,
            silence_s=settings.silence_timeout_s,
        )
        self._timeouts = TimeoutWatcher(timeouts)
        self._dispatch = RequestDispatch(
            Dispatcher(self.endpoint_table, self.queue),
            self.metrics,
            queue_timeout_s=settings.queue.timeout_s,
        )
        attempts = Attempts(
            settings, self._dispatch, self._connections, self.metrics, self.ledger, self._timeouts
        )
        self._relay = Relay(settings, self._dispatch, attempts, self.metrics)
        self._context_tokens = {tier.name: context_tokens(tier) for tier in config.tiers}
        self._tracing: Tracing | None = None
        self._request_ids = f"{secrets.token_hex(6)}-"
        self._request_count = 0
        self._servers: list[HttpServer] = []
        self._private_url = ""
        self.port = 0
        """The shared port; 0 until :meth:`start` opens it."""
        self._ticker: asyncio.Task[None] | None = None
        self.authenticator = Authenticator() if settings.auth.enabled else None
        """None while no keys are required."""
        key, infer, read = Permission.KEY, Permission.INFER, Permission.READ
        public = Permission.PUBLIC
        self.routes = [
            *(
                GatewayRoute(
                    "POST",
                    path,
                    _SUMMARIES[path],
                    self._responses if api == "responses" else self._infer,
                    infer,
                )
                for path, api in APIS.items()
            ),
            GatewayRoute(
                "GET",
                "/v1/models",
                "auto, the tiers and the models behind them",
                self._models,
                key,
            ),
            GatewayRoute("GET", ONE_MODEL, "one of them", self._model, key),
            GatewayRoute(
                "POST",
                "/v1/route",
                "where a request would go and why; not sent",
                self._explain,
                infer,
            ),
            GatewayRoute("POST", "/chat", "one message, one answer", self._chat, infer),
            GatewayRoute("POST", "/batch", "a list of such messages", self._batch, infer),
            GatewayRoute("GET", "/", "what is here; browsers are sent to /ui", self._root, key),
            GatewayRoute("GET", "/health", "healthy, degraded or unhealthy, by tier", self._health, key),
            GatewayRoute("GET", "/health/live", "200 while the gateway runs", self._live, public),
            GatewayRoute(
                "GET",
                "/health/ready",
                "200 if any endpoint is ready, else 503",
                self._ready,
                public,
            ),
            GatewayRoute("GET", METRICS, "Prometheus metrics of all gateway replicas", self._metrics, read),
            GatewayRoute("GET", "/status", "endpoints and gateways", self._status, read),
            GatewayRoute("GET", "/usage", "tokens and GPU time by tier or session", self._usage, key),
            GatewayRoute("GET", "/alerts", "firing alerts", self._alerts, read),
            GatewayRoute("GET", "/gpus", "each GPU, its health and its holders", self._gpus, read),
            GatewayRoute("GET", "/nodes", "each node: CPUs, memory and disks", self._nodes, read),
            GatewayRoute(
                "GET",
                "/recommendations",
                "targets of tiers, and recommendations",
                self._recommendations,
                read,
            ),
            GatewayRoute("GET", "/report", "a report on a window of time", self._report, read),
            GatewayRoute("GET", "/ui", "the plane in a browser", self._ui, read),
            *(
                GatewayRoute("GET", f"{operator_queries.PREFIX}{name}", summary, self._plane, read)
                for name, summary in operator_queries.SUMMARIES.items()
            ),
            GatewayRoute("GET", "/openapi.json", "this description of the routes", self._openapi, key),
        ]
        """Every route; the documentation and ``/openapi.json`` list them."""
        self._route_of = {route.path: route for route in self.routes}
        receiving = ReceivingBudget(settings.max_receiving_bytes, "gateway.max_receiving_bytes")
        self._intake: IntakeSettings = {
            "max_body_bytes": settings.max_body_bytes,
            "body_limit_setting": BODY_LIMIT_SETTING,
            "access": AccessRules(
                loopback_only=is_loopback(settings.host),
                allowed_hosts=settings.allowed_hosts,
                cors_origins=settings.cors_origins,
            ),
            "receiving": receiving,
            "on_refused": self._on_refused,
        }
        self.app = AsgiApp(self.handle, **self._intake)

    # -- life cycle ------------------------------------------------------------------------------

    async def start(self, host: str, port: int | None, node_address: str = "") -> None:
        """Start the periodic work and, unless ``port`` is None, listen on two ports.

        The gateway replicas of a node share ``port``. A second, private port serves this replica's metrics to
        the other replicas; its URL uses ``node_address`` if ``host`` stands for all addresses of the node.
        Raises OSError if a port can't be opened, and SetupError if a certificate can't be used.
        """
        if self._ticker is None:
            self._ticker = self.loop.create_task(self._tick())
        if port is None:
            return
        settings = self.config.gateway
        tls = await asyncio.to_thread(ServerTls, settings.tls, "gateway.tls") if settings.tls else None
        shared = HttpServer(self.handle, **self._intake, tls=tls)
        self.port = await shared.start(host, port)
        self._servers.append(shared)
        private = HttpServer(self._private, max_body_bytes=1024, access=self._intake["access"])
        private_port = await private.start(host, 0)
        self._servers.append(private)
        address = node_address if host in EVERY_ADDRESS and node_address else host
        self._private_url = f"http://{f'[{address}]' if ':' in address else address}:{private_port}"

    def trace(self, tracing: Tracing) -> None:
        """Trace requests from now on. ``tracing`` is closed with the gateway."""
        self._tracing = tracing
        self.metrics.on_finished = tracing.end

    def apply(self, snapshot: ClusterSnapshot) -> None:
        """Serve according to this snapshot from now on; ignored if it is not newer than the current one."""
        merged = merge(self.snapshot, snapshot)
        if merged is self.snapshot:
            return
        self.snapshot = merged
        self.endpoint_table.apply_snapshot(merged, self.gateway_id)
        self._connections.prune(self.endpoint_table)
        self._dispatch.on_snapshot()

    def needs_keys(self, snapshot: ClusterSnapshot) -> bool:
        """Whether the API keys that belong to this snapshot are others than those in use."""
        version = snapshot.keys_version
        return self.authenticator is not None and version not in ("", self.authenticator.version)

    def apply_keys(self, table: KeyTable) -> None:
        """Accept these API keys from now on."""
        if self.authenticator is not None:
            self.authenticator.apply(table)

    def ready_endpoints(self) -> list[Endpoint]:
        """The endpoints that take requests now."""
        return [load.endpoint for load in self.endpoint_table.by_endpoint_id.values() if load.ready]

    def observe(
        self, endpoint_id: str, generation: int, *, kv_usage_ratio: float | None, waiting: float | None
    ) -> None:
        """Store metrics that an engine process reports itself: the used share of its KV cache, and the number
        of requests in its queue."""
        load = self.endpoint_table.by_endpoint_id.get(endpoint_id)
        if load is not None and load.endpoint.generation == generation:
            load.observe(monotonic(), kv_usage_ratio=kv_usage_ratio, waiting=waiting)

    def info(self) -> GatewayInfo:
        """This replica's state, as reported to the controller."""
        loads = self.endpoint_table.by_endpoint_id.values()
        busy = tuple((load.endpoint.endpoint_id, load.in_flight) for load in loads if load.in_flight)
        return GatewayInfo(
            gateway_id=self.gateway_id,
            node_id="",
            url=self._private_url,
            in_flight=sum(count for _, count in busy),
            queued=len(self.queue),
            in_flight_by_endpoint=busy,
            traffic=self.traffic.read(self.endpoint_table, self.queue),
            seen_unix_s=time.time(),
            ended=self.request_log.batch(),
        )

    async def drain(self, timeout_s: float) -> None:
        """Accept no new connections, wait up to ``timeout_s`` for running requests to end, then close."""
        await asyncio.gather(*(server.drain(timeout_s) for server in self._servers))
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
            self._ticker = None
        self._relay.close()
        self._connections.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = monotonic()
            self._timeouts.sweep(now_s)
            self._dispatch.tick(now_s)

    # -- every request ---------------------------------------------------------------------------

    async def handle(self, request: Request, out: Responder) -> None:
        """Answer any request. Errors become responses; only cancellation is raised."""
        route = self._route_of.get(request.path)
        try:
            if self.authenticator is not None:
                self._authorize(self.authenticator, request, route)
            if route is None:
                route = self._other_route(request.path)
            method = route.method
            if request.method != method and not (method == "GET" and request.method == "HEAD"):
                raise WrongMethod(
                    f"{shown(request.path)} takes {method}, not {shown(request.method)}", method=method
                )
            await route.handle(request, out)
        except RequestError as error:
            headers = [(b"x-request-id", self._request_id(request).encode()), *challenge(error)]
            if isinstance(error, WrongMethod):
                headers.append((b"allow", error.allow.encode()))
            send_error(out, error, headers, request.path)
        except Exception:
            _internal_error(request, out, self._request_id(request))

    def _authorize(self, authenticator: Authenticator, request: Request, route: GatewayRoute | None) -> None:
        """Set who the request comes from. Raises :class:`Unauthorized`, :class:`Forbidden` and
        :class:`KeysUnknown`. For paths that do not exist, any key will do."""
        permission = Permission.KEY if route is None else route.permission
        if permission is Permission.PUBLIC or (
            request.path == METRICS and self.config.gateway.auth.open_metrics
        ):
            return
        principal = authenticator.principal(request.headers)
        if not principal.role.allows(permission):
            raise Forbidden(
                f"a key of role {principal.role} may not use {shown(request.path)}, which needs the "
                f"permission '{permission}'",
                code="insufficient_permission",
            )
        request.principal = principal

    def _other_route(self, path: str) -> GatewayRoute:
        """The route of a path with a variable part. Raises :class:`UnknownRoute`."""
        if path.startswith(_MODELS):
            return self._route_of[ONE_MODEL]
        begin = "/v1/" if path.startswith("/v1/") else "/"
        there = ", ".join(known for known in self._route_of if known.startswith(begin))
        raise UnknownRoute(f"there is no {shown(path)} here. There is: {there}")

    async def _infer(self, request: Request, out: Responder) -> None:
        request_id = self._request_id(request)
        now_s = monotonic()
        if self.authenticator is not None and request.principal is None:
            raise RuntimeError("a request reached an engine's route without having been authorized")
        try:
            context = RequestContext(request, request_id, now_s, self.config.gateway.request_timeout_s)
        except RequestError as error:
            send_error(out, error, [(b"x-request-id", request_id.encode())], request.path)
            self.metrics.requests.labels("", RequestOutcome.CLIENT_ERROR, error.code).inc()
            return
        if self._tracing is not None:
            self._tracing.begin(context, request)
        try:
            await self._relay.serve(context, out)
        except RequestError as error:
            refused = isinstance(error, EngineRefused)
            outcome = RequestOutcome.CLIENT_ERROR if refused else _outcome(error.status)
            reason = ENGINE_REFUSED if refused else error.code  # an engine's own codes are no labels
            self.metrics.finished(context, outcome, reason, monotonic())
            if out.started:
                out.write(error_event(error, context.api))
                out.finish()
            else:
                send_error(out, error, response_headers(context), context.path)
        except asyncio.CancelledError:
            self.metrics.finished(context, RequestOutcome.CANCELLED, str(CLIENT_CLOSED_REQUEST), monotonic())
            raise
        except Exception:
            self.metrics.finished(context, RequestOutcome.FAILED, RequestError.code, monotonic())
            _internal_error(request, out, request_id, context.api)

    async def _responses(self, request: Request, out: Responder) -> None:
        if responses.needs_translation(self.endpoint_table, request):
            await responses.serve_translated(self._infer, request, out)
        else:
            await self._infer(request, out)

    def _on_refused(self, error: RequestError) -> None:
        """Count a request that was refused before it reached a route: too long, too slow, not HTTP …"""
        shed = error.status in {408, 503}
        outcome = RequestOutcome.SHED if shed else RequestOutcome.CLIENT_ERROR
        self.metrics.requests.labels("", outcome, error.code).inc()

    def _request_id(self, request: Request) -> str:
        given = request.header(b"x-request-id")
        if given and _REQUEST_ID.fullmatch(given):
            return given
        self._request_count += 1
        return f"{self._request_ids}{self._request_count:x}"

    # -- routes ----------------------------------------------------------------------------------

    async def _chat(self, request: Request, out: Responder) -> None:
        await agents.chat(self._infer, monotonic, request, out)

    async def _batch(self, request: Request, out: Responder) -> None:
        await agents.batch(self._infer, monotonic, request, out)

    async def _models(self, request: Request, out: Responder) -> None:
        send_json(out, pages.models(self.endpoint_table, int(self.started_unix_s), self._context_tokens))

    async def _model(self, request: Request, out: Responder) -> None:
        name = request.path.removeprefix(_MODELS)
        send_json(out, pages.model(self.endpoint_table, int(self.started_unix_s), self._context_tokens, name))

    async def _root(self, request: Request, out: Responder) -> None:
        if "text/html" in request.header(b"accept"):
            out.send(307, [(b"location", b"ui"), (b"vary", b"accept")], b"")
        else:
            send_json(out, pages.root(), 200, [(b"vary", b"accept")])

    async def _openapi(self, request: Request, out: Responder) -> None:
        send_json(out, document(self.routes))

    async def _explain(self, request: Request, out: Responder) -> None:
        send_json(out, pages.explain(request, self.endpoint_table, monotonic()))

    async def _health(self, request: Request, out: Responder) -> None:
        value = pages.health(self.config, self.endpoint_table, self.queue, self.snapshot, time.time())
        send_json(out, value, 503 if value["status"] == "unhealthy" else 200)

    async def _live(self, request: Request, out: Responder) -> None:
        send_json(out, {"status": "alive"})

    async def _ready(self, request: Request, out: Responder) -> None:
        ready = any(load.ready for load in self.endpoint_table.by_endpoint_id.values())
        send_json(out, {"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def _status(self, request: Request, out: Responder) -> None:
        send_json(out, pages.status(self.config, self.snapshot))

    async def _alerts(self, request: Request, out: Responder) -> None:
        send_json(out, alerts(self.snapshot))

    async def _usage(self, request: Request, out: Responder) -> None:
        send_json(out, pages.usage(self.ledger, request.query, request.principal or ANONYMOUS))

    async def _report(self, request: Request, out: Responder) -> None:
        minutes, form = report_page.parse_query(request.query)
        report = await query_controller(self.controller, lambda controller: controller.plane_report(minutes))
        if form == "html":
            headers = [
                (b"content-type", b"text/html; charset=utf-8"),
                (b"content-security-policy", report_page.CONTENT_SECURITY),
            ]
            # rendering the page of a large plane would block requests for too long
            out.send(200, headers, (await asyncio.to_thread(report_page.page, report)).encode())
        else:
            send_json(out, await asyncio.to_thread(asdict, report))

    async def _gpus(self, request: Request, out: Responder) -> None:
        found = await query_controller(self.controller, lambda controller: controller.gpus())
        send_json(out, {"gpus": [asdict(gpu) for gpu in found]})

    async def _plane(self, request: Request, out: Responder) -> None:
        name = request.path.removeprefix(operator_queries.PREFIX)
        arguments = operator_queries.parse_arguments(name, request.query)
        found = await query_controller(self.controller, lambda controller: controller.query(name, arguments))
        send_json(out, await asyncio.to_thread(operator_queries.json_value, found))

    async def _nodes(self, request: Request, out: Responder) -> None:
        found = await query_controller(self.controller, lambda controller: controller.nodes())
        send_json(out, {"unix_s": time.time(), "nodes": [asdict(node) for node in found]})

    async def _ui(self, request: Request, out: Responder) -> None:
        out.send(200, *ui.page())

    async def _recommendations(self, request: Request, out: Responder) -> None:
        report = await query_controller(self.controller, lambda controller: controller.scaling())
        send_json(out, as_json_value(report))

    async def _metrics(self, request: Request, out: Responder) -> None:
        others = [
            gateway
            for gateway in (self.snapshot.gateways if self.snapshot else ())
            if gateway.gateway_id != self.gateway_id and gateway.url
        ]
        texts = await asyncio.gather(*(pages.fetch_text(f"{gateway.url}/metrics") for gateway in others))
        parts = [(self.gateway_id, self._own_metrics())]
        parts += [(other.gateway_id, text) for other, text in zip(others, texts, strict=True) if text]
        text = merge_expositions(parts)
        out.send(200, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")], text.encode())

    def refresh_metrics(self) -> None:
        """Set the gauges of :attr:`metrics` to their present values."""
        self.metrics.observe(self.endpoint_table, self.queue)
        configured = {tier.name: tier.replicas for tier in self.config.tiers}
        self.metrics.observe_snapshot(self.snapshot, configured)

    def _own_metrics(self) -> str:
        self.refresh_metrics()
        return self.metrics.text()

    async def _private(self, request: Request, out: Responder) -> None:
        """Answer on the private port: this replica's own metrics, for other replicas to merge."""
        if request.path != "/metrics":
            send_error(out, UnknownRoute("only /metrics is here"))
            return
        out.send(200, [(b"content-type", b"text/plain")], self._own_metrics().encode())


def _internal_error(request: Request, out: Responder, request_id: str, api: Api | None = None) -> None:
    """Log the exception that is being handled, and tell the client no more than the request's id; in a stream
    of ``api`` by an event."""
    log.exception("a request could not be handled", path=shown(request.path), request_id=request_id)
    error = RequestError(f"an internal error of the gateway; its log says more about request {request_id}")
    if not out.started:
        send_error(out, error, [(b"x-request-id", request_id.encode())], request.path)
    elif api is None:
        out.abort()
    else:
        out.write(error_event(error, api))
        out.finish()


def _outcome(status: int) -> RequestOutcome:
    if status in {408, 429}:
        return RequestOutcome.SHED
    return RequestOutcome.CLIENT_ERROR if status < 500 else RequestOutcome.FAILED
