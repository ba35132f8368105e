"""gRPC StreamAccessLogs: every finished request becomes a row."""

import logging
from collections.abc import AsyncIterator
from typing import Any

from envoy.service.accesslog.v3 import als_pb2 as pb

from usage_sink import wire
from usage_sink.writer import Writer

log = logging.getLogger(__name__)
requests = logging.getLogger("parallama.requests")


class UsageSink:
    """Takes Envoy's stream of entries. One entry that cannot be read costs no other."""

    def __init__(self, writer: Writer, *, log_requests: bool) -> None:
        self._writer = writer
        self._log_requests = log_requests

    async def StreamAccessLogs(
        self, messages: AsyncIterator[pb.StreamAccessLogsMessage], context: Any
    ) -> pb.StreamAccessLogsResponse:
        async for message in messages:
            for entry in message.http_logs.log_entry:
                await self._take(entry)
        return pb.StreamAccessLogsResponse()

    async def _take(self, entry: Any) -> None:
        try:
            finished = wire.parse(entry)
        except Exception:
            log.exception("entry not understood", extra={"request_id": entry.request.request_id})
            return
        if finished is None:
            return
        await self._writer.put(finished.record)
        if self._log_requests:
            _tell(finished)


def _tell(finished: wire.Finished) -> None:
    row = finished.record
    first = row.time_to_first_token
    requests.info(
        "request finished",
        extra={
            "user": row.username,
            "model": row.model_name,
            "endpoint": row.endpoint,
            "status": row.status_code,
            "tokens_in": row.prompt_tokens,
            "tokens_out": row.completion_tokens,
            "source": row.token_source,
            "first_token_s": None if first is None else round(first, 3),
            "duration_s": round(row.request_duration, 3),
            "tokens_left": finished.tokens_left,
            "requests_left": finished.requests_left,
            "aborted": row.aborted or None,
            "request_id": row.request_id,
        },
    )
