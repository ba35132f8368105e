"""The usage_sink process: what it is made of."""

from functools import partial

from parallama import daemon, rpc
from parallama.config import Config
from parallama.db import database
from parallama.db.ledger import add
from parallama.stores import socket_path
from usage_sink.service import STREAM, UsageSink
from usage_sink.writer import Writer, writing

# About 100 MB of rows: more than the memory bound allows for, and minutes of a busy machine.
_QUEUE_ROWS = 50_000

# Envoy's log streams never end by themselves; what they sent is read in far less than this.
_GRACE_SECONDS = 1.0


async def main(config: Config) -> None:
    async with database(config.database) as db:
        writer = Writer(
            partial(add, db),
            batch_rows=config.usage.batch_rows,
            flush_seconds=config.usage.flush_seconds,
            queue_rows=_QUEUE_ROWS,
        )
        async with writing(writer, deadline=config.shutdown.drain_seconds):
            service = UsageSink(writer, log_requests=config.logging.requests)
            await daemon.run_until_stopped(
                rpc.Server({}, {STREAM: service.stream_access_logs}),
                listen=socket_path(config.run_dir / "usage_sink.sock"),
                grace=_GRACE_SECONDS,
            )


daemon.run("usage_sink", main)
