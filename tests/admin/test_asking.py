"""One question to Envoy, answered whole or not at all."""

import asyncio
from pathlib import Path

import pytest

from parallama.admin.catalog.asking import Answer, Unanswered, Unasked, ask
from tests.admin.servers import Raw, behind, hangs, http

LARGEST = 100_000


def answered(
    folder: Path, says: Raw, *, body: bytes | None = None, seconds: float = 30
) -> tuple[Answer, dict[str, str], bytes]:
    async def story() -> tuple[Answer, dict[str, str], bytes]:
        async with behind(folder, **{"/x": says}) as server:
            method = "GET" if body is None else "POST"
            found = await ask(server.path, method, "/x", body, seconds=seconds, largest=LARGEST)
            ((asked, target, headers, sent),) = server.asked
            assert (asked, target) == (method, "/x")
            return found, headers, sent

    return asyncio.run(story())


def test_an_answer_is_what_was_said(tmp_path: Path) -> None:
    found, headers, _ = answered(tmp_path, http(b'{"a": 1}\n', 404, "text/x", "elsewhere -"))
    assert found == Answer(404, "text/x", b'{"a": 1}\n', "elsewhere")
    assert headers["x-parallama-catalog"] == "1"
    assert "content-length" not in headers


def test_an_answer_in_chunks_is_put_together(tmp_path: Path) -> None:
    raw = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    assert answered(tmp_path, raw)[0] == Answer(200, "", b"abcde")


def test_a_question_has_its_body(tmp_path: Path) -> None:
    _, headers, sent = answered(tmp_path, http(b"{}"), body=b'{"model":"a"}')
    assert sent == b'{"model":"a"}'
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (http(b"x" * (LARGEST + 1)), "larger"),
        (http(b"abc")[:-1], "broke off"),
        (b"", "broke off"),
        (b"220 smtp\r\n", "no HTTP"),
        (http(b"no healthy upstream", 503, upstream="upstream UH"), r"cannot be reached \(UH\)"),
    ],
)
def test_what_is_no_whole_answer_of_the_server_is_none(
    tmp_path: Path, says: bytes, why: str
) -> None:
    with pytest.raises(Unanswered, match=why):
        answered(tmp_path, says)


def test_a_question_has_its_time(tmp_path: Path) -> None:
    with pytest.raises(Unanswered, match=r"within 0.05 s"):
        answered(tmp_path, hangs, seconds=0.05)


def test_where_nobody_listens_the_server_was_not_asked(tmp_path: Path) -> None:
    with pytest.raises(Unasked, match="No such file"):
        asyncio.run(ask(str(tmp_path / "none"), "GET", "/", seconds=30, largest=1))
