"""Options: what they are, recipes, help, mistakes."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from pathlib import Path

import classification_arguments as script
import pytest
import yaml
from console import InputError
from transformers import TrainingArguments

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def test_options_are_those_of_the_config_classes(tmp_path: Path) -> None:
    args = script.parse(
        [
            f"--output_dir={tmp_path}",
            "--visual_prompt_depth=shallow",
            "--layers_to_transform",
            "0",
            "2",
            "--modules_to_save",
            "classifier",
            "norm",
            "--search=halving",
            "--no_share_kv_prompts",
        ]
    )
    assert args.prompts.visual_prompt_depth == "shallow"
    assert args.prompts.layers_to_transform == [0, 2]
    assert args.prompts.modules_to_save == ["classifier", "norm"]
    assert args.prompts.share_kv_prompts is False
    assert args.prompts.prompt_dropout == 0.1
    assert not args.pruning.prune and args.pruning.search == "halving"
    assert args.pruning.token_rates == pytest.approx([tenth / 10 for tenth in range(1, 10)])
    assert isinstance(args.training, TrainingArguments) and args.training.learning_rate == 5e-3
    assert args.training.do_train and args.training.do_eval and args.training.do_predict


def test_help_begins_with_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script.parse(["--help"], "What it does.\n\n    a command\n    another")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "What it does.\n\n    a command\n    another\n" in printed
    headings = [line for line in printed.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "the ten to know first:",
        "backbone:",
        "images:",
        "prompts: E2VPTConfig:",
        "pruning, with --prune: PruningConfig:",
        "training: all of transformers' TrainingArguments:",
    ]
    first = printed[: printed.index("backbone:\n")]
    assert re.findall(r"^  (--\w+)", first, re.MULTILINE) == [f"--{name}" for name in script.FIRST[1:]]
    options = re.findall(r"^  (--[\w-]+)", printed, re.MULTILINE)
    assert len(options) == len(set(options)), "an option is listed twice"
    for option in ("--model", "--num_segments", "--token_rates", "--push_to_hub", "--no_share_kv_prompts"):
        assert option in options
    assert "--num-segments" not in printed and "(default: None)" not in printed


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_recipe_and_overriding_flags(tmp_path: Path, suffix: str) -> None:
    recipe = {
        "output_dir": str(tmp_path / "out"),
        "num_visual_prompts": 3,
        "target_modules": ["attention"],
        "token_rates": [0.25],
        "horizontal_flip": True,
        "seed": 5,
    }
    path = tmp_path / f"recipe{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps({**recipe, "learning_rate": 0.02}))
    else:
        path.write_text(yaml.safe_dump(recipe) + "learning_rate: 2e-2\n")  # a string to YAML
    args = script.parse([str(path)])
    assert args.training.learning_rate == 0.02
    assert (args.training.seed, args.prompts.num_visual_prompts, args.data.horizontal_flip) == (5, 3, True)
    assert args.prompts.target_modules == ["attention"] and args.pruning.token_rates == [0.25]
    args = script.parse([str(path), "--seed=6", "--horizontal_flip=false", "--learning_rate=0.5"])
    assert (args.training.seed, args.training.learning_rate, args.data.horizontal_flip) == (6, 0.5, False)
    assert args.prompts.num_visual_prompts == 3


def test_mistakes_in_recipes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("num_visual_prompt: 3\n")
    with pytest.raises(InputError, match="no option num_visual_prompt; did you mean num_visual_prompts?"):
        script.parse([str(path)])
    path.write_text("- 3\n")
    with pytest.raises(InputError, match="must map options to values"):
        script.parse([str(path)])
    path.write_text("seed: [3\n")
    with pytest.raises(InputError, match="recipe.yaml cannot be read: "):
        script.parse([str(path)])
    with pytest.raises(InputError, match="There is no recipe .*missing.yaml"):
        script.parse([str(tmp_path / "missing.yaml")])


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--num_visual_promts", "5"], "there is no option --num_visual_promts; did you mean --num_visual_prompts?"),
        (["--learning-rat=5"], ""),  # the beginning of one
        (["--weight-decoy=5"], "there is no option --weight_decoy; did you mean --weight_decay?"),
        (["--zzz"], "there is no option --zzz."),
        (["--seed=3", "mine.yaml"], "mine.yaml belongs to no option; a recipe goes in front of all options."),
    ],
)
def test_mistyped_options(words: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not answer:
        assert script.parse(words).training.learning_rate == 5
        return
    with pytest.raises(SystemExit) as stop:
        script.parse(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {answer}\n")


def test_papers_settings() -> None:
    settings = json.loads((RECIPES / "paper_settings.json").read_text())
    tasks = settings["tasks"]
    assert len(tasks) == 19 + 5
    for group in ("natural", "specialized", "structured"):
        mean = statistics.mean(task["accuracy"] for task in tasks.values() if task["group"] == group)
        assert mean == pytest.approx(settings["mean_accuracy"][group], abs=0.011)
    assert Counter(task["group"] for task in tasks.values()) == {
        "natural": 7,
        "specialized": 4,
        "structured": 8,
        "fgvc": 5,
    }
    assert len(settings["grid"]["base_learning_rate"]) == 10 and len(settings["grid"]["weight_decay"]) == 4
    options = script.names_of(
        script.ModelArguments, script.DataArguments, script.PromptArguments, script.PruningArguments, TrainingArguments
    )
    names = [*settings["grid"], *settings["pruning"], *settings["final_runs"], "num_visual_prompts", "num_kv_prompts"]
    assert set(names) <= options
    assert all((RECIPES / task["recipe"]).exists() for task in tasks.values())
