"""The trail: what a line means, where a reader is, and what is kept of what cannot be read."""

import asyncio
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from parallama import contract as c
from parallama import trail as module
from parallama.trail import Letter, Line, Trail, Unreadable, look, parse, read, request_id
from tests.parallama.db_on_disk import a_record
from tests.usage_sink.lines import a_line, a_trail, append, facts, lines, nobody
from tests.usage_sink.make import STREAM, WHO, an_entry
from usage_sink import wire

ROOT = Path(__file__).parents[2]

# What a line means.


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        pytest.param({}, {}, id="a finished stream"),
        pytest.param(
            {"status": 0, "flags": ("downstream_connection_termination",),
             "details": "downstream_remote_disconnect", "first_byte": None},
            {"status": 0, "response_flags": "DC", "reason": "downstream_remote_disconnect",
             "upstream_first_us": None},
            id="the client left before any answer",
        ),
        pytest.param(
            {"status": 503,
             "flags": ("upstream_connection_failure", "upstream_retry_limit_exceeded"),
             "upstream": "", "lua": None, "first_byte": None},
            {"status": 503, "response_flags": "UF,URX", "upstream": None, "lua": None,
             "upstream_first_us": None, "tries": 0},
            id="the upstream is down",
        ),
        pytest.param(
            {"limits": {c.GRANTED: 150, c.TOKENS_LEFT: 850, c.REQUESTS_LEFT: 9}},
            {"limits": {c.GRANTED: 150, c.TOKENS_LEFT: 850, c.REQUESTS_LEFT: 9}},
            id="limits",
        ),
        pytest.param(
            {"lua": {**STREAM, c.TOTAL_TOKENS: 1e300, c.COMPUTE_MS: float("nan")}},
            {"lua": {**STREAM, c.TOTAL_TOKENS: 1e300, c.COMPUTE_MS: None}},
            id="numbers that cannot be: Envoy writes null for no number",
        ),
        pytest.param(
            {"lua": {**STREAM, c.MODEL: 'ü🦙"\\\n\x01'}},
            {"lua": {**STREAM, c.MODEL: 'ü🦙"\\\n\x01'}},
            id="names",
        ),
        pytest.param(
            {"lua": {**STREAM, c.REQUESTED_MODEL: "gpt-4"}},
            {"lua": {**STREAM, c.REQUESTED_MODEL: "gpt-4"}},
            id="a name that is mapped",
        ),
        pytest.param({"upstream": "::1"}, {"upstream": "[::1]:11434"}, id="IPv6"),
        pytest.param({"who": {}}, {"who": {}}, id="nobody"),
    ],
)  # fmt: skip
def test_a_line_means_what_the_entry_of_envoys_stream_means(
    entry: dict[str, Any], line: dict[str, Any]
) -> None:
    streamed, written = wire.parse(an_entry(**entry)), parse(a_line(**line))
    if streamed is not None and "compute_ms" in str(streamed.odd):
        assert written is not None
        assert written.record == streamed.record
    else:
        assert written == streamed


def test_envoy_is_told_to_write_what_is_read() -> None:
    """And `id` first of all, once it has sorted the names."""
    tree = yaml.safe_load((ROOT / "envoy" / "envoy.yaml").read_text("utf-8"))
    manager = tree["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]
    (log,) = [at for at in manager["typed_config"]["access_log"] if at["name"] == "trail"]
    written = log["typed_config"]["log_format"]["json_format"]
    assert written.keys() == facts().keys()
    assert min(written) == "id"
    assert written["v"] == module.VERSION
    spaces = {name: written[name] for name in ("who", "lua", "limits")}
    assert spaces == {
        "who": f"%DYNAMIC_METADATA({c.AUTHZ})%",
        "lua": f"%DYNAMIC_METADATA({c.LUA})%",
        "limits": f"%DYNAMIC_METADATA({c.RATELIMIT})%",
    }
    assert log["typed_config"]["path"] == f"trail/{Trail(ROOT).current.name}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not a whole line of JSON"),
        (a_line()[:-1], "not a whole line of JSON"),
        (b"\0" * 100, "not a whole line of JSON"),
        (b"\xff\xfe", "not a whole line of JSON"),
        (b"[" * 100_000, "not a whole line of JSON"),
        (a_line(lua=0).replace(b'"lua":0', b'"lua":inf'), "not a whole line of JSON"),
        (b"7", "not a line of the trail: it has no version"),
        (b'{"v": "1"}', "not a line of the trail: it has no version"),
        (b'{"v": true}', "not a line of the trail: it has no version"),
        (a_line(v=2), "written by another version: v is 2, not 1"),
        (b'{"v": 1}', "facts are missing, or of another kind"),
        (a_line(start_us="soon"), "facts are missing, or of another kind"),
        (a_line(start_us="9" * 40), "facts are missing, or of another kind"),
        (a_line(who=["a"]), "facts are missing, or of another kind"),
        (a_line(lasted_ms=None), "facts are missing, or of another kind"),
        (json.dumps(facts() | {"id": None}).encode(), "facts are missing, or of another kind"),
    ],
)
def test_what_is_no_line_says_why_and_never_what_was_in_it(text: bytes, reason: str) -> None:
    with pytest.raises(Unreadable) as told:
        parse(text)
    assert str(told.value) == reason


