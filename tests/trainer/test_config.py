from __future__ import annotations

import dataclasses

import pytest
from transformers import HfArgumentParser, TrainingArguments

from e2vpt_peft import PruningArguments, PruningConfig
from e2vpt_peft.trainer.config import Metric

from .toy import arguments, make_trainer, pruning


def test_the_default_is_the_grid_of_the_paper():
    config = PruningConfig()
    assert config.search == "grid"
    assert config.token_rates == config.segment_rates == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert config.min_tokens == 1
    assert config.tolerance == 0


def test_every_field_has_a_help_text():
    assert all(field.metadata.get("help") for field in dataclasses.fields(PruningConfig))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"token_rates": [0.1, 1.0]}, ValueError, ["token_rates=[0.1, 1.0]", "[0, 1)"]),
        ({"token_rates": [50]}, ValueError, ["token_rates=[50]", "not percent"]),
        ({"segment_rates": []}, ValueError, ["segment_rates=[]"]),
        ({"segment_rates": [-0.1]}, ValueError, ["segment_rates=[-0.1]"]),
        ({"segment_rates": 0.5}, TypeError, ["segment_rates=0.5", "list"]),
        ({"importance": "magic"}, ValueError, ["importance='magic'", "'removal'", "'leave_one_out'"]),
        ({"search": "random"}, ValueError, ["search='random'", "'grid' or 'halving'"]),
        ({"rewind": "never"}, ValueError, ["rewind='never'", "'saved' or 'fresh'"]),
        ({"tolerance": -1}, ValueError, ["tolerance=-1"]),
        ({"tolerance": float("nan")}, ValueError, ["tolerance=nan"]),
        ({"tolerance": "much"}, TypeError, ["tolerance='much'"]),
        ({"min_tokens": 0}, ValueError, ["min_tokens=0"]),
        ({"min_tokens": None}, TypeError, ["min_tokens=None"]),
        ({"min_segments": 1.5}, TypeError, ["min_segments=1.5"]),
        ({"max_score_batches": 0}, ValueError, ["max_score_batches=0"]),
        ({"halving_factor": 1}, ValueError, ["halving_factor=1"]),
        ({"halving_rounds": 0}, ValueError, ["halving_rounds=0"]),
        ({"metric_for_best_model": 1}, TypeError, ["metric_for_best_model=1"]),
        ({"greater_is_better": "yes"}, TypeError, ["greater_is_better='yes'"]),
    ],
)
def test_an_error_names_the_field_and_the_value(arguments, error, words):
    with pytest.raises(error) as raised:
        PruningConfig(**arguments)
    for word in words:
        assert word in str(raised.value)


def test_rates_are_sorted_and_each_is_tried_once():
    assert PruningConfig(token_rates=(0.5, 0, 0.5)).token_rates == [0.0, 0.5]


def test_it_can_be_given_on_the_command_line():
    (config,) = HfArgumentParser(PruningConfig).parse_args_into_dataclasses(
        [
            "--token_rates",
            "0.2",
            "0.4",
            "--segment_rates",
            "0",
            "--search",
            "halving",
            "--min_segments",
            "2",
            "--tolerance",
            "0.01",
        ]
    )
    assert config == PruningConfig(
        token_rates=[0.2, 0.4], segment_rates=[0.0], search="halving", min_segments=2, tolerance=0.01
    )


def test_on_one_command_line_with_training_arguments_the_metric_is_common():
    parser = HfArgumentParser((TrainingArguments, PruningArguments))
    arguments, config = parser.parse_args_into_dataclasses(
        ["--output_dir", "out", "--use_cpu", "--metric_for_best_model", "accuracy", "--token_rates", "0.5"]
    )
    assert arguments.metric_for_best_model == "accuracy"
    assert config == PruningArguments(token_rates=[0.5])
    with pytest.raises(ValueError, match="halving_rounds=0"):
        parser.parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", "--halving_rounds", "0"])


def test_arguments_are_a_config_without_the_metric(tmp_path):
    trainer = make_trainer(tmp_path, config=PruningArguments(token_rates=[0.5], tolerance=0.1))
    assert trainer.pruning_config == PruningConfig(token_rates=[0.5], tolerance=0.1)


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ({}, {}, ("eval_loss", False)),
        ({}, {"metric_for_best_model": "accuracy"}, ("eval_accuracy", True)),
        ({}, {"metric_for_best_model": "error", "greater_is_better": False}, ("eval_error", False)),
        ({"metric_for_best_model": "eval_accuracy"}, {"metric_for_best_model": "loss"}, ("eval_accuracy", True)),
        ({"metric_for_best_model": "error", "greater_is_better": False}, {}, ("eval_error", False)),
    ],
)
def test_which_metric_decides(tmp_path, config, options, expected):
    assert Metric.of(pruning(**config), arguments(tmp_path, **options)) == expected
