"""JSON texts that are trouble, and calls that bring them: the same for the same seed."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from parallama import mappings
from parallama.shapes import EVERY, Shape, written
from tests.envoy.lua_host import chat, ollama

ENDPOINTS = (
    *(("openai", f"/v1/{each}") for each in ("chat/completions", "completions", "embeddings")),
    *(("openai", "/v1/responses"), ("anthropic", "/v1/messages")),
    *(("ollama", f"/api/{each}") for each in ("chat", "generate", "embed", "show")),
)
GENERATES = (
    *("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions"),
    *("/v1/responses", "/v1/messages"),
)
TABLES: tuple[dict[str, str], ...] = (
    {},
    {"gpt-4": "llama3:70b", "a": "b", "llama3": "x/y:7b", "é€😀": "ünï"},
    {"a": 'q"uo\\te}', "b": "a\u2028b"},
    {"gpt-4": "GPT-4:8b", "x/y:7b": "a"},
)
USUAL = "the/usual:model"
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"max_tokens": {"max": 50}, "num_ctx": {"max": 100}, "keep_alive": {"max": 1800}},
    {"max_tokens": {"default": 9, "max": 10}, "num_ctx": {"default": 4}, "keep_alive": {"set": -1}},
    {"max_tokens": {"set": 5}, "num_gpu": {"set": -1}, "use_mmap": {"set": True}},
    {"max_tokens": {"drop": True}, "num_ctx": {"drop": True}, "keep_alive": {"drop": True}},
    {"num_gpu": {"max": 3}, "use_mmap": {"default": False}, "keep_alive": {"default": "5m"}},
)
SHAPE_TEXTS = [written({EVERY: Shape.model_validate(shape)})[EVERY] for shape in SHAPES]
WATCHED = ("model", "stream", "stream_options", "options", "prompt", "n", "best_of", "name")
BOUNDS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
OPTIONS = ("num_predict", "num_ctx", "temperature", "num_gpu", "keep_alive", "use_mmap")
DURATIONS = (
    *('"5m"', '"1h30m"', '"-1s"', '"0"', "-1", "0", "300", "1e9", '"forever"', '"5"', "0.5"),
    *(
        '"1h-5m"',
        '"99999999h"',
        '"1.5h"',
        '""',
        '"5\\u006d"',
        '"10\u00b5s"',
        "[]",
        '"+5m"',
        '".5h"',
    ),
)
OTHERS = ("messages", "keep_alive", "input", "x", "models", "model ", " model", "mode", "m", "")

GAPS = ("", "", "", "", "", "", " ", "\n", "\t", "\r\n", "  \n\t ")
BAD_GAPS = ("\0", "\x0b", "\x0c", "\u00a0", "\ufeff", "\u2028", "/**/", "//\n", "#", ",", "}", "x")
NAMES = (
    *(
        '"a"',
        '"b"',
        '"gpt-4"',
        '"GPT-4:Latest"',
        '"llama3:latest"',
        '"x/y:7b"',
        '"a:b"',
        '":latest"',
    ),
    *('"\u00e9\u20ac\U0001f600"', '"g\\u0070t-4"'),
)
STRINGS = (
    *('""', '"\\u0061"', '"\\ud83d\\ude00"', '"a\\/b"', '"\\\\"', '"\\""', '"\\\\\\""', '"}"'),
    *('"{\\"model\\":\\"b\\"}"', '"\\b\\f\\n\\r\\t"', '"true"', '"]"', '",\\"model\\":\\"b\\""'),
)
BAD_STRINGS = (
    *('"\\ud800"', '"\\udc00\\ud800"', '"\\ud83dx"', '"\\ud83d\\u0061"', '"a\\u0000"', '"\\x61"'),
    *('"\\u00g0"', '"\\u12"', '"a\nb"', '"a\0b"', '"\x7f"', '"\u0085"', "'a'", '"a', 'a"', '"\\'),
    *('"\\U0061"', '"\\ud83d\\uD83D\\ude00"', '"\ufffd"', '"\ufeff"', "`a`"),
)
WORDS = ("null", "true", "false", "{}", "[]")
BAD_WORDS = (
    "True",
    "None",
    "NULL",
    "nul",
    "truex",
    "undefined",
    "tru\u0435",
    "",
    "NaN",
    "Infinity",
)
NUMBERS = ("0", "1", "-1", "5", "7.0", "1e2", "2.5", "-0", "100", "4096", "2147483648", "1E+2")
BAD_NUMBERS = (
    *("1e400", "-1e400", "9" * 30, "1" * 400, "18446744073709551616", "4294967297", "1e-400"),
    *("9007199254740993", "01", "1.", ".5", "+1", "0x10", "1e", "--1", "-", "1_000", "-Infinity"),
    *("1e5000", "1.0e0", "-0.0", "1" * 5000, "0e999999", "100e-2", "1.5e1"),
)
RAW = (b"\xff", b"\xc0\xad", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\xed\xa0\xbd")
TAILS = (b"\0", b"\0x", b"x", b"}", b",", b'{"model":"b"}', b"\n//", b"\xff", b"\xc2\xa0", b"null")
FOLDS = {"s": "\u017f", "k": "\u212a", "i": "\u0131", "o": "\u043e", "e": "\u0435", "l": "\u01c0"}


@dataclass(frozen=True, slots=True)
class Text:
    """
    A body and the call that it belongs to.

    `table`, `usual` (the model of those who name none) and `shape` are what the operator wants.
    `cap` is what a hard limit has left for the answer. `plain`: every JSON parser accepts the text,
    and nothing about it is ambiguous.
    """

    body: bytes
    dialect: str = "openai"
    endpoint: str = "/v1/chat/completions"
    table: Mapping[str, str] = field(default_factory=dict)
    usual: str | None = None
    shape: int = 0
    cap: int | None = None
    plain: bool = False

    @property
    def metadata(self) -> dict[str, dict[str, object]]:
        """What authz would have written."""
        told: dict[str, object] = {"endpoint": self.endpoint, "dialect": self.dialect}
        if aliases := mappings.aliases(self.table, self.usual):
            told["aliases"] = aliases
        if self.shape:
            told["shape"] = SHAPE_TEXTS[self.shape]
        if self.endpoint == "/api/show":
            told["metered"] = None
        return (ollama if self.dialect == "ollama" else chat)(**told)


class Texts:
    """Goes on for ever."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311
        self._last = b'{"model":"b"}'

    def __iter__(self) -> Iterator[Text]:
        while True:
            dialect, endpoint = self._random.choice(ENDPOINTS)
            plain = self._random.random() < 0.1
            body = self._plain(dialect) if plain else self._troubled()
            table, shape = self._random.choice(TABLES), self._random.randrange(len(SHAPES))
            if endpoint == "/api/show" or self._random.random() < 0.4:
                shape = 0
            usual = USUAL if self._random.random() < 0.3 else None
            capped = endpoint in GENERATES and self._random.random() < 0.2
            cap = self._random.choice((1, 4, 1000)) if capped else None
            yield Text(body, dialect, endpoint, table, usual, shape, cap, plain)

    # Texts that nobody has a reason to refuse.

    def _plain(self, dialect: str) -> bytes:
        choice, chance = self._random.choice, self._random.random
        body: dict[str, object] = {choice(OTHERS): self._tree(3) for _ in range(choice((0, 1, 4)))}
        body["model"] = json.loads(choice(NAMES))
        if chance() < 0.6:
            body["stream"] = choice((True, False))
        if chance() < 0.4:
            body["options"] = {choice(OPTIONS): choice((1, 50, -1)) for _ in range(choice((0, 2)))}
        if chance() < 0.3 and dialect == "openai":
            body["stream_options"] = choice(({}, None, {"include_usage": choice((True, False))}))
        if chance() < 0.3:
            body[choice(BOUNDS)] = choice((1, 100, None))
        items = list(body.items())
        self._random.shuffle(items)
        separators = choice(((",", ":"), (", ", ": ")))
        made = json.dumps(
            dict(items),
            ensure_ascii=choice((True, False)),
            separators=separators,
            indent=choice((None, None, 2)),
        )
        return made.encode()

    def _tree(self, depth: int) -> object:
        choice = self._random.choice
        if depth and self._random.random() < 0.4:
            if choice((True, False)):
                return [self._tree(depth - 1) for _ in range(choice((0, 1, 3)))]
            return {
                choice((*WATCHED, *OTHERS)): self._tree(depth - 1) for _ in range(choice((0, 2)))
            }
        return choice((None, True, False, 0, -1, 1.5, 2**60, "", "b\\", 'é"\\}', "😀", "x" * 40))

    # Texts that somebody may read in another way.

    def _troubled(self) -> bytes:
        rnd = self._random
        trouble = rnd.choice((0.0, 0.02, 0.05, 0.1, 0.3))
        members = [self._member(trouble) for _ in range(rnd.choice((0, 1, 1, 2, 3, 5)))]
        if rnd.random() < 0.85:
            name = rnd.choice(NAMES) if rnd.random() > trouble else self._fitting("model", 0.5)
            members.append(f'"model"{self._gap(0)}:{self._gap(0)}{name}')
        rnd.shuffle(members)
        comma = f"{self._gap(trouble / 2)},{self._gap(trouble / 2)}"
        text = f"{self._gap(trouble / 2)}{{{comma.join(members)}}}{self._gap(trouble / 2)}"
        body = text.encode("utf-8", "surrogatepass")
        if rnd.random() < trouble:
            body = self._encoded(text, body)
        while rnd.random() < trouble * 2:
            body = self._mutated(body)
        if rnd.random() < trouble:
            body += rnd.choice(TAILS)
        self._last = body[:2000]
        return body

    def _member(self, trouble: float) -> str:
        rnd = self._random
        pool = rnd.choice((WATCHED, BOUNDS, OTHERS, OTHERS))
        word = rnd.choice(pool)
        gap = self._gap(trouble / 2)
        value = self._value(3, trouble) if rnd.random() < 0.3 else self._fitting(word, trouble)
        return f"{self._key(word, trouble)}{gap}:{self._gap(trouble / 2)}{value}{gap}"

    def _fitting(self, word: str, trouble: float) -> str:
        """A value as the name asks for it, more or less."""
        choice = self._random.choice
        bad = self._random.random() < trouble
        if word in ("model", "name"):
            return choice(BAD_STRINGS if bad else (*NAMES, *STRINGS))
        if word == "stream":
            return choice(BAD_WORDS if bad else ("true", "true", "false", "null"))
        if word == "keep_alive":
            return choice(BAD_NUMBERS if bad else DURATIONS)
        if word in ("n", "best_of") or word in BOUNDS:
            return choice(BAD_NUMBERS if bad else (*NUMBERS, "null"))
        if word in ("options", "stream_options"):
            inner = (*OPTIONS, "model") if word == "options" else ("include_usage", "x")
            return self._object(inner, trouble)
        if word == "prompt":
            items = (self._value(1, trouble) for _ in range(choice((0, 1, 3))))
            return choice((f"[{','.join(items)}]", "[1,2,3]", '["a","b"]', "[[1],[2]]", '"hi"'))
        return self._value(3, trouble)

    def _object(self, words: tuple[str, ...], trouble: float) -> str:
        members = []
        for _ in range(self._random.choice((0, 1, 1, 2, 3))):
            value = self._random.choice((*NUMBERS, "true", "false", "null", "{}"))
            if self._random.random() < trouble:
                value = self._value(1, trouble)
            gap = self._gap(trouble / 4)
            members.append(f"{gap}{self._key(self._random.choice(words), trouble)}{gap}:{value}")
        return "{" + ",".join(members) + self._gap(trouble / 4) + "}"

    def _value(self, depth: int, trouble: float) -> str:
        rnd = self._random
        if depth and rnd.random() < 0.3:
            count = rnd.choice((0, 1, 2, 4))
            if rnd.random() < 0.5:
                return f"[{','.join(self._value(depth - 1, trouble) for _ in range(count))}]"
            words = (*WATCHED, *OTHERS)
            members = (
                f"{self._key(rnd.choice(words), trouble)}:{self._value(depth - 1, trouble)}"
                for _ in range(count)
            )
            return f"{{{','.join(members)}}}"
        if rnd.random() < trouble:
            if rnd.random() < 0.05:
                deep = rnd.choice((50, 500, 1500, 9_990, 10_010))
                return "[" * deep + "]" * (deep - rnd.choice((0, 0, 0, 1)))
            return rnd.choice((*BAD_STRINGS, *BAD_WORDS, *BAD_NUMBERS))
        if rnd.random() < 0.01:
            return (
                '"'
                + rnd.choice(("x", "\\\\", '\\"', "\\u0041", "é")) * rnd.choice((300, 5000))
                + '"'
            )
        return rnd.choice((*NAMES, *STRINGS, *WORDS, *NUMBERS))

    def _key(self, word: str, trouble: float) -> str:
        rnd = self._random
        if rnd.random() >= trouble * 2:
            return f'"{word}"'
        if rnd.random() < 0.1:
            return rnd.choice((word, f"'{word}'", rnd.choice(BAD_STRINGS), f'"{word}\\u0000"', '"'))
        letters = list(word)
        folding = [at for at, letter in enumerate(word) if letter in "sk"]
        places = folding if folding and rnd.random() < 0.5 else range(len(word))
        for at in rnd.choices(places, k=rnd.choice((1, 1, 3))) if word else ():
            other = rnd.choice((word[at], word[at].upper(), FOLDS.get(word[at], word[at].upper())))
            escaped = f"\\u{ord(other):04{rnd.choice('xX')}}"
            letters[at] = rnd.choice((other, other, escaped))
        return f'"{"".join(letters)}"'

    def _gap(self, trouble: float) -> str:
        return self._random.choice(BAD_GAPS if self._random.random() < trouble else GAPS)

    def _encoded(self, text: str, body: bytes) -> bytes:
        kind = self._random.choice(
            ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cesu")
        )
        if kind == "cesu":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        return text.encode(kind, "surrogatepass")

    def _mutated(self, body: bytes) -> bytes:
        rnd, raw = self._random, bytearray(body)
        at = rnd.randrange(len(raw) + 1)
        match rnd.randrange(8):
            case 0:
                raw[at : at + 1] = bytes([rnd.choice(b'{}[]",:\\ \n\t\0u0123emoMODEL\x7f\x80\xff')])
            case 1:
                raw[at:at] = bytes([rnd.choice(b'{}[]",:\\ \n\t\0u0123emoMODEL\x7f\x80\xff')])
            case 2:
                del raw[at : at + rnd.choice((1, 1, 2, 8))]
            case 3:
                raw[at:at] = raw[at : at + rnd.choice((1, 4, 16, 64))]
            case 4:
                del raw[at:]
            case 5:
                raw[at:at] = rnd.choice(RAW)
            case 6:
                cut = rnd.randrange(len(self._last) + 1)
                raw[at:] = self._last[cut:]
            case _ if at < len(raw):
                raw[at] ^= 1 << rnd.randrange(8)
        return bytes(raw)
