"""Access tokens through Envoy: what it makes of odd headers opens no door, and hides none."""

import socket
import time
from contextlib import closing
from uuid import uuid4

import pytest

from parallama import signing, tokens
from parallama.clock import system_clock
from tests.e2e.gateway import CHAT, Gateway
from tests.standin import StandIn


def a_token(gateway: Gateway, user_id: str) -> str:
    config = gateway.config
    signing.prepare(config, now=time.time())  # as the admin API does when it is first called
    return tokens.issue(
        signing.KeyFolder(config, clock=system_clock).keys(),
        user_id=user_id,
        jti=str(uuid4()),
        now=time.time(),
        settings=config.authentication,
    )


def test_a_token_is_good_where_a_key_is_and_never_passes_on(
    gateway: Gateway, upstream: StandIn
) -> None:
    someone = gateway.someone()
    token = a_token(gateway, someone.user_id)
    for headers in ({"authorization": f"Bearer {token}"}, {"x-api-key": token}):
        answer = gateway.http.post("/api/chat", json=CHAT, headers=headers)
        assert answer.status_code == 200, answer.text
        row = gateway.row(answer)
        assert (row["user_id"], row["key_id"]) == (someone.user_id, None)
        seen = gateway.seen(answer)
        assert token not in str(seen.headers)
    assert token not in gateway.log()


def spoken(gateway: Gateway, *headers: bytes) -> bytes:
    """The whole answer to a request whose headers nobody tidied up."""
    lines = [b"POST /api/chat HTTP/1.1", b"host: x", b"connection: close", b"content-length: 2"]
    with closing(socket.create_connection(gateway.address, timeout=10)) as connection:
        connection.sendall(b"\r\n".join([*lines, *headers, b"", b"{}"]))
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def test_headers_that_two_would_read_differently_let_nobody_in(
    gateway: Gateway, upstream: StandIn
) -> None:
    someone = gateway.someone()
    token = a_token(gateway, someone.user_id).encode()
    key = someone.token.encode()
    for good in (token, key):
        other = key if good is token else token
        for headers in (
            (b"authorization: Bearer " + good, b"authorization: Bearer " + other),
            (b"authorization: Bearer " + good, b"Authorization: Bearer " + good),
            (b"authorization: Bearer " + good, b"x-api-key: " + other),
            (b"authorization: Bearer " + good, b"authorization:"),
            (b"authorization: Bearer " + good + b"\xc2\xa0",),
            (b"authorization: Bearer\xc2\xa0" + good,),
            (b"authorization: B\xc3\xa9arer " + good,),
            (b"authorization: Bearer " + good + b"\x00",),
            (b"authorization: Bearer\t" + good,),
            (b"authorization : Bearer " + good,),
            (b"authorization: Bearer", b" " + good),
            (b"x_api_key: " + good,),
            (b"cookie: authorization=Bearer " + good,),
            (b"proxy-authorization: Bearer " + good,),
            (b"x-forwarded-authorization: Bearer " + good,),
            (b"x-parallama-user: " + someone.user_id.encode(), b"x-parallama-permissions: *:*"),
        ):
            answer = spoken(gateway, *headers)
            assert answer.split()[1] in (b"400", b"401"), (headers, answer[:300])
            assert good not in answer
    assert not upstream.requests


@pytest.mark.parametrize("name", [b"authorization: Bearer ", b"x-api-key: ", b"x-odd: "])
def test_a_megabyte_of_header_is_too_much(gateway: Gateway, upstream: StandIn, name: bytes) -> None:
    try:
        answer = spoken(gateway, name + b"A" * (1 << 20))
    except ConnectionError:  # it hangs up while we still talk
        answer = b""
    assert not answer or answer.split()[1] == b"431"
    assert not upstream.requests


def test_a_token_in_the_address_is_refused(gateway: Gateway, upstream: StandIn) -> None:
    someone = gateway.someone()
    token = a_token(gateway, someone.user_id)
    for headers in ({}, someone.headers):
        answer = gateway.http.post(f"/api/chat?access_token={token}", json=CHAT, headers=headers)
        assert answer.status_code == 401
        assert token not in answer.text
    assert not upstream.requests
