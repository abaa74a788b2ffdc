"""Settings of who may use the gateway, and how much of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from controlplane.config.addresses import CertificatePath, EnvName, ListeningHost
from controlplane.config.strict import ConfigFinding, Strict


class TlsConfig(Strict):
    """A port's certificate. Its files are read again within some seconds when they change."""

    cert_file: CertificatePath
    """The server's certificate as PEM, followed by those of its issuers except the root; on every node that
    runs a gateway."""
    key_file: CertificatePath
    """Its private key as PEM, without a password."""
    client_ca_file: CertificatePath | None = None
    """Clients must have a certificate of one of the authorities in this PEM file (mTLS)."""
    require_client_cert: bool = True
    """With ``client_ca_file``: refuse clients without a certificate. With ``false``, a client may have none,
    but none of another authority."""

    def findings(self) -> list[ConfigFinding]:
        """A setting that has no effect."""
        if "require_client_cert" in self.model_fields_set and self.client_ca_file is None:
            remedy = "set client_ca_file, or remove it"
            return [ConfigFinding(("require_client_cert",), "needs client_ca_file", remedy)]
        return []


class AuthConfig(Strict):
    """API keys and tokens."""

    enabled: bool = False
    """Require an API key (or a token, see ``jwt``) for every route except ``/health/live`` and
    ``/health/ready``."""
    keys_file: Annotated[str, Field(max_length=4096)] = ""
    """A file of keys that exist beside those that were created in the plane, or a folder of such files, for
    example a mounted Kubernetes Secret. It is read again when it changes."""
    open_metrics: bool = False
    """Serve ``/metrics`` without a key."""


class AdminConfig(Strict):
    """Where operators' routes are: ``/status``, ``/ui``, ``/plane/…`` and the like."""

    host: ListeningHost = "127.0.0.1"
    """The address that their own port listens on."""
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Their own port; 0 for none: they are on the gateway's port. By default 8081 if ``gateway.host`` is not
    a loopback address, so that clients on other machines can't reach them, else none."""
    tls: TlsConfig | None = None
    """The certificate of that port; by default that of ``gateway.tls``."""


class LimitsConfig(Strict):
    """How the limits of keys are shared by the gateway replicas."""

    backend: Literal["embedded", "redis"] = "embedded"
    """``embedded``: the controller divides each limit among the gateway replicas. ``redis``: a Redis server
    does, for several planes that share their keys' limits."""
    redis_url: Annotated[str, Field(pattern=r"^rediss?://", max_length=2000)] | None = None
    """The Redis server, without a password: ``redis://127.0.0.1:6379/0``."""
    redis_url_env: EnvName | None = None
    """The environment variable that holds the address with its password, instead of ``redis_url``."""
    default_output_tokens: Annotated[int, Field(ge=0)] = 256
    """Output tokens that are reserved for a request that sets no ``max_tokens``, until it is known what it
    has used."""

    def findings(self) -> list[ConfigFinding]:
        """Settings that contradict each other."""
        addresses = [name for name in ("redis_url", "redis_url_env") if getattr(self, name)]
        if self.backend == "redis" and len(addresses) != 1:
            remedy = "set either redis_url or redis_url_env"
            return [ConfigFinding(("backend",), "backend 'redis' needs one address", remedy)]
        if self.backend != "redis" and addresses:
            remedy = "remove it, or set backend: redis"
            return [
                ConfigFinding((name,), "only backend 'redis' has this setting", remedy) for name in addresses
            ]
        return []
