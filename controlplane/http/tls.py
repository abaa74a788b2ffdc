"""TLS of a server: its certificate, and which clients it asks for one.

The files are read again when they change, so that a renewed certificate needs no restart. A new pair that
can't be used is logged, and the one before it stays in use.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time
from typing import Final, NoReturn

import structlog

from controlplane.config.access import TlsConfig
from controlplane.errors import SetupError

CHECK_S: Final = 5.0
"""How often the files are looked at."""
EXPIRY_WARNING_S: Final = 14 * 86400.0
MAX_FILE_BYTES: Final = 1024 * 1024
_PROTOCOLS: Final = ["http/1.1"]
_DAY_S: Final = 86400.0

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TlsWarning:
    """Something about the files that an operator should change soon; the server works."""

    setting: str
    message: str
    remedy: str


def server_context(config: TlsConfig, setting: str) -> ssl.SSLContext:
    """What a server with this certificate needs. ``setting`` is the path of ``config``, such as
    ``gateway.tls``. Raises SetupError that names the setting and the remedy."""
    cert, key, authority = config.cert_file, config.key_file, config.client_ca_file
    for name, path in (("cert_file", cert), ("key_file", key), ("client_ca_file", authority or "")):
        if path:
            _check_readable(f"{setting}.{name}", path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(_PROTOCOLS)
    _check_certificates(f"{setting}.cert_file", cert)
    try:
        context.load_cert_chain(cert, key, password=lambda: _fail_encrypted(f"{setting}.key_file", key))
    except ssl.SSLError as error:
        raise _pair_error(setting, config, error) from error
    if authority:
        _check_certificates(f"{setting}.client_ca_file", authority)
        context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED if config.require_client_cert else ssl.CERT_OPTIONAL
    return context


def file_warnings(config: TlsConfig, setting: str) -> list[TlsWarning]:
    """What is wrong soon with files that :func:`server_context` accepts: a certificate that expires, a key
    that others on the machine can read."""
    found = []
    for name, path in (("cert_file", config.cert_file), ("client_ca_file", config.client_ca_file or "")):
        left_s = min((end - time() for end in _expiry_unix_s(path)), default=EXPIRY_WARNING_S)
        if left_s < EXPIRY_WARNING_S:
            when = f"expires in {left_s / _DAY_S:.0f} days" if left_s > 0 else "has expired"
            remedy = "renew it: the gateway takes up the new file without a restart"
            found.append(TlsWarning(f"{setting}.{name}", f"a certificate in {path} {when}", remedy))
    mode = Path(config.key_file).stat().st_mode
    if mode & 0o004:
        remedy = f"chmod 600 {config.key_file}"
        found.append(TlsWarning(f"{setting}.key_file", "every user of this machine can read the key", remedy))
    return found


class ServerTls:
    """The TLS of one or several servers, always with the files' present content.

    Raises SetupError if the files can't be used at the start.
    """

    def __init__(self, config: TlsConfig, setting: str) -> None:
        self._config = config
        self._setting = setting
        self._seen = self._fingerprint()
        self.context = server_context(config, setting)
        """For the next connection."""
        self._checked_s = monotonic()
        self._checking: asyncio.Task[None] | None = None
        self._warn()

    def refresh(self, now_s: float) -> None:
        """Begin to look at the files if that is due. The servers call this every now and then."""
        if now_s - self._checked_s >= CHECK_S and (self._checking is None or self._checking.done()):
            self._checked_s = now_s
            self._checking = asyncio.get_running_loop().create_task(asyncio.to_thread(self.reload))

    async def close(self) -> None:
        """Wait for a look at the files that has begun."""
        if self._checking is not None:
            await self._checking

    def reload(self) -> None:
        """Read the files again if they have changed. It blocks."""
        seen = self._fingerprint()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self.context = server_context(self._config, self._setting)
        except (SetupError, OSError) as error:
            log.warning("the new certificate can't be used, the old one stays", reason=str(error))
            return
        log.info("certificate reloaded", setting=self._setting, cert_file=self._config.cert_file)
        self._warn()

    def _warn(self) -> None:
        for warning in file_warnings(self._config, self._setting):
            log.warning(warning.message, setting=warning.setting, remedy=warning.remedy)

    def _fingerprint(self) -> tuple[object, ...]:
        config = self._config
        return tuple(_identity(path) for path in (config.cert_file, config.key_file, config.client_ca_file))


def _identity(path: str | None) -> object:
    """Differs when the file has changed, or the one that a link leads to."""
    if not path:
        return None
    try:
        found = os.stat(path)
    except OSError as error:
        return error.errno
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _check_readable(setting: str, path: str) -> None:
    """Raises SetupError if there is no such file or this user may not read it."""
    try:
        with open(path, "rb") as file:
            if len(file.read(MAX_FILE_BYTES + 1)) > MAX_FILE_BYTES:
                raise SetupError(f"{setting}: {path} is over {MAX_FILE_BYTES} bytes: is it a PEM file?")
    except FileNotFoundError as error:
        remedy = "create it there, on every node that runs a gateway, or correct the path"
        raise SetupError(f"{setting}: there is no file {path}: {remedy}") from error
    except OSError as error:
        remedy = "let the user that runs the gateway read it"
        raise SetupError(f"{setting}: {path} can't be read ({error.strerror}): {remedy}") from error


def _check_certificates(setting: str, path: str) -> None:
    """Raises SetupError if the file has no certificate or one that can't be read."""
    try:
        if _expiry_unix_s(path):
            return
        reason = "it has none"
    except ValueError as error:
        reason = str(error).partition(".")[0]
    raise SetupError(f"{setting}: {path} has no usable certificate ({reason}): write it as PEM")


def _expiry_unix_s(path: str) -> list[float]:
    """When each certificate of the file ends. Raises ValueError if the file has none or a broken one."""
    # Imported only where it is used: it takes a tenth of a second.
    from cryptography.x509 import load_pem_x509_certificates

    if not path:
        return []
    return [
        found.not_valid_after_utc.timestamp() for found in load_pem_x509_certificates(Path(path).read_bytes())
    ]


def _fail_encrypted(setting: str, path: str) -> NoReturn:
    # Without this, OpenSSL would ask for the password on the terminal.
    remedy = f"write it without: openssl pkey -in {path} -out NEW_FILE"
    raise SetupError(f"{setting}: the key in {path} has a password: {remedy}")


def _pair_error(setting: str, config: TlsConfig, error: ssl.SSLError) -> SetupError:
    if error.reason == "KEY_VALUES_MISMATCH":
        return SetupError(
            f"{setting}.key_file: the key in {config.key_file} is not that of the first certificate in "
            f"{config.cert_file}: name the key that belongs to it, and put the server's own certificate first"
        )
    if error.reason in {"EE_KEY_TOO_SMALL", "CA_MD_TOO_WEAK", "CA_KEY_TOO_SMALL"}:
        remedy = "use RSA of 2048 bits or more, or an elliptic curve, and SHA-256"
        return SetupError(f"{setting}.cert_file: {config.cert_file} is too weak ({error.reason}): {remedy}")
    why = error.reason or str(error)
    return SetupError(
        f"{setting}.key_file: {config.key_file} is not a usable private key ({why}): write it as PEM"
    )
