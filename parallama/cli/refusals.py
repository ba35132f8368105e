"""How often limits had no room, as their counters know it."""

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from parallama.cli import running
from parallama.cli.desk import Desk
from parallama.limits import Limit

if TYPE_CHECKING:
    from parallama.db.manage.limits import Policy
    from parallama.db.policies import Cell

Refusals = Mapping[tuple[str, "Cell"], int]
"""By a policy's id and a limit of it. What is not known is not there."""


async def refusals(desk: Desk, policies: "Sequence[Policy]", user: str | None) -> Refusals:
    """
    `user` is the one whom the limits of roles are asked for. Nothing is known where Redis is away,
    or nobody runs who counts.
    """
    if desk.config.redis.embedded and not running.is_up(desk.config.state_dir):
        return {}
    from parallama.counters import Counters, bucket_name
    from parallama.errors import ParallamaError
    from parallama.stores import connect_redis

    told, at = desk.config.rate_limiting, desk.now.timestamp()
    timeout = desk.config.redis.timeout_seconds
    found: dict[tuple[str, Cell], int] = {}
    try:
        async with (
            connect_redis(desk.config) as redis,
            aclosing(Counters(redis, lease=told.reservation_seconds, timeout=timeout)) as counters,
        ):
            for who, which in _by_user(policies, user).items():
                buckets = [
                    (bucket_name(limit, limit.window.bounds(at, told.zone)[0]), limit.unit)
                    for limit in which.values()
                ]
                counts = await counters.without_room(who, buckets)
                found |= zip(which, counts, strict=True)
    except ParallamaError:
        return {}
    return found


def _by_user(
    policies: "Sequence[Policy]", user: str | None
) -> dict[str, dict[tuple[str, "Cell"], Limit]]:
    asked: dict[str, dict[tuple[str, Cell], Limit]] = {}
    own = {_place(at, cell) for at in policies if at.user_id for cell in at.amounts}
    for policy in policies:
        who = policy.user_id or user
        if who is None:
            continue
        for cell in policy.amounts:
            if policy.user_id is None and _place(policy, cell) in own:
                continue  # a default that does not count
            limit = Limit(
                policy.gateway, policy.model, *cell, 0, policy.key_id or "", policy.shadow
            )
            asked.setdefault(who, {})[policy.id, cell] = limit
    return asked


def _place(policy: "Policy", cell: "Cell") -> tuple[object, ...]:
    return policy.key_id, policy.gateway, policy.model, policy.shadow, cell
