"""The paper's four backbones from end to end, each loaded the way that its checkpoints are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as t
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from e2vpt_peft import E2VPTConfig, E2VPTLayer, prune_prompts, rewind_prompts, score_prompts

from ..support.models import prompt_parameters, randomized
from ..support.zoo import IMAGE, MAE, SWIN
from ..trainer.toy import arguments

COUNTS: dict[str, Any] = {"num_visual_prompts": 4, "num_kv_prompts": 2}


def coloured(number: int, size: int, seed: int) -> list[dict[str, Any]]:
    """Noise with a tint, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    tints = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])
    noise = torch.randn(number, 3, size, size, generator=generator)
    return [
        {"pixel_values": image + 0.7 * tints[index % 5, :, None, None], "labels": index % 5}
        for index, image in enumerate(noise)
    ]


def moco_v3(config: t.ViTConfig, folder: Path) -> None:
    """A ViT with neither head nor pooler, and fixed sine-cosine position embeddings."""
    model = randomized(t.ViTModel(config, add_pooling_layer=False))
    size = config.image_size // config.patch_size
    places = torch.arange(size)[:, None] * 10000.0 ** -torch.linspace(0, 1, config.hidden_size // 4)
    waves = torch.cat([places.sin(), places.cos()], 1)
    grid = torch.cat([waves[:, None].expand(-1, size, -1), waves.expand(size, -1, -1)], 2).flatten(0, 1)
    with torch.no_grad():
        model.embeddings.position_embeddings.copy_(torch.cat([torch.zeros(1, config.hidden_size), grid]))
    model.save_pretrained(folder)


class Backbone(NamedTuple):
    """How a checkpoint is made, the class of model it is loaded into, and the size of its images."""

    save: Callable[[Path], None]
    model: type[t.PreTrainedModel]
    size: int = 16

    def load(self, folder: Path, **kwargs: Any) -> Any:
        torch.manual_seed(1)  # of the new head
        return self.model.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True, **kwargs)


BACKBONES = {
    "ViT": Backbone(
        lambda folder: randomized(t.ViTForImageClassification(t.ViTConfig(**IMAGE))).save_pretrained(folder),
        t.ViTForImageClassification,
    ),
    "Swin": Backbone(
        lambda folder: randomized(t.SwinForImageClassification(t.SwinConfig(**SWIN))).save_pretrained(folder),
        t.SwinForImageClassification,
        size=32,
    ),
    "MAE": Backbone(
        lambda folder: randomized(t.ViTMAEForPreTraining(t.ViTMAEConfig(**MAE))).save_pretrained(folder),
        t.ViTForImageClassification,
    ),
    "MoCo v3": Backbone(lambda folder: moco_v3(t.ViTConfig(**IMAGE), folder), t.ViTForImageClassification),
}
all_backbones = pytest.mark.parametrize("name", BACKBONES)


def make_trainer(model: Any, name: str, folder: Path) -> t.Trainer:
    size = BACKBONES[name].size
    return t.Trainer(
        model,
        arguments(folder, num_train_epochs=10, seed=1),
        train_dataset=coloured(40, size, seed=1),
        eval_dataset=coloured(40, size, seed=2),
    )


def train(model: Any, name: str, folder: Path) -> tuple[float, float]:
    """The loss on images that are not trained on, before and after the training."""
    trainer = make_trainer(model, name, folder)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


def predict(model: Any, name: str, folder: Path) -> torch.Tensor:
    unseen = coloured(20, BACKBONES[name].size, seed=3)
    return torch.as_tensor(make_trainer(model, name, folder).predict(unseen).predictions)


@pytest.mark.slow
@all_backbones
def test_tuned_scored_pruned_rewound_tuned_again_and_saved(name: str, tmp_path: Path) -> None:
    backbone, checkpoint, adapter = BACKBONES[name], tmp_path / "checkpoint", tmp_path / "adapter"
    backbone.save(checkpoint)
    model = get_peft_model(backbone.load(checkpoint), E2VPTConfig(**COUNTS, modules_to_save=["classifier"]))
    initial = {key: value.detach().clone() for key, value in prompt_parameters(model).items()}

    before, after = train(model, name, tmp_path)
    assert after < 0.6 * before
    moved = {key: (value - initial[key]).abs().max() for key, value in prompt_parameters(model).items()}
    assert all(distance > 0 for distance in moved.values())

    scores = score_prompts(model, DataLoader(coloured(40, backbone.size, seed=1), batch_size=8))
    assert scores.tokens.shape == (4,) and scores.segments.shape == (4, 16)
    assert scores.tokens.isfinite().all() and scores.segments.isfinite().all() and len(scores.tokens.unique()) == 4
    prune_prompts(model, scores, token_rate=0.5, segment_rate=0.5)
    rewind_prompts(model)
    for key, value in prompt_parameters(model).items():
        assert torch.isin(value, initial[key]).all()
        assert value.numel() == (initial[key].numel() // 4 if "visual" in key else initial[key].numel())
    before, after = train(model, name, tmp_path)
    assert after < 0.6 * before

    model.save_pretrained(adapter)
    loaded = PeftModel.from_pretrained(backbone.load(checkpoint), adapter)
    assert torch.equal(predict(loaded, name, tmp_path), predict(model, name, tmp_path))


@all_backbones
def test_only_the_head_of_a_checkpoint_is_new(name: str, tmp_path: Path) -> None:
    BACKBONES[name].save(tmp_path)
    _, info = BACKBONES[name].load(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert all(key.startswith("decoder.") for key in info["unexpected_keys"])


@torch.no_grad()
def test_the_encoder_of_mae_arrives_in_a_vit(tmp_path: Path) -> None:
    """Under the names that published checkpoints use.

    transformers warns that a `vit_mae` becomes a `vit`, reports the decoder as unexpected, and the head as missing.
    """
    pretrained = randomized(t.ViTMAEForPreTraining(t.ViTMAEConfig(**MAE)))
    pretrained.save_pretrained(tmp_path)
    assert "vit.encoder.layer.0.attention.attention.query.weight" in load_file(tmp_path / "model.safetensors")
    vit = t.ViTForImageClassification.from_pretrained(tmp_path, num_labels=5)
    arrived = dict(vit.vit.named_parameters())
    assert arrived.keys() == dict(pretrained.vit.named_parameters()).keys()
    assert all(torch.equal(arrived[key], value) for key, value in pretrained.vit.named_parameters())


def test_swin_has_prompts_as_wide_as_each_stage_and_shifted_windows(tmp_path: Path) -> None:
    BACKBONES["Swin"].save(tmp_path)
    model = get_peft_model(BACKBONES["Swin"].load(tmp_path), E2VPTConfig(**COUNTS))
    prompts = [value for key, value in prompt_parameters(model).items() if "visual" in key]
    assert [tuple(value.shape) for value in prompts] == [(4, 16), (4, 16), (4, 32)]
    blocks = [block for stage in model.base_model.model.swin.encoder.layers for block in stage.blocks]
    assert all(isinstance(block.attention, E2VPTLayer) for block in blocks)
    assert any(block.shift_size for block in blocks)
