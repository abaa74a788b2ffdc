"""Settings of who may use the gateway, and of its certificate."""

from __future__ import annotations

from controlplane.config.addresses import CertificatePath
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
    """Require an API key for every route except ``/health/live`` and ``/health/ready``."""
    open_metrics: bool = False
    """Serve ``/metrics`` without a key."""
