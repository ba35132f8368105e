"""Answers that run: those whose key or token was revoked, or whose user disabled, are to be cut."""

import logging
from collections.abc import Awaitable, Callable, Iterable

from authz.watched import TOKEN, Watched, cut, read_word, streams_in, token_digest
from parallama.changes import Change
from parallama.db.standing import revoked_tokens, standing_keys, standing_users
from parallama.db.store import Store
from parallama.errors import Unavailable

log = logging.getLogger(__name__)

JUDGE = "/parallama.Streams/Judge"
"""Asked by envoy/wasm/streams.wat: a slot for each stream that runs."""


class Streams:
    """
    Knows which credentials still stood when the database was asked last.

    That is forgotten by change signal, as in `Keyring`; without the signal the database is asked
    each time. Where the database is away streams go on, and are judged once it is back.
    """

    def __init__(self, store: Store, *, size: int) -> None:
        self._store = store
        self._size = size
        self._good: dict[bytes, Watched] = {}
        self._generation = 0
        self._paused = False
        self._away = False

    def judge(self, message: bytes) -> bytes | Awaitable[bytes]:
        """Which of these streams are to be cut; at once where all are known to be good."""
        asked = streams_in(message)
        unknown = {word for _, word in asked if word not in self._good}
        return self._ask(asked, unknown) if unknown else b""

    async def _ask(self, asked: list[tuple[int, bytes]], unknown: set[bytes]) -> bytes:
        generation = self._generation
        watched = {word: read_word(word) for word in unknown}
        try:
            fallen = await _fallen(self._store, watched.values())
        except Unavailable as error:
            if not self._away:
                log.warning("answers that run are not checked", extra={"cause": str(error)})
            self._away = True
            return b""
        self._away = False
        if generation == self._generation and not self._paused:
            if len(self._good) > self._size:
                self._good.clear()
            self._good.update(each for each in watched.items() if each[1] not in fallen)
        to_cut = [
            (number, watched[word])
            for number, word in asked
            if word in watched and watched[word] in fallen
        ]
        for _, each in to_cut:
            log.info("answer cut", extra={"user_id": each.user, "kind": each.kind})
        return b"".join(cut(number, each.dialect) for number, each in to_cut)

    def on_change(self, change: Change) -> None:
        match change.kind:
            case "key":
                self._forget(lambda each: each.id == change.id)
            case "user":
                self._forget(lambda each: each.user == change.id)
            case "token":
                self._forget(lambda each: each.kind == TOKEN)
            case "everything":
                self._forget(lambda _: True)

    def _forget(self, unwanted: Callable[[Watched], bool]) -> None:
        self._generation += 1
        self._good = {word: each for word, each in self._good.items() if not unwanted(each)}

    def pause(self) -> None:
        """The change signal is lost: ask the database each time until `resume`."""
        self._paused = True
        self._forget(lambda _: True)

    def resume(self) -> None:
        self._forget(lambda _: True)
        self._paused = False


async def _fallen(store: Store, watched: Iterable[Watched]) -> set[Watched]:
    """Those that do not stand any more. Raises Unavailable."""
    every = set(watched)
    tokens = {each for each in every if each.kind == TOKEN}
    by_key = every - tokens
    keys = await standing_keys(store, {each.id for each in by_key})
    fallen = {each for each in by_key if each.id not in keys}
    if tokens:
        users = await standing_users(store, {each.user for each in tokens})
        revoked = {token_digest(*each) for each in await revoked_tokens(store, users)}
        fallen |= {
            each
            for each in tokens
            if each.user not in users or each.id in revoked or each.issued_at < users[each.user]
        }
    return fallen
