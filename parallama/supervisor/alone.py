"""Envoy alone: its services run on their own and share nothing with it but `state_dir`."""

from parallama.supervisor.chain import Chain


class EnvoyAlone(Chain):
    """Started, reloaded, restarted and stopped as `up` does it: requests that run may end."""

    async def start(self) -> None:
        await self._start_envoy()
