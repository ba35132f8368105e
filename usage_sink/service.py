"""gRPC StreamAccessLogs: every finished request becomes a row."""

import logging
from collections.abc import AsyncIterator
from typing import Any

from envoy.service.accesslog.v3 import als_pb2 as pb
from google.protobuf.message import DecodeError

from parallama import rpc
from parallama.finished import Finished
from usage_sink import wire
from usage_sink.counting import Counting
from usage_sink.writer import Writer

log = logging.getLogger(__name__)
STREAM = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"

requests = logging.getLogger("parallama.requests")


class UsageSink:
    """
    Takes Envoy's stream of entries. One entry that cannot be read costs no other.

    With `counting`, text that comes with an entry is counted, and goes no further.
    """

    def __init__(
        self, writer: Writer, *, log_requests: bool, counting: Counting | None = None
    ) -> None:
        self._writer = writer
        self._log_requests = log_requests
        self._counting = counting

    async def stream_access_logs(self, messages: AsyncIterator[bytes]) -> bytes:
        """StreamAccessLogsMessages in, until Envoy hangs up."""
        async for message in messages:
            try:
                logs = pb.StreamAccessLogsMessage.FromString(message).http_logs
            except DecodeError as error:
                raise rpc.RpcError(rpc.Status.INVALID_ARGUMENT, "not an access log") from error
            for entry in logs.log_entry:
                await self._take(entry)
        return bytes(pb.StreamAccessLogsResponse().SerializeToString())

    async def _take(self, entry: Any) -> None:
        try:
            finished = wire.parse(entry)
            text = wire.text_of(entry) if self._counting else None
        except Exception:
            log.exception("entry not understood", extra={"request_id": entry.request.request_id})
            return
        if finished is None:
            return
        if self._counting is not None and text is not None:
            finished = await self._counting.counted(text, finished)
        await self._writer.put(finished.record)
        if finished.odd:
            _warn(finished)
        if self._log_requests:
            _tell(finished)


def _warn(finished: Finished) -> None:
    row = finished.record
    log.warning(
        "the upstream reported a usage that cannot be",
        extra={
            "facts": ",".join(finished.odd),
            "model": row.model_name,
            "upstream": row.upstream_host,
            "request_id": row.request_id,
        },
    )


def _tell(finished: Finished) -> None:
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
