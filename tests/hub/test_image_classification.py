"""`examples/image_classification.py --push_to_hub`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from .client import HubClient
from .server import HubServer
from .test_model_card import readme, run, snippet

ROOT = Path(__file__).parents[2]
OPTIONS = [
    "--num_visual_prompts=4",
    "--num_segments=4",
    "--num_train_epochs=1",
    "--max_train_samples=40",
    "--max_eval_samples=20",
    "--use_cpu",
    "--disable_tqdm=true",
    "--push_to_hub",
    "--hub_model_id=ann/digits",
    "--hub_token=hf_ann",
]


def run_script(folder: Path, options: list[str]) -> dict[str, float]:
    import image_classification as script
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    backbone = ROOT / "examples" / "backbone"
    AutoModelForImageClassification.from_pretrained(backbone).push_to_hub("ann/backbone", token="hf_ann")
    AutoImageProcessor.from_pretrained(backbone).push_to_hub("ann/backbone", token="hf_ann")
    return script.main([*OPTIONS, "--model=ann/backbone", f"--output_dir={folder}", *options])


@pytest.mark.parametrize(
    "options",
    [[], ["--prune", "--token_rates", "0.5", "--segment_rates", "0", "--tolerance=1"]],
    ids=["plain", "prune"],
)
def test_the_script_pushes(options: list[str], hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    metrics = client.run(run_script, tmp_path, options)
    files = hub.storage.repositories["ann/digits"].at("main").files
    wanted = {"adapter_config.json", "adapter_model.safetensors", "config.json", "preprocessor_config.json"}
    assert wanted <= set(files)
    assert not any(name.startswith(("checkpoint-", "_pruning_state")) for name in files)
    card = readme(hub, "ann/digits")
    data: Any = ModelCard(card).data
    assert (data.base_model, data.pipeline_tag, data.datasets) == ("ann/backbone", "image-classification", None)
    results = {(one.metric_type, one.dataset_split): one.metric_value for one in data.eval_results}
    assert results["accuracy", "test"] == metrics["test_accuracy"]
    assert results["accuracy", "validation"] == metrics["eval_accuracy"]
    assert ("## Pruning" in card) == bool(options)
    assert client.run(run, snippet(card)) in map(str, range(10))
