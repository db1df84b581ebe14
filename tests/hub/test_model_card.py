"""Cards on the Hub: of `push_model_card`, and of Trainers that push."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from PIL import Image
from torch.utils.data import Dataset
from transformers import Trainer, ViTForImageClassification, ViTImageProcessor

from e2vpt_peft import E2VPTConfig, E2VPTTrainer, ModelCardTrainer, PruningConfig, push_model_card

from ..support.models import tiny_vit
from ..support.snippet import run_beside_an_image
from ..trainer.toy import TRAIN, VALIDATION, accuracy, arguments
from .client import HubClient, environment
from .server import HubServer

ANN = {"token": "hf_ann"}
LABELS = {index: f"corner {index}" for index in range(5)}


def backbone_from_hub() -> ViTForImageClassification:
    """A backbone with other classes than the task."""
    tiny_vit(num_labels=3).push_to_hub("ann/backbone", **ANN)
    ViTImageProcessor(size={"height": 16, "width": 16}).push_to_hub("ann/backbone", **ANN)
    return ViTForImageClassification.from_pretrained(
        "ann/backbone", id2label=LABELS, ignore_mismatched_sizes=True, label2id={name: i for i, name in LABELS.items()}
    )


def adapter() -> PeftModel:
    config = E2VPTConfig(num_visual_prompts=4, num_kv_prompts=2, num_segments=4, modules_to_save=["classifier"])
    return get_peft_model(backbone_from_hub(), config)  # type: ignore[return-value]


def push_with_card(repo: str, **details: Any) -> bool:
    model = adapter()
    model.push_to_hub(repo, **ANN)
    return push_model_card(model, repo, **ANN, **details) is not None


def write_readme(repo: str, text: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi(**ANN)
    api.create_repo(repo, exist_ok=True)
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo)


def readme(hub: HubServer, repo: str, branch: str = "main") -> str:
    content = hub.storage.repositories[repo].at(branch).files["README.md"].content
    assert content is not None
    return content.decode()


def snippet(card: str) -> str:
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    assert code.startswith("import e2vpt_peft")
    return code


def run(code: str) -> str:
    return run_beside_an_image(code)


# Without a Trainer


def test_a_pushed_card_says_what_the_hub_shows(hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    assert client.run(push_with_card, "ann/corners", dataset="ann/corners-data", metrics={"test_accuracy": 0.75})
    card = readme(hub, "ann/corners")
    data: Any = ModelCard(card).data
    assert data.base_model == "ann/backbone" and data.library_name == "peft"
    assert data.pipeline_tag == "image-classification" and data.datasets == ["ann/corners-data"]
    assert {"e2vpt", "image-classification", "base_model:adapter:ann/backbone"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.75, "test")
    assert client.run(run, snippet(card)) in LABELS.values()


@pytest.mark.slow
def test_the_code_runs_in_a_fresh_process(hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    """As a reader runs it, with nothing imported and nothing in the cache."""
    client.run(push_with_card, "ann/corners")
    Image.new("RGBA", (20, 30)).save(tmp_path / "image.png")
    path = f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = subprocess.run(
        [sys.executable, "-c", snippet(readme(hub, "ann/corners"))],
        cwd=tmp_path,
        env={**environment(hub.url, tmp_path / "hf"), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() in LABELS.values()


def test_pushing_the_model_again_keeps_the_card(hub: HubServer, client: HubClient) -> None:
    client.run(push_with_card, "ann/corners", dataset="ann/corners-data")
    card = readme(hub, "ann/corners")
    client.run(push_with_card, "ann/corners", dataset="ann/corners-data")
    assert readme(hub, "ann/corners") == card
    client.run(push_with_card, "ann/corners", dataset="ann/other-data")
    assert "ann/other-data" in readme(hub, "ann/corners") and "corners-data" not in readme(hub, "ann/corners")


def test_a_persons_card_on_the_hub_stays(hub: HubServer, client: HubClient) -> None:
    mine = "---\nlicense: mit # as agreed\n---\n\n# Corners\n\nMade by hand.\n"
    client.run(write_readme, "ann/corners", mine)
    assert not client.run(push_with_card, "ann/corners")
    assert "# Corners\n\nMade by hand.\n" in readme(hub, "ann/corners")


def push_branch(repo: str) -> None:
    model = adapter()
    model.push_to_hub(repo, revision="tuned", **ANN)
    push_model_card(model, repo, revision="tuned", **ANN)


def test_a_card_goes_to_its_branch(hub: HubServer, client: HubClient) -> None:
    client.run(push_branch, "ann/corners")
    assert "e2vpt" in ModelCard(readme(hub, "ann/corners", "tuned")).data.tags
    assert "README.md" not in hub.storage.repositories["ann/corners"].at("main").files


# With a Trainer


class FromHub(Dataset):
    """As the `datasets` library knows where its data come from."""

    class info:
        download_checksums = {"hf://datasets/ann/corners-data@abc/train.parquet": {}}
        config_name = "default"

    def __len__(self) -> int:
        return len(TRAIN)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return TRAIN[index]


def train_and_push(kind: type[Trainer], folder: Path, repo: str, readme: str | None = None, **options: Any) -> Any:
    """Push what a Trainer has trained, after another hand has written a card into the repository if one is given."""
    settings = {"num_train_epochs": 1, "eval_strategy": "epoch", "save_strategy": "epoch", **options}
    args = arguments(folder, push_to_hub=True, hub_model_id=repo, hub_token="hf_ann", **settings)
    pruning = {"pruning_config": PruningConfig([0.5], [0.0], tolerance=1e9)} if kind is E2VPTTrainer else {}
    trainer = kind(
        model=adapter(),
        args=args,
        train_dataset=FromHub(),
        eval_dataset=VALIDATION,
        compute_metrics=accuracy,
        processing_class=ViTImageProcessor(size={"height": 16, "width": 16}),
        **pruning,
    )
    trainer.train()
    if readme is not None:
        write_readme(repo, readme)
    metrics = trainer.evaluate()
    trainer.push_to_hub()
    return metrics


@pytest.mark.parametrize("kind", [Trainer, ModelCardTrainer, E2VPTTrainer])
def test_a_trainer_pushes(kind: type[Trainer], hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    metrics = client.run(train_and_push, kind, tmp_path / "out", "ann/corners")
    files = hub.storage.repositories["ann/corners"].at("main").files
    assert {"adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"} <= set(files)
    card = readme(hub, "ann/corners")
    data: Any = ModelCard(card).data
    assert data.base_model == "ann/backbone" and data.library_name == "peft"
    if kind is Trainer:
        return  # the card is transformers'
    assert data.datasets == ["ann/corners-data"]
    results = {(result.metric_type, result.dataset_split): result.metric_value for result in data.eval_results}
    assert results == {
        ("accuracy", "validation"): metrics["eval_accuracy"],
        ("loss", "validation"): metrics["eval_loss"],
    }
    assert "- learning_rate: 0.01\n" in card and "- num_epochs: 1\n" in card
    assert ("2 of 4 per layer (deep)" in card) == (kind is E2VPTTrainer)
    assert 'AutoImageProcessor.from_pretrained("ann/corners")' in card
    assert client.run(run, snippet(card)) in LABELS.values()


def test_a_card_is_there_while_training(hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    client.run(train_and_push, ModelCardTrainer, tmp_path / "out", "ann/corners", num_train_epochs=2)
    repository = hub.storage.repositories["ann/corners"]
    while_training = [one for one in repository.commits.values() if one.message.startswith("Training in progress")]
    assert while_training
    for commit in while_training:
        assert b"base_model: ann/backbone" in (commit.files["README.md"].content or b"")


def test_a_trainer_leaves_a_persons_card_on_the_hub(hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    mine = "---\nlicense: mit # as agreed\n---\n\n# Corners\n\nMade by hand.\n"
    client.run(train_and_push, ModelCardTrainer, tmp_path / "out", "ann/corners", readme=mine)
    assert readme(hub, "ann/corners") == mine
    assert (tmp_path / "out" / "README.md").read_text() == mine


def push_edit_and_push(folder: Path, repo: str) -> None:
    args = arguments(folder, push_to_hub=True, hub_model_id=repo, hub_token="hf_ann")
    trainer = ModelCardTrainer(model=adapter(), args=args)
    trainer.push_to_hub()
    path = folder / "README.md"
    path.write_text(path.read_text() + "\nMine, below.\n")
    trainer.push_to_hub(dataset="ann/corners-data")


def test_what_was_written_in_the_output_directory_is_pushed(hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    client.run(push_edit_and_push, tmp_path, "ann/corners")
    card = readme(hub, "ann/corners")
    assert card.endswith("\nMine, below.\n") and "ann/corners-data" in card
