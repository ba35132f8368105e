"""What is logged, where it goes, and what never goes there."""

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallama import logs
from parallama.config import Logging

KEY = "plm_abcDEF012345_" + "Q7" * 24 + "z"
log = logging.getLogger("parallama.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Full(io.StringIO):
    """A stream on a disk without room."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Take our handlers away again, and the levels with them."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [each for each in root.handlers if each not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    for name in logs.OURS:
        logging.getLogger(name).setLevel(logging.NOTSET)


def configured(stream: io.StringIO | None = None, **given: object) -> io.StringIO:
    stream = stream or io.StringIO()
    logs.configure(Logging.model_validate(given), service="authz", stream=stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_json_object_with_its_fields() -> None:
    stream = configured()
    log.info("request denied", extra={"user": "anna", "status": 403, "limits": ("a", None)})
    [line] = lines(stream)
    at = line.pop("time")
    assert isinstance(at, str)
    assert at.endswith("Z")
    assert line == {
        "level": "info",
        "service": "authz",
        "event": "request denied",
        "user": "anna",
        "status": 403,
        "limits": ["a", None],
    }


def test_a_terminal_gets_text() -> None:
    stream = configured(Terminal())
    log.warning("late", extra={"seconds": 0.123456, "model": "a b", "empty": "", "by": 'x"y'})
    clock, _, rest = stream.getvalue().partition(" ")
    assert len(clock) == len("12:00:00")
    assert rest == 'WARNING authz late seconds=0.1235 model="a b" empty="" by="x\\"y"\n'


@pytest.mark.parametrize(
    ("form", "stream", "is_json"),
    [("json", Terminal(), True), ("text", io.StringIO(), False), ("auto", io.StringIO(), True)],
)
def test_the_format_is_the_operators_choice(form: str, stream: io.StringIO, is_json: bool) -> None:
    configured(stream, format=form)
    log.info("up")
    assert stream.getvalue().startswith("{") is is_json


@pytest.mark.parametrize("form", ["json", "text"])
def test_nobody_can_write_a_line_of_their_own(form: str) -> None:
    stream = configured(format=form)
    log.info("denied\nINFO forged", extra={"model": 'x\n{"event": "forged"}\x1b[2J\u2028'})
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()


def test_an_exception_is_part_of_its_line() -> None:
    stream = configured()
    try:
        raise RuntimeError(f"broke at {KEY}")
    except RuntimeError:
        log.exception("it broke")
    [line] = lines(stream)
    assert "RuntimeError: broke at plm_abcDEF012345_***" in str(line["trace"])


def test_an_exception_follows_its_line_in_text() -> None:
    stream = configured(format="text")
    try:
        raise RuntimeError(f"broke at {KEY}")
    except RuntimeError:
        log.exception("it broke")
    assert "RuntimeError: broke at plm_abcDEF012345_***" in stream.getvalue()
    assert KEY not in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"key {KEY}.", "key plm_abcDEF012345_***."),
        (f"x{KEY}{KEY}", "xplm_abcDEF012345_***"),
        (KEY[:-5], "plm_abcDEF012345_***"),
        ("Authorization: Bearer eyJh.eyJz.c2ln-_=", "Authorization: Bearer ***"),
        ("bEARER   sk-1234", "bEARER   ***"),
        (f"key {KEY.replace('plm_', 'plr_')}.", "key plr_abcDEF012345_***."),
        ('{"access_token": "eyJh.eyJz.c2ln-_"}', '{"access_token": "***"}'),
        ("token eyJh.eyJz of", "token *** of"),
        ("eyJh alone, and greyJh.x", "eyJh alone, and greyJh.x"),
        ("redis://:hunter2@box/0", "redis://:***@box/0"),
        ("https://anna:hunter2@box", "https://anna:***@box"),
        ("http://box:8000/v1", "http://box:8000/v1"),
        ("plm_abcDEF012345", "plm_abcDEF012345"),
        ("a forbearer went by", "a forbearer went by"),
    ],
)
def test_credentials_are_masked(text: str, masked: str) -> None:
    assert logs.mask(text) == masked


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_credential_passes_wherever_it_stands(form: str) -> None:
    stream = configured(format=form)
    log.info(
        "asked with %s",
        KEY,
        extra={"key": KEY, "deep": [{"a": (KEY,), KEY: 1}], "bytes": KEY.encode(), "set": {KEY}},
    )
    assert "Q7Q7" not in stream.getvalue()
    assert stream.getvalue().count("plm_abcDEF012345_***") == 6


def test_fields_that_are_no_json_are_told_as_text() -> None:
    stream = configured()
    log.info("odd", extra={"path": Path("/x"), "nan": float("nan"), "level": "lost"})
    [line] = lines(stream)
    assert (line["path"], line["nan"], line["level"]) == ("/x", "nan", "info")


def test_details_of_others_stay_out() -> None:
    """At DEBUG, database drivers tell the parameters of their SQL."""
    stream = configured(level="DEBUG")
    log.debug("ours")
    logging.getLogger("authz.keyring").debug("ours")
    logging.getLogger("__main__").debug("ours")
    logging.getLogger("aiosqlite").debug("theirs")
    logging.getLogger("httpx").info("theirs")
    logging.getLogger("asyncio").warning("a warning")
    assert [line["event"] for line in lines(stream)] == ["ours", "ours", "ours", "a warning"]


def test_the_level_holds_for_all() -> None:
    stream = configured(level="ERROR")
    log.warning("ours")
    logging.getLogger("asyncio").warning("theirs")
    log.error("told")
    assert [line["event"] for line in lines(stream)] == ["told"]


def test_the_last_call_holds() -> None:
    first = configured()
    second = configured()
    log.info("up")
    assert first.getvalue() == ""
    assert len(lines(second)) == 1


def test_a_folder_gets_a_file_for_each_service(tmp_path: Path) -> None:
    stream = configured(dir=str(tmp_path / "a" / "b"))
    log.info("up")
    assert stream.getvalue() == ""
    assert json.loads((tmp_path / "a" / "b" / "authz.log").read_text())["event"] == "up"


def test_files_are_put_aside_at_their_size(tmp_path: Path) -> None:
    configured(dir=str(tmp_path), max_size=1024, backup_count=2)
    for number in range(40):
        log.info("line", extra={"number": number})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["authz.log", "authz.log.1", "authz.log.2"]
    assert all(path.stat().st_size <= 1024 for path in tmp_path.iterdir())
    assert '"number": 39' in (tmp_path / "authz.log").read_text()


def test_a_file_that_cannot_be_put_aside_grows(tmp_path: Path) -> None:
    (tmp_path / "authz.log.1").mkdir()
    (tmp_path / "authz.log.1" / "in the way").touch()
    stream = configured(dir=str(tmp_path), max_size=1024, backup_count=1)
    for number in range(40):
        log.info("line", extra={"number": number})
    kept = (tmp_path / "authz.log").read_text().splitlines()
    assert [json.loads(line)["number"] for line in kept] == list(range(40))
    assert len(stream.getvalue().splitlines()) == 1


def test_a_folder_that_cannot_be_made_leaves_standard_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    stream = configured(dir=str(tmp_path / "file" / "logs"))
    log.info("up")
    note, line = stream.getvalue().splitlines()
    assert note == f"logging to standard error: {tmp_path}/file/logs: Not a directory"
    assert json.loads(line)["event"] == "up"


def test_a_full_disk_is_noted_once_and_disturbs_nobody(tmp_path: Path) -> None:
    (tmp_path / "authz.log").symlink_to("/dev/full")
    stream = configured(dir=str(tmp_path))
    for _ in range(3):
        log.info("up")
    assert stream.getvalue() == (
        "the log cannot be written, going on without: No space left on device\n"
    )


def test_a_stream_that_cannot_be_written_disturbs_nobody() -> None:
    configured(Full())
    log.info("up")
    closed = io.StringIO()
    closed.close()
    handler = logging.getLogger().handlers[-1]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(closed)
    log.info("up")


def test_an_event_that_cannot_be_written_out_is_noted() -> None:
    stream = configured()
    for event, arguments in (("%d", ("x",)), ("next", ())):
        record = log.makeRecord(log.name, logging.INFO, "", 0, event, arguments, None)
        logging.getLogger().handlers[-1].handle(record)  # pytest's own handler would raise
    note, line = stream.getvalue().splitlines()
    assert note == "the log cannot be written, going on without: TypeError"
    assert json.loads(line)["event"] == "next"


def test_standard_error_is_where_logs_go(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging(), service="authz")
    log.info("up")
    assert json.loads(capsys.readouterr().err)["event"] == "up"
    assert logging.getLogger().handlers[-1].stream is sys.stderr


FINISHED = {
    "user": "anna",
    "model": "llama3",
    "endpoint": "/api/chat",
    "status": 200,
    "tokens_in": 26,
    "tokens_out": 1298,
    "source": "reported",
    "first_token_s": 0.213,
    "duration_s": 4.5,
    "tokens_left": 98_676,
    "requests_left": None,
    "aborted": None,
    "request_id": "c0ffee",
}


@pytest.mark.parametrize(
    ("facts", "shown"),
    [
        pytest.param(
            {},
            "anna llama3 /api/chat 200: tokens 26 in, 1,298 out, first after 0.21 s,"
            " done after 4.50 s, 98,676 tokens left",
            id="reported",
        ),
        pytest.param(
            {"source": "counted", "tokens_in": None, "aborted": True, "requests_left": 3},
            "anna llama3 /api/chat 200: tokens (counted) 1,298 out, first after 0.21 s,"
            " done after 4.50 s, 98,676 tokens left, 3 requests left, client left",
            id="cut",
        ),
        pytest.param(
            {"model": "a\nb", "status": 429, "tokens_in": None, "tokens_out": None}
            | {"first_token_s": None, "tokens_left": 0},
            'anna "a\\nb" /api/chat 429: done after 4.50 s, 0 tokens left',
            id="refused",
        ),
    ],
)
def test_a_finished_request_is_a_line_for_people(facts: dict[str, object], shown: str) -> None:
    stream = configured(format="text")
    logging.getLogger(logs.REQUESTS).info("request finished", extra=FINISHED | facts)
    at, _, line = stream.getvalue().partition(" ")
    assert re.fullmatch(r"\d\d:\d\d:\d\d", at)
    assert line == f"{shown}\n"
