"""Text and sound from end to end: trained by the Trainer on padded batches, saved, and loaded with the same result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import PeftModel, get_peft_model

from e2vpt_peft import E2VPTConfig

from ..support.models import prompt_parameters
from ..support.zoo import WAVES, WORDS
from ..trainer.toy import arguments

IGNORED = -100  # the label of padding, which no loss counts


def sentences(number: int, seed: int) -> list[dict[str, Any]]:
    """Sentences of different lengths; a word's label is whether its number is high."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in torch.randint(3, 10, (number,), generator=generator).tolist():
        ids = torch.randint(3, 30, (length,), generator=generator)
        samples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids > 16).long()})
    return samples


def waves(number: int, seed: int) -> list[dict[str, Any]]:
    """Tones of different lengths over noise; the label is the pitch."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(number):
        length = int(torch.randint(200, 400, (), generator=generator))
        tone = torch.sin(torch.arange(length) * (0.1, 0.5, 1.5)[index % 3])
        sound = tone + 0.2 * torch.randn(length, generator=generator)
        samples.append({"input_values": sound, "attention_mask": torch.ones(length).long(), "labels": index % 3})
    return samples


def pad(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch, as long as its longest sample."""
    fill = {"labels": IGNORED, "input_ids": 1, "attention_mask": 0, "input_values": 0.0}
    return {
        key: torch.nn.utils.rnn.pad_sequence([sample[key] for sample in samples], True, fill[key])
        if isinstance(samples[0][key], torch.Tensor)
        else torch.tensor([sample[key] for sample in samples])
        for key in samples[0]
    }


Case = tuple[type[t.PreTrainedModel], t.PreTrainedConfig, Callable[..., list[dict[str, Any]]], list[str]]

MODERN = t.ModernBertConfig(**WORDS, pad_token_id=1, local_attention=4, num_labels=2)
DISTILLED = t.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=30, num_labels=2)
CASES: dict[str, Case] = {
    "bert": (t.BertForTokenClassification, t.BertConfig(**WORDS, num_labels=2), sentences, ["classifier"]),
    "distilbert": (t.DistilBertForTokenClassification, DISTILLED, sentences, ["classifier"]),
    "roberta": (t.RobertaForTokenClassification, t.RobertaConfig(**WORDS, num_labels=2), sentences, ["classifier"]),
    "modernbert": (t.ModernBertForTokenClassification, MODERN, sentences, ["head", "classifier"]),
    "wav2vec2": (
        t.Wav2Vec2ForSequenceClassification,
        t.Wav2Vec2Config(**WAVES, num_labels=3),
        waves,
        ["projector", "classifier"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_trained_on_padded_batches_saved_and_loaded(name: str, tmp_path: Path) -> None:
    architecture, model_config, samples, head = CASES[name]

    def make() -> t.PreTrainedModel:
        torch.manual_seed(0)
        return architecture(model_config)

    def trainer_of(model: Any) -> t.Trainer:
        return t.Trainer(
            model,
            arguments(tmp_path, num_train_epochs=10, learning_rate=3e-2, seed=1),
            train_dataset=samples(48, seed=1),
            eval_dataset=samples(24, seed=2),
            data_collator=pad,
        )

    config = E2VPTConfig(num_visual_prompts=4, num_kv_prompts=2, modules_to_save=head)
    model = get_peft_model(make(), config)
    initial = {key: value.detach().clone() for key, value in prompt_parameters(model).items()}
    trainer = trainer_of(model)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.6 * before
    assert not any(torch.equal(value, initial[key]) for key, value in prompt_parameters(model).items())

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    unseen = samples(20, seed=3)
    expected, actual = (trainer_of(each).predict(unseen).predictions for each in (model, loaded))
    assert (actual == expected).all()
