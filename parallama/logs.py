"""What our processes say: constant events with fields, as JSON lines or as short text."""

import json
import logging
import math
import os
import re
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from parallama import config

OURS = ("parallama", "authz", "ratelimit", "usage_sink", "__main__")
"""Loggers that follow the configured level. All others begin at WARNING: in their details stand
the parameters of SQL and the bodies of requests."""

_MASKS = (
    # More than the exact form of a key: half of one is a secret, too.
    (re.compile(r"(pl[mr]_[0-9A-Za-z]{12}_)[0-9A-Za-z_]+"), r"\1***"),
    (re.compile(r"\b(bearer\s+)[A-Za-z0-9._~+/=-]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(?<![\w-])eyJ[\w-]+\.[\w.-]+", re.ASCII), "***"),  # signed tokens
    (re.compile(r"(://[^\s/:@\"]*:)[^\s/@\"]+@"), r"\1***@"),
)
_SUSPECT = re.compile(r"pl[mr]_|eyJ|[Bb][Ee][Aa][Rr][Ee][Rr]|://")  # one look that most text passes
_PLAIN = re.compile(r"[^\s\"'=\x00-\x1f\x7f-\x9f]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_JSON = json.JSONEncoder()
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def configure(settings: "config.Logging", service: str, stream: TextIO | None = None) -> None:
    """
    Send all logs of this process to `stream` (standard error), or to `<dir>/<service>.log`.

    Never fails, and a log that cannot be written fails nobody later: one note on `stream`, and
    work goes on. May be called again; the last call holds.
    """
    stream = stream or sys.stderr
    handler = _handler(settings, service, stream)
    for_people = isinstance(handler, _Stream) and stream.isatty()
    as_text = settings.format == "text" or (settings.format == "auto" and for_people)
    handler.setFormatter(Text(service) if as_text else Json(service))
    root = logging.getLogger()
    for old in [each for each in root.handlers if isinstance(each, _Forgiving)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    level = logging.getLevelNamesMapping()[settings.level]
    root.setLevel(max(level, logging.WARNING))
    for name in OURS:
        logging.getLogger(name).setLevel(level)


def mask(text: str) -> str:
    """
    `text` without anything that looks like a credential: the last line of defence.

    Of an API key the id stays, which is public and says whose key it was.
    """
    if not _SUSPECT.search(text):
        return text
    for pattern, instead in _MASKS:
        text = pattern.sub(instead, text)
    return text


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a call gave as `extra`."""
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


class Json(logging.Formatter):
    """One JSON object a line: time, level, service, event, the fields, `trace` of an exception."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "service": self._service,
            "event": record.getMessage(),
        }
        line |= {name: value for name, value in fields(record).items() if name not in line}
        if error := _error(self, record):
            line["trace"] = error
        # Masked piece by piece: in the finished line an escape could stand inside of a credential.
        return _JSON.encode(_masked(line))


REQUESTS = "parallama.requests"
"""The logger of finished requests: one line each, which `Text` writes as a person would."""


class Text(logging.Formatter):
    """For people: local time, level, service, event, name=value."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        if record.name == REQUESTS:
            return mask(f"{at} {_request(fields(record))}")
        event = _CONTROL.sub(_escaped, record.getMessage())
        pairs = [f"{name}={_word(value)}" for name, value in fields(record).items()]
        line = mask(" ".join([at, record.levelname, self._service, event, *pairs]))
        error = _error(self, record)
        return f"{line}\n{mask(error)}" if error else line


def _request(told: dict[str, Any]) -> str:
    """`anna llama3 /api/chat 200: 26 tokens in, 298 out, first after 0.21 s, ...`"""
    about = "tokens" if told["source"] == "reported" else f"tokens ({told['source']})"
    spent = [("in", told["tokens_in"]), ("out", told["tokens_out"])]
    counts = [f"{count:,} {way}" for way, count in spent if count is not None]
    facts = [
        *([f"{about} {', '.join(counts)}"] if counts else []),
        *_if_known("first after {:.2f} s", told["first_token_s"]),
        *_if_known("done after {:.2f} s", told["duration_s"]),
        *_if_known("{:,} tokens left", told["tokens_left"]),
        *_if_known("{:,} requests left", told["requests_left"]),
        *(["client left"] if told["aborted"] else []),
    ]
    who = [told[name] for name in ("user", "model", "endpoint", "status")]
    return f"{' '.join(_word(at) for at in who if at is not None)}: {', '.join(facts)}"


def _if_known(text: str, value: float | None) -> list[str]:
    return [] if value is None else [text.format(value)]


def _error(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""


def _masked(value: object) -> object:
    match value:
        case str():
            return mask(value)
        case float() if not math.isfinite(value):  # no number in JSON
            return str(value)
        case None | bool() | int() | float():
            return value
        case dict():
            return {mask(str(name)): _masked(at) for name, at in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_masked(at) for at in value]
    return mask(str(value))


def _word(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    if _PLAIN.fullmatch(text):
        return text
    return _CONTROL.sub(_escaped, json.dumps(text, ensure_ascii=False))


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


class _Forgiving(logging.Handler):
    """Says once that it cannot write, and never disturbs whoever logs."""

    notes: TextIO
    _noted = False

    def handleError(self, record: logging.LogRecord) -> None:
        self._note(sys.exception())

    def _note(self, error: BaseException | None) -> None:
        if self._noted:
            return
        self._noted = True
        _say(self.notes, f"the log cannot be written, going on without: {_cause(error)}")


class _Stream(_Forgiving, logging.StreamHandler[TextIO]):
    pass


class _File(_Forgiving, RotatingFileHandler):
    def doRollover(self) -> None:
        """Where files cannot be renamed, one that grows is better than none."""
        try:
            super().doRollover()
        except OSError as error:
            self._note(error)
            if self.stream is None:
                self.stream = self._open()

    def close(self) -> None:
        with suppress(OSError, ValueError):  # a full disk refuses the last flush, too
            super().close()


def _handler(settings: "config.Logging", service: str, stream: TextIO) -> _Forgiving:
    handler: _Stream | _File = _Stream(stream)
    if settings.dir is not None:
        try:
            settings.dir.mkdir(mode=0o750, parents=True, exist_ok=True)
            handler = _File(
                os.fspath(settings.dir / f"{service}.log"),
                maxBytes=settings.max_size,
                backupCount=settings.backup_count,
                encoding="utf-8",
                errors="backslashreplace",
            )
        except OSError as error:
            _say(stream, f"logging to standard error: {settings.dir}: {_cause(error)}")
    handler.notes = stream
    return handler


def _cause(error: BaseException | None) -> str:
    reason = getattr(error, "strerror", None)
    return str(reason or type(error).__name__)


def _say(stream: TextIO, text: str) -> None:
    with suppress(OSError, ValueError):  # nobody is left to hear it
        print(text, file=stream, flush=True)
