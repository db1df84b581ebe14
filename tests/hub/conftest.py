from __future__ import annotations

from collections.abc import Iterator

import pytest

from .client import HubClient
from .server import HubServer
from .storage import Storage


@pytest.fixture(scope="session")
def running_hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def client(running_hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    client = HubClient(running_hub.url, tmp_path_factory.mktemp("hf_home"))
    yield client
    client.close()


@pytest.fixture
def hub(running_hub: HubServer) -> Iterator[HubServer]:
    """The Hub, empty."""
    running_hub.storage = Storage()
    running_hub.requests.clear()
    running_hub.drop = None
    yield running_hub
    running_hub.drop = None
