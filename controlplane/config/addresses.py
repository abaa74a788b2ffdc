"""Types of settings that are an address, a listening host or the name of an environment variable.

Such a value may contain a credential by mistake, so that no message repeats it.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, Field

from controlplane.config.strict import ConfigFinding, FindingsError

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_KEY = re.compile(
    r"(sk|pk|rk|hf|gsk|xai|whsec|gh[opsur]|github_pat|glpat|xox[a-z]|r8|nvapi|dop_v1)_[A-Za-z0-9_]{8,}"
    r"|AKIA[A-Z0-9]{12,}|AIza\w{20,}|eyJ\w{16,}|[0-9a-fA-F]{32,}"
)
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_API_PART = re.compile(r"/v1/|/(chat/)?completions$|/(responses|messages|embeddings|models|health)$")
_PORTS = "1 to 65535"


def _fail(message: str, remedy: str) -> FindingsError:
    return FindingsError([ConfigFinding((), message, remedy)])


def _variable(value: str) -> str:
    remedy = "set a variable to the secret, and write the variable's name here"
    if not _VARIABLE.fullmatch(value):
        raise _fail("must be the name of an environment variable", remedy)
    # Names of variables are written in one case; random text of both cases with digits is a key.
    mixed = all(re.search(kind, value) for kind in ("[a-z]", "[A-Z]", "[0-9]")) and len(value) >= 16
    if mixed or _KEY.fullmatch(value):
        raise _fail("must be the name of an environment variable; this looks like a key itself", remedy)
    return value


def _variable_name(value: str) -> str:
    if not _VARIABLE.fullmatch(value):
        raise _fail("is not the name of an environment variable", "use letters, digits and '_'")
    return value


def _variable_value(value: str) -> str:
    if "\0" in value:
        raise _fail("can't be the value of a variable: it has a zero byte", "remove it")
    return value


def host_problem(host: str) -> str:
    """Why ``host`` can be no host name or IP address (without brackets); "" if it can."""
    if ":" in host or re.fullmatch(r"[\d.]+", host):
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return "is not an IP address"
        return ""
    labels = host.rstrip(".").split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        return "is not the name of a host"
    return ""


def _listening(value: str) -> str:
    remedy = "write only an IP address or a host name, such as 127.0.0.1 or 0.0.0.0; ports have settings"
    if not value:
        raise _fail("must not be empty", remedy)
    if host_problem(value):
        raise _fail("is not an address to listen on", remedy)
    return value


def _split(value: str, example: str) -> SplitResult:
    """The parts of an http address; FindingsError if it can't be one. A user and a password are accepted."""
    remedy = f"write it as {example}"
    if not value.isascii() or not value.isprintable() or " " in value or "\\" in value:
        raise _fail("is not an address: it contains characters that addresses can't have", remedy)
    if not re.match(r"(?i)https?://", value):
        raise _fail("must be an http:// or https:// address", remedy)
    try:
        parts = urlsplit(value)
        port, host = parts.port, parts.hostname or ""
    except ValueError:
        raise _fail(f"is not an address: its host or port is invalid (ports are {_PORTS})", remedy) from None
    if port == 0 or parts.netloc.endswith(":"):
        raise _fail(f"is not an address: the port must be {_PORTS}", remedy)
    if not host or host_problem(host):
        raise _fail(f"is not an address: {'it has no host' if not host else 'its host is invalid'}", remedy)
    if "#" in value:
        raise _fail("has a part after '#', which is never sent", "remove it")
    return parts


def _server(value: str) -> str:
    parts = _split(value, "http://host:port")
    if "@" in parts.netloc:
        raise _fail("contains a user or a password", "remove them, and set api_key_env")
    if "?" in value:
        raise _fail(
            "has a query, which would not be sent", "remove it; a key belongs in api_key_env's variable"
        )
    path = re.sub(r"/v1/?$", "", parts.path)
    if "//" in parts.path or "/../" in f"{path}/" or _API_PART.search(f"{path.rstrip('/')}"):
        remedy = "end it before /v1: requests are sent to …/v1/chat/completions and so on"
        raise _fail("has a path that would not be used as it is", remedy)
    return value


def _webhook(value: str) -> str:
    _split(value, "https://host/path")
    return value


def _collector(value: str) -> str:
    parts = _split(value, "http://host:4318/v1/traces")
    if "@" in parts.netloc:
        remedy = "remove them, and set OTEL_EXPORTER_OTLP_HEADERS where Ray is started"
        raise _fail("contains a user or a password", remedy)
    return value


def _file(value: str) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", value):
        raise _fail("is not the path of a file", "write a path such as /var/lib/tierplane/store.sqlite")
    if "\0" in value or value.endswith("/"):
        raise _fail("is not the path of a file", "write a path that ends with the file's name")
    return value


def _whole_path(value: str) -> str:
    if not value.startswith("/"):
        remedy = "write the whole path, such as /etc/tierplane/tls.crt: gateways run in another folder"
        raise _fail("is not a whole path", remedy)
    return _file(value)


_Text = Annotated[str, Field(max_length=2048)]
EnvName = Annotated[_Text, AfterValidator(_variable)]
"""The name of an environment variable that holds a secret."""
VariableName = Annotated[str, AfterValidator(_variable_name)]
"""The name of a variable that is set for an engine."""
VariableValue = Annotated[str, AfterValidator(_variable_value)]
"""Its value, which may be secret."""
ListeningHost = Annotated[_Text, AfterValidator(_listening)]
"""An IP address or a host name to listen on."""
ServerUrl = Annotated[_Text, AfterValidator(_server)]
"""The address of an OpenAI-compatible server."""
WebhookUrl = Annotated[_Text, AfterValidator(_webhook)]
"""An address to post to; its path, query, user and password are used."""
CollectorUrl = Annotated[_Text, AfterValidator(_collector)]
"""The address of an OTLP collector."""
StorePath = Annotated[_Text, AfterValidator(_file)]
"""The path of a file, ``:memory:`` or an empty text."""
CertificatePath = Annotated[_Text, AfterValidator(_whole_path)]
"""The path of a PEM file, the same on every node."""
