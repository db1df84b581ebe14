"""The local Hub does what the tests lean on, as huggingface_hub sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .client import HubClient, RaisedInClient
from .server import HubServer


def upload(repo: str, path: str, content: bytes, token: str = "hf_ann", **options: Any) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo, exist_ok=True, private=options.pop("private", None))
    return api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo, **options).oid


def download(repo: str, path: str, **options: Any) -> bytes:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, path, **options)).read_bytes()


def look_up(repo: str) -> dict[str, Any]:
    from huggingface_hub import HfApi

    api = HfApi()
    info = api.model_info(repo)
    tree = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True)}
    return {
        "sha": info.sha,
        "private": info.private,
        "files": api.list_repo_files(repo),
        "large": [path for path, entry in tree.items() if getattr(entry, "lfs", None)],
        "user": api.whoami("hf_bob")["name"],
        "exists": [api.file_exists(repo, "README.md"), api.file_exists(repo, "absent")],
    }


def test_files_small_and_large(hub: HubServer, client: HubClient) -> None:
    client.run(upload, "ann/repo", "README.md", b"# Hello\n")
    oid = client.run(upload, "ann/repo", "deep/weights.safetensors", b"x" * 1000)
    assert client.run(download, "ann/repo", "README.md") == b"# Hello\n"
    assert client.run(download, "ann/repo", "deep/weights.safetensors") == b"x" * 1000
    found = client.run(look_up, "ann/repo")
    assert found["files"] == ["README.md", "deep/weights.safetensors"] and found["sha"] == oid
    assert found["large"] == ["deep/weights.safetensors"] and found["exists"] == [True, False]
    assert found["user"] == "bob" and found["private"] is False
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1


def test_what_is_not_there(hub: HubServer, client: HubClient) -> None:
    client.run(upload, "ann/repo", "README.md", b"# Hello\n")
    for arguments, error in (
        (("ann/repo", "absent"), "RemoteEntryNotFoundError"),
        (("ann/none", "README.md"), "RepositoryNotFoundError"),
    ):
        with pytest.raises(RaisedInClient, match=error):
            client.run(download, *arguments)
    with pytest.raises(RaisedInClient, match="RevisionNotFoundError"):
        client.run(download, "ann/repo", "README.md", revision="absent")


def test_who_may_write(hub: HubServer, client: HubClient) -> None:
    client.run(upload, "ann/repo", "README.md", b"# Hello\n")
    with pytest.raises(RaisedInClient, match="403"):
        client.run(upload, "ann/repo", "README.md", b"# Bob's\n", token="hf_bob")
    with pytest.raises(RaisedInClient, match="401"):
        client.run(upload, "ann/repo", "README.md", b"# Nobody's\n", token="hf_wrong")
    assert client.run(download, "ann/repo", "README.md") == b"# Hello\n"


def test_metadata_that_the_hub_refuses(hub: HubServer, client: HubClient) -> None:
    with pytest.raises(RaisedInClient, match="base_model"):
        client.run(upload, "ann/repo", "README.md", b"---\nbase_model: /home/ann/vit\n---\n")
    assert not hub.storage.repositories["ann/repo"].at("main").files
