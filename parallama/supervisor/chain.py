"""Everything `up` runs: started in order, reloaded, replaced, stopped in the reverse order."""

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from parallama.config import Config, load
from parallama.errors import ParallamaError
from parallama.supervisor import children, folder
from parallama.supervisor.child import Child, Command
from parallama.supervisor.envoys import Envoys

log = logging.getLogger("parallama.up")

REPLACEABLE = (*children.SERVICES, "envoy")
"""Of which a new process can take the place of the old one while requests run."""


@dataclass
class Chain:
    """
    Envoy and what it needs, as children. `lock` is a file descriptor that they keep open. Once
    `hurry` is set, nothing waits for running requests any more.

    Runs in state_dir: the names of unix sockets are short from there.
    """

    config: Config
    tasks: asyncio.TaskGroup
    lock: int
    hurry: asyncio.Event
    _children: dict[str, Child] = field(default_factory=dict)
    _beside: list[Child] = field(default_factory=list)  # come or go while their namesake serves
    _serving: bool = False
    _stopping: bool = False
    _restart: "asyncio.Task[None] | None" = None
    _goodbye: "asyncio.Task[None] | None" = None

    def __post_init__(self) -> None:
        self._envoys = Envoys(self.config, self.hurry)

    async def start(self) -> None:
        """Return when all serves; raises ParallamaError when something does not."""
        config = self.config
        model = []
        if config.model.bundled:
            port = self._envoys.model_port = config.model.port or children.free_port()
            model = [children.model(config, port)]
        await self._envoys.place(config, starting=True)
        if config.redis.embedded:
            with folder.writing(config.state_dir):
                valkey = children.valkey(config)
            await self._start([valkey])
        await self._start([*children.services(config), *model])
        await self._start_envoy()

    async def _start_envoy(self) -> None:
        """The last of what has to serve before a request comes in."""
        await self._start([await self._envoys.first()])
        self._serving = True

    async def reload(self) -> None:
        """Give Envoy the upstream and the routes as they are now; on error it keeps the old."""
        try:
            config = load(self.config.source, os.environ)
            await self._envoys.place(config, starting=False)
        except ParallamaError as error:
            log.error("reload refused, nothing changed", extra={"cause": str(error)})
            return
        log.info("upstream and routes reloaded")
        changed = _without_upstream(config) != _without_upstream(self.config)
        if changed or self._envoys.waiting:
            log.warning("what else changed needs a restart")

    async def restart(self, names: Sequence[str], done: Callable[[str], None]) -> None:
        """
        Put a new process in the place of each, or of all where none is named, one after the other;
        `done` hears of each.

        Returns when the old ones have ended. Raises ParallamaError; what was not done by then goes
        on as it was.
        """
        if self._stopping or not self._serving:
            raise ParallamaError(f"`up` is {'stopping' if self._stopping else 'still starting'}")
        if self._restart is not None:
            raise ParallamaError("another restart is under way: try again when it has ended")
        here = [name for name in REPLACEABLE if name in self._children]
        if unknown := set(names) - set(here):
            raise ParallamaError(
                f"{', '.join(sorted(unknown))} cannot be restarted here, only {', '.join(here)}"
            )
        wanted = [name for name in here if name in names or not names]
        self._restart = asyncio.create_task(self._replace_all(wanted, done))
        try:
            await asyncio.wait((self._restart,))
            if self._restart.cancelled():
                raise ParallamaError("`up` was told to stop in the middle of it")
            self._restart.result()
        finally:
            self._restart = None

    async def stop(self) -> None:
        """Let requests end within drain_seconds, store their rows, end the children."""
        self._stopping = True
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.wait((self._restart,))
        coming = [child for child in self._beside if child.state in ("waiting", "starting")]
        await asyncio.gather(*(child.stop() for child in coming))
        goodbye = [] if self._goodbye is None else [self._goodbye]
        envoy = self._children.get("envoy")
        if envoy is not None and envoy.state == "serving":
            await asyncio.gather(self._envoys.drain(envoy), *goodbye)
        await self._stop(["envoy"])
        await self._stop(children.SERVICES)
        await self._stop([name for name in self._children])
        self._envoys.forget()

    async def _start(self, commands: Sequence[Command]) -> None:
        begun = []
        for command in commands:
            child = self._begin(command)
            self._children[command.name] = child
            begun.append(child)
        await asyncio.gather(*(child.serving() for child in begun))

    def _begin(self, command: Command) -> Child:
        log.info("starting", extra={"child": command.name})
        child = Child(command, on_change=self._tell, keep_open=(self.lock,))
        self.tasks.create_task(child.run(), name=command.name)
        return child

    async def _stop(self, names: Sequence[str]) -> None:
        everybody = [*self._children.values(), *self._beside]
        await asyncio.gather(*(child.stop() for child in everybody if child.command.name in names))

    # One in the place of another.

    async def _replace_all(self, names: Sequence[str], done: Callable[[str], None]) -> None:
        config = self._as_it_is_now()
        if "envoy" in names:  # before anything is replaced
            await self._envoys.check(config, self._children["envoy"])
        for name in names:
            if name == "envoy":
                await self._replace_envoy(config, done)
            else:
                await self._replace_service(name, config, done)
        if {*REPLACEABLE} & {*self._children} <= {*names}:
            self.config = config

    def _as_it_is_now(self) -> Config:
        """What new processes will read. Raises ParallamaError where the others cannot follow."""
        old, new = self.config, load(self.config.source, os.environ)
        changed = [at for at in ("state_dir", "model") if getattr(old, at) != getattr(new, at)]
        if old.redis != new.redis and (old.redis.embedded or new.redis.embedded):
            changed.append("redis")
        if changed:
            raise ParallamaError(
                f"{', '.join(changed)} changed in {new.source}: that needs a stop and a start"
            )
        return new

    async def _replace_service(
        self, name: str, config: Config, done: Callable[[str], None]
    ) -> None:
        async def goes_on(old: Child) -> bool:
            return old.pid is not None and await old.command.ready(old.pid)

        old = await self._replace(children.service(name, config), goes_on)
        done(name)
        await old.stop()
        self._beside.remove(old)

    async def _replace_envoy(self, config: Config, done: Callable[[str], None]) -> None:
        command = await self._envoys.next(config, self._children["envoy"])
        old = await self._replace(command, self._envoys.take_back)
        seen_off = self._envoys.see_off(old, self._children["envoy"], config)
        self._goodbye = self.tasks.create_task(seen_off)
        done("envoy")
        await asyncio.shield(self._goodbye)
        self._beside.remove(old)

    async def _replace(
        self, command: Command, take_back: Callable[[Child], Awaitable[bool]]
    ) -> Child:
        """
        The child that has served until now. It still runs, and is not started again.

        Where the new one does not come up, `take_back` says whether the old one goes on.
        """
        name = command.name
        old = self._children[name]
        old.hold()
        new = self._begin(command)
        self._beside.append(new)
        try:
            await new.serving()
        except ParallamaError as error:
            await new.stop()
            self._beside.remove(new)
            well = await take_back(old)
            if not well and old.pid is not None:
                # The new one had taken its place already.
                with suppress(ProcessLookupError):
                    os.kill(old.pid, signal.SIGTERM)
            old.release()
            what = "the old process goes on" if well else "the old process starts anew"
            raise ParallamaError(f"{what}: {error}") from error
        self._beside.remove(new)
        self._beside.append(old)
        self._children[name] = new
        self._tell()
        log.info("restarted", extra={"child": name})
        return old

    def _tell(self) -> None:
        folder.write_status(
            self.config.state_dir,
            {
                name: {
                    "state": child.state,
                    "pid": child.pid,
                    "restarts": child.restarts,
                    "last_exit": child.last_exit,
                }
                for name, child in self._children.items()
            },
        )


def _without_upstream(config: Config) -> Config:
    gateways = config.api_gateways.model_copy(update={"ollama": None})
    return config.model_copy(update={"api_gateways": gateways})
