"""One gateway for all stories that need nothing special; its upstream forgets between them."""

from collections.abc import Iterator

import pytest

from tests.e2e.gateway import Gateway, running
from tests.standin import StandIn

MODELS = ("smollm2", "secret")


@pytest.fixture(scope="session")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with (
        StandIn(models=MODELS) as upstream,
        running(tmp_path_factory.mktemp("gw"), upstream) as gateway,
    ):
        yield gateway


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    shared_gateway.upstream.reset()
    return shared_gateway


@pytest.fixture
def upstream(gateway: Gateway) -> StandIn:
    return gateway.upstream
