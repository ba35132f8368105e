"""
Whether one of our processes serves: `python -P -m parallama.health SOCKET`, or a URL.

For health checks of containers, every few seconds: so it loads next to nothing, and a process
that still listens but no longer answers does not count as well.
"""

import http.client
import socket
import struct
import sys
from urllib.parse import urlsplit

_SECONDS = 3.0

# A gRPC call of grpc.health.v1.Health/Check over HTTP/2 (RFC 9113), always the same bytes.
_HEADERS, _DATA, _SETTINGS, _END_STREAM, _END_HEADERS = 1, 0, 4, 1, 4
_SERVING = b"\0\0\0\0\2\x08\x01"


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _text(value: bytes) -> bytes:
    return bytes((len(value),)) + value


_CALL = b"".join(
    (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        _frame(_SETTINGS, 0, 0),
        _frame(
            _HEADERS,
            _END_HEADERS,
            1,
            b"\x83\x86"  # POST, http
            + (b"\x04" + _text(b"/grpc.health.v1.Health/Check"))
            + (b"\x01" + _text(b"localhost"))
            + (b"\x0f\x10" + _text(b"application/grpc"))
            + (b"\0" + _text(b"te") + _text(b"trailers")),
        ),
        _frame(_DATA, _END_STREAM, 1, b"\0\0\0\0\0"),
    )
)


def serves(at: str) -> bool:
    """
    What is asked at `at`: /healthz and the like over HTTP; `unix:` and a socket, where HTTP is
    spoken and every answer is one; any other socket over gRPC.
    """
    try:
        if at.startswith("unix:"):
            return _http_answers(at.removeprefix("unix:"))
        return _http_ok(at) if at.startswith("http://") else _grpc_serving(at)
    except (OSError, http.client.HTTPException):
        return False


def _http_ok(url: str) -> bool:
    to = urlsplit(url)
    connection = http.client.HTTPConnection(to.hostname or "", to.port, timeout=_SECONDS)
    try:
        connection.request("GET", to.path)
        return connection.getresponse().status == http.HTTPStatus.OK
    finally:
        connection.close()


def _http_answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(_SECONDS)
        peer.connect(path)
        peer.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        with peer.makefile("rb") as answer:
            status = answer.readline(100).split()
    return len(status) > 1 and status[1].isdigit() and int(status[1]) < 500


def _grpc_serving(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(_SECONDS)
        peer.connect(path)
        peer.sendall(_CALL)
        with peer.makefile("rb") as answers:
            while len(head := answers.read(9)) == 9:
                kind, _, stream = struct.unpack(">BBI", head[3:])
                payload = answers.read(int.from_bytes(head[:3], "big"))
                if (kind, stream) == (_DATA, 1):
                    return payload == _SERVING
    return False


if __name__ == "__main__":
    sys.exit(0 if serves(sys.argv[1]) else f"{sys.argv[1]} does not serve")
