"""An upload that is cut off leaves the revision that there was."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from .adapters import load, push
from .client import HubClient, RaisedInClient
from .server import HubServer


def push_without_patience(repo: str, **options: Any) -> torch.Tensor:
    """huggingface_hub tries again five times, after pauses of up to 8 seconds."""
    with mock.patch("huggingface_hub.utils._http.time.sleep"):
        return push(repo, **options)


@pytest.mark.parametrize("at", ["PUT /lfs/", "POST /api/models/ann/adapter/commit/"])
def test_a_connection_that_is_cut(hub: HubServer, client: HubClient, at: str) -> None:
    first = client.run(push, "ann/adapter", seed=1)
    repository = hub.storage.repositories["ann/adapter"]
    before = dict(repository.branches), set(repository.commits)

    hub.drop = lambda request: request.startswith(at)
    with pytest.raises(RaisedInClient, match="Server disconnected|RemoteProtocolError|ReadError|WriteError"):
        client.run(push_without_patience, "ann/adapter", seed=2)
    assert (repository.branches, set(repository.commits)) == before
    hub.drop = None
    assert torch.equal(client.run(load, "ann/adapter"), first)
    assert torch.equal(client.run(load, "ann/adapter", force_download=True), first)

    second = client.run(push, "ann/adapter", seed=2)
    assert torch.equal(client.run(load, "ann/adapter"), second)


def test_a_connection_that_is_cut_once_is_tried_again(hub: HubServer, client: HubClient) -> None:
    cuts = [True, False]
    hub.drop = lambda request: request.startswith("PUT /lfs/") and cuts.pop(0)
    pushed = client.run(push_without_patience, "ann/adapter")
    assert not cuts
    assert torch.equal(client.run(load, "ann/adapter"), pushed)


def test_a_download_that_is_cut_is_not_loaded(hub: HubServer, client: HubClient) -> None:
    pushed = client.run(push, "ann/adapter")
    hub.drop = lambda request: request.startswith("GET /lfs/")
    with pytest.raises(RaisedInClient):
        client.run(load_without_patience, "ann/adapter", force_download=True)
    hub.drop = None
    assert torch.equal(client.run(load, "ann/adapter"), pushed)


def load_without_patience(repo: str, **options: Any) -> torch.Tensor:
    with mock.patch("time.sleep"):
        return load(repo, **options)