def test_a_request_of_nobody_is_no_row() -> None:
    assert parse(nobody()) is None


@pytest.mark.parametrize(
    ("text", "id"), [(a_line("r7"), "r7"), (b'{"v":1}', None), (b"", None), (b'{"id":"r', None)]
)
def test_the_id_is_found_without_reading_the_line(text: bytes, id: str | None) -> None:
    assert request_id(text) == id


def test_no_text_in_a_line_looks_like_its_beginning() -> None:
    line = a_line(lua={**STREAM, c.MODEL: '{"id":"r2"'})
    assert [part.text for part in Line(0, line).parts()] == [line]


@pytest.mark.parametrize(
    "rest", [a_line("r0")[:40], b"\0\0\0", b"half a ", a_line("r0")[:-3] + a_line("r0")[:9]]
)
def test_a_line_that_follows_half_a_line_is_read(rest: bytes) -> None:
    """An Envoy was killed while it wrote, and the next one wrote on."""
    found, letters = module.understood([Line(100, rest + a_line("r1"))], "usage.jsonl")
    assert [one.record.request_id for one in found] == ["r1"]
    assert b"".join(at.line or b"" for at in letters) == rest
    assert letters[0].offset == 100


# Reading a file.


def test_whole_lines_are_read_and_half_a_line_waits() -> None:
    file = io.BytesIO(lines(1, 2) + a_line("3"))
    size = len(file.getvalue())
    found, end = read(file, 0, size)
    assert [(line.offset, request_id(line.text)) for line in found] == [
        (0, "1"), (len(lines(1)), "2"),
    ]  # fmt: skip
    assert end == len(lines(1, 2))
    assert read(file, end, size) == ([], end)
    assert read(file, end, size, last=True) == ([Line(end, a_line("3"))], size)
    assert read(file, size, size, last=True) == ([], size)


def test_nothing_is_read_beyond_the_limit() -> None:
    file = io.BytesIO(lines(1, 2))
    found, end = read(file, 0, len(lines(1)) + 5)
    assert ([line.text for line in found], end) == ([a_line("1")], len(lines(1)))


def test_a_line_of_any_length_is_read_and_a_file_without_an_end_is_cut_in_pieces() -> None:
    long = a_line("1", lua={**STREAM, c.MODEL: "x" * 3_000_000}) + b"\n"
    file = io.BytesIO(long + lines(2))
    found, end = read(file, 0, len(file.getvalue()))
    assert request_id(found[0].text) == "1"
    noise = io.BytesIO(b"x" * (40 << 20))
    found, end = read(noise, 0, 40 << 20)
    assert 0 < end < 40 << 20
    assert len(found) == 1


def test_a_file_is_known_by_its_first_line_whatever_is_added() -> None:
    name, size = look(io.BytesIO(lines(1)))
    assert (name, size) != look(io.BytesIO(lines(2)))
    assert look(io.BytesIO(lines(1, 2))) == (name, len(lines(1, 2)))
    assert look(io.BytesIO(a_line("1"))) == ("", len(a_line("1")))
    assert look(io.BytesIO(b"")) == ("", 0)


# The folder.


