"""Kinds of values that settings have. No complaint repeats a value: it may be a secret."""

import ipaddress
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from urllib.parse import SplitResult, urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from parallama.checking import AfterValidator, BeforeValidator, PlainValidator

_LARGEST_SECRET = 1 << 16
_OTHERS = 0o006  # read or write, for everybody
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9_.*-]+)(:([0-9]+|\*))?")
_SIZE = re.compile(r"(\d{1,15}) ?([KMG]?)(?:i?B)?", re.IGNORECASE)
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]+")
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True)
class SecretText:
    """A secret that shows in no text about it."""

    _secret: str = field(repr=False)

    def get_secret_value(self) -> str:
        return self._secret


@dataclass(frozen=True, slots=True)
class SecretFile:
    """A file that holds a secret, and what it held when the configuration was loaded."""

    path: Path
    secret: SecretText


def _path(value: object, folder: Path) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("must be a path, such as /var/lib/parallama")
    return folder / os.path.expanduser(value)


def _existing_file(value: object, folder: Path) -> Path:
    path = _path(value, folder)
    if not path.is_file():
        found = "is not a regular file" if path.exists() else "does not exist"
        raise ValueError(f"the file it names {found}; relative paths start at {folder}")
    return path


def _secret_file(value: object, folder: Path) -> SecretFile:
    # Not one of these messages repeats the value: it may be the secret itself, put here by mistake.
    if isinstance(value, SecretFile):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("must be the path of a file that holds the secret")
    path = _path(value, folder)
    try:
        # Looked at before it is opened: opening a pipe would wait for somebody to write.
        _existing_file(value, folder)
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(_LARGEST_SECRET + 1)
    except OSError as error:
        raise ValueError(f"the file it names cannot be read: {error.strerror}") from None
    if mode & _OTHERS:
        raise ValueError(
            "every user of this machine may read or change the file: run chmod o= on it"
        )
    return SecretFile(path, SecretText(_secret(raw)))


def _secret(raw: bytes) -> str:
    if len(raw) > _LARGEST_SECRET:
        raise ValueError(f"the file it names is larger than {_LARGEST_SECRET} bytes")
    try:
        text = raw.decode().strip()
    except UnicodeDecodeError:
        raise ValueError("the file it names is not UTF-8 text") from None
    if not text:
        raise ValueError("the file it names is empty: write the secret into it")
    return text


def _address(value: str) -> str:
    try:
        return str(ipaddress.ip_address("127.0.0.1" if value == "localhost" else value))
    except ValueError:
        raise ValueError(
            "must be an IP address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them"
        ) from None


def _host(value: str) -> str:
    if not _HOST_NAME.fullmatch(value) and not _is_ipv6(value):
        raise ValueError("must be a host name or an IP address and nothing else, such as 127.0.0.1")
    return value


def _host_port(value: str) -> str:
    host, _, port = value.rpartition(":")
    inner = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not port.isdecimal() or not 1 <= int(port) <= 65535 or (":" in inner and inner == host):
        raise ValueError("must be host:port, such as 10.0.0.1:26379 or [::1]:26379")
    _host(inner)
    return value


def _is_ipv6(value: str) -> bool:
    try:
        return ipaddress.ip_address(value).version == 6
    except ValueError:
        return False


def _upstream(value: str) -> str:
    """`scheme://host` for a URL without path, or for a bare host."""
    if "://" not in value:
        value = f"http://[{value}]" if _is_ipv6(value) else f"http://{value}"
    url = _split(value)
    if url.scheme not in ("http", "https"):
        raise ValueError("must begin with http:// or https://, such as http://127.0.0.1")
    if url.netloc.rpartition("]")[2].count(":"):
        raise ValueError("must not name a port: that is the setting `port` beside it")
    if url.path.strip("/") or url.query or url.fragment:
        raise ValueError("must end after the host: paths are Envoy's, see envoy/routes.yaml")
    host = _host(url.hostname or "")
    return f"{url.scheme}://[{host}]" if ":" in host else f"{url.scheme}://{host}"


def _upstream_at(value: str) -> str:
    """`scheme://host:port`"""
    url = _split(value if "://" in value else f"http://{value}")
    try:
        port = url.port
    except ValueError:
        port = None
    if port is None:
        raise ValueError("must name a host and a port, such as http://10.0.0.1:11434")
    without = url._replace(netloc=url.netloc.rpartition(":")[0])
    return f"{_upstream(without.geturl())}:{port}"


def _origin(value: str) -> str:
    """As browsers send it; `*` may stand in its host and for its port."""
    told = value.lower()
    if told != "*" and not _ORIGIN.fullmatch(told):
        raise ValueError(
            "must be an origin as browsers send it, such as https://chat.example.org, or '*'"
        )
    return told


def _header_name(value: str) -> str:
    if not _HEADER_NAME.fullmatch(value):
        raise ValueError("must be the name of a header, such as x-my-header")
    return value.lower()


def _keys_url(value: str) -> str:
    """Who could change what is on its way could make tokens, so it is https."""
    url = _split(value)
    if url.scheme != "https" and not (url.scheme == "http" and _is_loopback(url.hostname or "")):
        raise ValueError(
            "must begin with https://, or be of this machine, such as http://127.0.0.1:8080/jwks"
        )
    _host(url.hostname or "")
    return value


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _split(value: str) -> SplitResult:
    try:
        url = urlsplit(value)
    except ValueError:
        raise ValueError("must be a URL, such as http://127.0.0.1") from None
    if "@" in url.netloc:
        raise ValueError("must not hold a user or a password")
    return url


def _size(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("must be a number of bytes, or one with K, M or G, such as 100M")
    return int(match[1]) * _SIZES[match[2].upper()]


def _zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("must be a time zone by its IANA name, such as Europe/Berlin") from None
    return value


def upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


FilePath = Annotated[Path, PlainValidator(_path)]
ExistingFile = Annotated[Path, PlainValidator(_existing_file)]
Secret = Annotated[SecretFile, PlainValidator(_secret_file)]
Address = Annotated[str, AfterValidator(_address)]
Host = Annotated[str, AfterValidator(_host)]
HostPort = Annotated[str, AfterValidator(_host_port)]
Upstream = Annotated[str, AfterValidator(_upstream)]
UpstreamAt = Annotated[str, AfterValidator(_upstream_at)]
Origin = Annotated[str, AfterValidator(_origin)]
HeaderName = Annotated[str, AfterValidator(_header_name)]
KeysUrl = Annotated[str, AfterValidator(_keys_url)]
TimeZone = Annotated[str, AfterValidator(_zone)]
Bytes = Annotated[int, BeforeValidator(_size)]
