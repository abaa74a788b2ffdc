"""The part of a Serve config file around tierplane's own settings.

Serve ignores unknown keys; here they are errors, because with a misspelt ``http_options`` Serve would
silently listen on another port. Values of type ``Any`` are checked with Serve's own schema, see
``controlplane/cli/checking/serve_schema.py``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from controlplane.config.addresses import ListeningHost
from controlplane.config.plane import Port
from controlplane.config.strict import ConfigFinding, FindingsError, Strict


def _route_prefix(value: str) -> str:
    if not value.startswith("/") or (value != "/" and value.endswith("/")) or set(value) & set("{} ?#"):
        message = "must begin with '/' and not end with one, without braces, blanks, '?' and '#'"
        raise FindingsError([ConfigFinding((), message, "write '/' or a path such as '/models'")])
    return value


class HttpOptions(Strict):
    """Serve's ingress, with Serve's defaults."""

    host: ListeningHost = "0.0.0.0"  # noqa: S104 - Serve's default; the files in configs/ set 127.0.0.1
    port: Port = 8000
    root_path: Any = ""
    request_timeout_s: Any = None
    keep_alive_timeout_s: Any = None
    ssl_keyfile: Any = None
    ssl_certfile: Any = None
    ssl_keyfile_password: Any = None
    ssl_ca_certs: Any = None


class ServeSettings(Strict):
    """The top level of a Serve config file."""

    applications: Annotated[list[Any], Field(min_length=1)]
    """The applications to run, one of them tierplane's."""
    proxy_location: Literal["Disabled", "HeadOnly", "EveryNode"] = "EveryNode"
    http_options: HttpOptions = HttpOptions()
    grpc_options: Any = None
    controller_options: Any = None
    logging_config: Any = None
    tracing_config: Any = None
    target_capacity: Any = None


class ServeApplication(Strict):
    """One application of a Serve config file."""

    import_path: str
    """deployments.app:build for tierplane's application."""
    args: Any
    """tierplane's settings: tiers, gateway, controller."""
    name: Annotated[str, Field(min_length=1)] = "default"
    route_prefix: Annotated[str, AfterValidator(_route_prefix)] | None = "/"
    runtime_env: Any = None
    host: Any = None
    port: Any = None
    deployments: Any = None
    autoscaling_policy: Any = None
    logging_config: Any = None
    external_scaler_enabled: Any = False