def test_files_come_oldest_first_and_the_one_in_use_last(tmp_path: Path) -> None:
    trail = a_trail(tmp_path)
    assert trail.files() == []
    for n in range(3):
        append(trail.current, lines(n))
        trail.rename()
    append(trail.current, lines("now"))
    (trail.folder / "usage.txt").touch()
    names = [path.name for path in trail.files()]
    assert names == [*(f"usage.{n:08}.jsonl" for n in (1, 2, 3)), "usage.jsonl"]
    trail.remove(trail.files()[2])
    assert trail.rename().name == "usage.00000003.jsonl"


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    trail = Trail(tmp_path / "trail")
    assert (trail.size(), trail.waiting(), trail.letters(), trail.files()) == (0, 0, [], [])
    assert trail.load_read() == {}


def test_what_waits_is_what_was_not_read(tmp_path: Path) -> None:
    trail = a_trail(tmp_path)
    append(trail.current, lines(1, 2, 3))
    assert trail.waiting() == trail.size() == len(lines(1, 2, 3))
    with trail.current.open("rb") as file:
        key, _ = look(file)
    trail.save_read({key: len(lines(1))})
    assert trail.waiting() == len(lines(2, 3))
    trail.rename()
    append(trail.current, lines(4))
    assert trail.waiting() == len(lines(2, 3, 4))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"read": 7}', '{"read": {"a": "b"}}', '{"read": {"a": -1}}', "\0\0"]
)
def test_an_offset_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    trail = a_trail(tmp_path)
    (trail.folder / "read.json").write_text(text)
    assert trail.load_read() == {}


# Letters.


@pytest.mark.parametrize(
    "letter",
    [
        Letter("why", row=a_record("r1")),
        Letter("why", file="usage.jsonl", offset=7, line=b'\xff\0\n{"id"'),
    ],
)
def test_a_letter_is_read_as_it_was_written(letter: Letter) -> None:
    text = letter.dump()
    assert text.count(b"\n") == 1
    assert Letter.load(text) == letter


def test_a_letter_from_before_a_column_was_added_is_read() -> None:
    letter = Letter("why", row=a_record("r1"))
    told = json.loads(letter.dump())
    assert told["row"].pop("requested_model", "none") is None
    assert Letter.load(json.dumps(told).encode()) == letter


@pytest.mark.parametrize("text", [b"", b"{}", b"7", b'{"row": {}}', b'{"reason": "x", "line": 7}'])
def test_what_is_no_letter_is_an_error(text: bytes) -> None:
    with pytest.raises(ValueError, match="not a letter"):
        Letter.load(text)


def test_letters_are_taken_out_and_kept_until_that_is_done(tmp_path: Path) -> None:
    trail = a_trail(tmp_path)
    assert trail.take_letters() == []
    trail.set_aside([Letter("1", row=a_record("r1")), Letter("2", row=a_record("r2"))])
    assert len(trail.letters()) == 2
    taken = trail.take_letters()
    trail.set_aside([Letter("3", row=a_record("r3"))])
    assert len(trail.letters()) == 3
    assert trail.take_letters()[:2] == taken  # who took them died
    trail.set_aside([Letter("4", row=a_record("r4"))])
    trail.drop_letters([Letter("1", row=a_record("r1"))])
    assert [Letter.load(text).reason for text in trail.letters()] == ["4", "1"]


def test_letters_that_do_not_fit_on_the_disk_are_an_error_and_no_half_one_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trail = a_trail(tmp_path)
    trail.set_aside([Letter("1", row=a_record("r1"))])

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        trail.set_aside([Letter("2", row=a_record("r2"))])
    assert len(trail.letters()) == 1


def test_who_is_in_a_line_is_what_authz_wrote() -> None:
    finished = parse(a_line(who=WHO))
    assert finished is not None
    assert finished.record.username == WHO[c.USERNAME]


def test_one_at_a_time_reads_it(tmp_path: Path) -> None:
    first, second = Trail(tmp_path), Trail(tmp_path)

    async def story() -> None:
        async def never() -> None:
            raise AssertionError

        await first.take_turn(never)
        waits = 0

        async def pause() -> None:
            nonlocal waits
            waits += 1
            assert not second.is_ours
            if waits == 3:
                first.end_turn()

        await second.take_turn(pause)
        assert waits == 3
        second.end_turn()

    asyncio.run(story())
