from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from e2vpt_peft import ModelCardTrainer

from ..support.models import tiny_vit
from .toy import TRAIN, VALIDATION, accuracy, adapted, arguments, make_trainer, pruning

PERSONS = "---\nlicense: mit   # as agreed\ntags: [mine]\n---\n\n# Corners\n\nMade by hand.\n"


def plain_trainer(folder: Path, model: Any = None, **options: Any) -> ModelCardTrainer:
    return ModelCardTrainer(
        model=adapted() if model is None else model,
        args=arguments(folder, **options),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        compute_metrics=accuracy,
    )


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def results(folder: Path) -> dict[str, float]:
    data: Any = ModelCard(card(folder)).data
    return {f"{one.dataset_split}_{one.metric_type}": one.metric_value for one in data.eval_results or []}


def test_a_saved_adapter_has_a_card(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, save_strategy="epoch", eval_strategy="epoch", num_train_epochs=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset="me/corners", license="mit", tags="mine", model_name="corners")
    text = card(tmp_path)
    data: Any = ModelCard(text).data
    assert data.license == "mit" and {"mine", "e2vpt"} <= set(data.tags) and data.datasets == ["me/corners"]
    assert "\n# corners\n" in text and "- learning_rate: 0.01\n" in text
    evaluation = trainer.evaluate()
    assert results(tmp_path) == {
        "validation_loss": evaluation["eval_loss"],
        "validation_accuracy": evaluation["eval_accuracy"],
    }
    assert "- PEFT " in card(tmp_path / "checkpoint-4")
    trainer.save_model()
    assert card(tmp_path) == text, "what create_model_card was given is kept"


def test_results_are_those_of_the_saved_weights(tmp_path: Path) -> None:
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "earliness", "greater_is_better": True}
    trainer = plain_trainer(tmp_path, **options, **best)
    turns = count()
    trainer.compute_metrics = lambda prediction: {"earliness": -next(turns)}
    trainer.train()
    first, last = (entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert first != last
    trainer.create_model_card(dataset="corners")
    assert results(tmp_path)["validation_loss"] == first
    evaluation = trainer.evaluate(metric_key_prefix="test")
    assert evaluation["test_loss"] == pytest.approx(first)
    trainer.create_model_card()
    assert results(tmp_path)["test_loss"] == evaluation["test_loss"]
    assert results(tmp_path)["validation_loss"] == first


def test_no_results_of_other_weights(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    trainer = plain_trainer(tmp_path, max_steps=4, **options)
    trainer.train()
    assert "## Results" not in card(tmp_path / "checkpoint-3")
    assert "## Results" in card(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("again", [False, True])
def test_a_persons_card_stays_to_the_byte(again: bool, tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path)
    if again:
        trainer.save_model()
    (tmp_path / "README.md").write_text(PERSONS)
    trainer.save_model()
    trainer.create_model_card(dataset="corners")
    assert card(tmp_path) == PERSONS


def test_adapters_of_other_methods_get_the_card_of_transformers(tmp_path: Path) -> None:
    model = get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj", "query"]))
    trainer = plain_trainer(tmp_path, model)
    trainer.save_model()
    trainer.create_model_card()
    assert "generated automatically according to the information the Trainer had" in card(tmp_path)


class TestSearch:
    def test_the_card_is_about_the_winner(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, config=pruning(tolerance=1e9, metric_for_best_model="accuracy"))
        trainer.train()
        trainer.create_model_card(dataset="corners")
        found = json.loads((tmp_path / "pruning_results.json").read_text())
        best = next(row for row in found["candidates"] if row["name"] == found["best"])
        assert results(tmp_path) == {"validation_accuracy": best["metric"]}
        text = card(tmp_path)
        assert found["message"] in text and f"| visual prompts | 4 | {best['tokens']} |" in text
        assert "importance `removal`" in text and "rates of 0.25, 0.5 (visual prompts) and 0, 0.5 (segments)" in text
        evaluation = trainer.evaluate()
        trainer.save_model()
        assert results(tmp_path) == {
            "validation_accuracy": evaluation["eval_accuracy"],
            "validation_loss": evaluation["eval_loss"],
        }
        assert evaluation["eval_accuracy"] == best["metric"]

    def test_a_final_training_has_no_results_until_it_is_evaluated(self, tmp_path: Path) -> None:
        config = pruning(token_rates=[0.5], segment_rates=[0.0], tolerance=1e9)
        trainer = make_trainer(tmp_path, config=config, final_train_dataset=VALIDATION, num_train_epochs=1)
        trainer.train()
        trainer.create_model_card(dataset="corners")
        assert results(tmp_path) == {} and "## Pruning" in card(tmp_path)
        evaluation = trainer.evaluate(metric_key_prefix="test")
        trainer.create_model_card()
        assert results(tmp_path)["test_accuracy"] == evaluation["test_accuracy"]

    def test_cards_of_the_phases_are_about_their_weights(self, tmp_path: Path) -> None:
        seen = {}

        class Watch(TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                seen[folder] = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry][-1]

        config = pruning(token_rates=[0.5], segment_rates=[0.0], tolerance=1e9)
        options = {"num_train_epochs": 1, "eval_strategy": "epoch", "save_strategy": "epoch"}
        trainer = make_trainer(tmp_path, config=config, callbacks=[Watch()], **options)
        cards = {}
        write = trainer._write_card

        def record(folder: Path) -> None:
            write(folder)
            cards[folder.parent] = card(folder)  # files go into a folder of their own until all are whole

        trainer._write_card = record
        trainer.train()
        assert len(seen) == 2
        for folder, loss in seen.items():
            assert f"| loss | validation | {loss:.4g} |" in cards[folder]
