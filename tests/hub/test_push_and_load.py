"""`model.push_to_hub(...)` and `PeftModel.from_pretrained("user/adapter")`."""

from __future__ import annotations

import tempfile

import pytest
import torch

from e2vpt_peft import prune_prompts

from ..peft_contract.common import adapted, logits
from ..support.models import tiny_vit
from .adapters import load, push
from .client import HubClient, RaisedInClient
from .server import HubServer


def test_a_pushed_adapter_is_loaded(hub: HubServer, client: HubClient) -> None:
    pushed = client.run(push, "ann/adapter")
    assert torch.equal(client.run(load, "ann/adapter"), pushed)
    files = hub.storage.repositories["ann/adapter"].at("main").files
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} == set(files)
    assert files["adapter_model.safetensors"].is_lfs and not files["adapter_config.json"].is_lfs


def test_pushing_again_makes_a_new_revision(hub: HubServer, client: HubClient) -> None:
    first = client.run(push, "ann/adapter", seed=1)
    old = hub.storage.repositories["ann/adapter"].branches["main"]
    second = client.run(push, "ann/adapter", seed=2)
    assert not torch.equal(first, second)
    assert torch.equal(client.run(load, "ann/adapter"), second)
    assert torch.equal(client.run(load, "ann/adapter", revision=old), first)


def test_branches(hub: HubServer, client: HubClient) -> None:
    first = client.run(push, "ann/adapter", seed=1)
    second = client.run(push, "ann/adapter", seed=2, revision="tuned")
    assert torch.equal(client.run(load, "ann/adapter"), first)
    assert torch.equal(client.run(load, "ann/adapter", revision="tuned"), second)
    with pytest.raises(RaisedInClient, match="Can't find 'adapter_config.json' at 'ann/adapter'"):
        client.run(load, "ann/adapter", revision="absent")


def test_subfolder(hub: HubServer, client: HubClient) -> None:
    pushed = client.run(push, "ann/adapters", adapter_name="flowers")
    assert torch.equal(client.run(load, "ann/adapters", subfolder="flowers"), pushed)


def test_a_private_adapter_is_for_its_owner(hub: HubServer, client: HubClient) -> None:
    pushed = client.run(push, "ann/secret", private=True)
    assert torch.equal(client.run(load, "ann/secret", token="hf_ann"), pushed)
    for token in (None, "hf_bob"):
        with pytest.raises(RaisedInClient, match="RepositoryNotFoundError"):
            client.run(load, "ann/secret", token=token)


def test_pushing_to_somebody_else_is_refused(hub: HubServer, client: HubClient) -> None:
    pushed = client.run(push, "ann/adapter")
    with pytest.raises(RaisedInClient, match="403"):
        client.run(push, "ann/adapter", seed=1, token="hf_bob")
    assert torch.equal(client.run(load, "ann/adapter"), pushed)


def push_pruned(repo: str) -> torch.Tensor:
    model = adapted()
    prune_prompts(model, token_mask=[False, True], segment_mask=[[True] * 12 + [False] * 4] * 2)
    model.push_to_hub(repo, token="hf_ann")
    return logits(model)


def load_natively(repo: str) -> torch.Tensor:
    backbone = tiny_vit()
    backbone.load_adapter(repo)
    return logits(backbone.eval())


def test_pruned_prompts_are_not_uploaded(hub: HubServer, client: HubClient) -> None:
    client.run(push, "ann/whole")
    pruned = client.run(push_pruned, "ann/pruned")
    assert torch.equal(client.run(load, "ann/pruned"), pruned)
    assert torch.equal(client.run(load_natively, "ann/pruned"), pruned)
    whole, less = (
        hub.storage.repositories[name].at("main").files["adapter_model.safetensors"].size
        for name in ("ann/whole", "ann/pruned")
    )
    assert less < whole


def upload_pickled(repo: str) -> None:
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        adapted().save_pretrained(folder, safe_serialization=False)
        api = HfApi(token="hf_ann")
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns="README.md")


def test_pickled_weights_are_refused(hub: HubServer, client: HubClient) -> None:
    client.run(upload_pickled, "ann/pickled")
    assert "adapter_model.bin" in hub.storage.repositories["ann/pickled"].at("main").files
    with pytest.raises(RaisedInClient, match="no pickle is loaded"):
        client.run(load, "ann/pickled")
