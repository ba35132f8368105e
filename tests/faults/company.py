"""Who calls while a fault happens."""

from collections.abc import Iterator

from parallama.limits import Unit, Window
from tests.e2e.gateway import Gateway
from tests.faults.databases import Row
from tests.faults.load import MOST_ANSWER, Told
from tests.standin import Behaviour, Seen

PLENTY = 10**9
LARGEST_CALL = Behaviour().prompt_tokens + MOST_ANSWER


class Company:
    """
    Who calls: one with room for everything, and two whose limits are used up in the midst of it,
    one's tokens and the other's requests.
    """

    def __init__(self, gateway: Gateway, calls: int) -> None:
        self._hard = gateway.config.rate_limiting.enforcement == "hard"
        self.tokens, self.requests = calls * 4, calls // 20
        self.free = gateway.someone(tokens=PLENTY, window=Window.MONTH)
        plenty = {(Unit.CONCURRENT, Window.MOMENT): 1000, (Unit.COMPUTE_SECONDS, Window.DAY): 10**6}
        gateway.limit(self.free.name, plenty)
        self.poor = gateway.someone(tokens=self.tokens, window=Window.MONTH)
        self.rare = gateway.someone(requests=self.requests, window=Window.MONTH)
        self.weights = [(self.free, 4), (self.poor, 5), (self.rare, 1)]

    def overspent(self, seen: list[tuple[Seen, Told]], rows: list[Row]) -> Iterator[str]:
        """Where limits are soft, a call that is alone may cross one; no two may."""
        most = self.tokens + (0 if self._hard else LARGEST_CALL - 1)
        spent = sum(row.tokens for row in rows if row.user_id == self.poor.user_id)
        if spent > most:
            yield f"{spent} tokens of {self.tokens}"
        let_in = sum(told.user_id == self.rare.user_id for _, told in seen)
        if let_in > self.requests:
            yield f"{let_in} requests of {self.requests}"

    def untried(self, told: list[Told]) -> Iterator[str]:
        """A limit that refused nobody shows nothing."""
        for who in (self.poor, self.rare):
            if not any(call.status == 429 and call.user_id == who.user_id for call in told):
                yield f"{who.name} never came to the limit"
