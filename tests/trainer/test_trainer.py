from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import ExportableState

from e2vpt_peft import E2VPTConfig, prune_prompts, rewind_prompts, score_prompts

from ..support.models import images, tiny_vit
from .toy import TRAIN, VALIDATION, accuracy, adapted, arguments, make_trainer, pruning, taken


class Trainings(TrainerCallback):
    """Counts trainings, and keeps what was logged and for how many epochs was trained."""

    def __init__(self):
        self.folders, self.epochs, self.logs, self.accuracies = [], [], [], defaultdict(list)

    def on_train_begin(self, args, state, control, **kwargs):
        self.folders.append(args.output_dir.rpartition("/")[2])

    def on_train_end(self, args, state, control, **kwargs):
        self.epochs.append(state.epoch)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.accuracies[args.output_dir.rpartition("/")[2]].append(metrics.get("eval_accuracy"))

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def same(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)


def snapshot(trainer):
    return taken(trainer.model)


def phase(folder, name):
    """The tensors that a phase has left."""
    return load_file(Path(str(folder)) / "_pruning_state" / f"{name}.safetensors")


def size_preferred(sign):
    """A metric that says which size is good, whatever the training: parameters times `sign`."""

    def attach(trainer):
        trainer.compute_metrics = lambda _: {
            "size": sign * float(sum(p.numel() for n, p in trainer.model.named_parameters() if "e2vpt_visual" in n))
        }
        return trainer

    return attach


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One search, looked at by several tests."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    trainings = Trainings()
    trainer = make_trainer(folder, callbacks=[trainings])
    output = trainer.train()
    return trainer, output, trainings, folder


def test_the_model_is_left_as_the_best_adapter(run):
    trainer, output, _, _ = run
    rows = output.metrics["pruning_candidates"]
    best = min(rows[1:], key=lambda row: row["metric"])
    assert best["metric"] <= rows[0]["metric"], "the toy task should let pruning win"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["metric"], abs=1e-6)
    assert output.metrics["pruning_metric"] == best["metric"]
    config = trainer.model.peft_config["default"]
    assert sum(config.token_mask) == best["tokens"]
    prompts = [p for n, p in trainer.model.named_parameters() if "e2vpt_" in n]
    assert sum(p.numel() for p in prompts) == best["parameters"] == output.metrics["pruning_parameters"]
    assert all(p.requires_grad for p in prompts)


def test_the_table_is_in_the_output_and_in_a_file(run):
    trainer, output, trainings, folder = run
    results = json.loads((folder / "pruning_results.json").read_text())
    assert results["candidates"] == output.metrics["pruning_candidates"]
    assert [row["rates"] for row in results["candidates"]] == [
        [[0, 0]],
        [[0.25, 0]],
        [[0.25, 0.5]],
        [[0.5, 0]],
        [[0.5, 0.5]],
    ]
    assert [(row["tokens"], row["segments"]) for row in results["candidates"]] == [
        (4, 16),
        (3, 12),
        (3, 6),
        (2, 8),
        (2, 4),
    ]
    assert all(row["epochs"] == 2 and math.isfinite(row["metric"]) for row in results["candidates"])
    assert results["epochs"] == output.metrics["pruning_epochs"] == 10
    assert output.global_step == 5 * 2 * 4
    assert trainings.folders == ["tune"] + [f"candidate-{n}" for n in (1, 2, 3, 4)]


def test_every_phase_is_logged(run):
    trainer, _, trainings, _ = run
    phases = [logs for logs in trainings.logs if "phase" in logs]
    assert [logs["phase"] for logs in phases] == [
        "start",
        "score",
        "tune",
        *(f"candidate-{n}" for n in (1, 2, 3, 4)),
        "done",
    ]
    for logs in phases[2:]:
        assert {"visual_prompts", "segments", "parameters", "eval_loss"} <= logs.keys()
    assert "visual prompts" in phases[-1]["message"]
    logged = [logs["phase"] for logs in trainer.state.log_history if "phase" in logs]
    assert logged == [logs["phase"] for logs in phases]


def test_metrics_can_be_printed_and_saved(run, capsys):
    trainer, output, _, folder = run
    trainer.log_metrics("train", output.metrics)
    assert "5 rows" in capsys.readouterr().out
    trainer.save_metrics("train", output.metrics)
    assert len(json.loads((folder / "train_results.json").read_text())["pruning_candidates"]) == 5


def test_a_candidate_is_what_pruning_by_hand_gives(run, tmp_path):
    _, _, _, folder = run
    model = adapted()

    def train():
        set_seed(42)
        plain = Trainer(model=model, args=arguments(tmp_path), train_dataset=TRAIN, eval_dataset=VALIDATION)
        plain.train()
        return plain

    plain = train()
    same(taken(model), phase(folder, "tune"))
    scores = score_prompts(model, plain.get_test_dataloader(TRAIN), progress_bar=False)
    prune_prompts(model, scores, token_rate=0.25, segment_rate=0.5)
    rewind_prompts(model)
    train()
    same(taken(model), phase(folder, "candidate-2"))


def test_the_result_saves_loads_and_rewinds_to_the_initial_values(run, tmp_path):
    trainer, _, _, _ = run
    trainer.save_model(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), tmp_path).eval()
    model = copy.deepcopy(trainer.model).eval()
    assert torch.equal(loaded(pixel_values=images()).logits, model(pixel_values=images()).logits)
    rewind_prompts(model, undo_pruning=True)
    same(taken(model), taken(adapted()))


def test_arguments_and_other_files_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "file").write_text("mine too")
    trainer = make_trainer(tmp_path, save_strategy="epoch")
    before = trainer.args.to_dict()
    args = trainer.args
    trainer.train()
    assert trainer.args is args
    assert trainer.args.to_dict() == before
    assert trainer.train_dataset is TRAIN
    assert {path.name for path in tmp_path.iterdir()} - {"pruning_results.png"} == {
        "notes.txt",
        "checkpoint-7",
        "_pruning_state",
        "pruning_results.json",
    }
    assert (tmp_path / "checkpoint-7" / "file").read_text() == "mine too"
    assert not list((tmp_path / "_pruning_state").rglob("checkpoint-*")), "checkpoints of finished phases are not kept"


def test_a_folder_of_the_user_by_the_name_of_the_state_is_not_touched(tmp_path):
    (tmp_path / "_pruning_state").mkdir()
    (tmp_path / "_pruning_state" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="_pruning_state"):
        make_trainer(tmp_path).train()
    assert [path.name for path in (tmp_path / "_pruning_state").iterdir()] == ["file"]


@pytest.mark.parametrize("tolerance", [0.0, 1e6])
def test_nothing_is_pruned_if_that_is_worse_by_more_than_the_tolerance(tmp_path, tolerance, caplog):
    config = pruning(metric_for_best_model="size", tolerance=tolerance)
    trainer = size_preferred(+1)(make_trainer(tmp_path, config=config))
    output = trainer.train()
    masks = trainer.model.peft_config["default"].token_mask
    if tolerance:
        assert sum(masks) == 3
    else:
        assert masks is None
        assert "Nothing was pruned" in output.metrics["pruning_message"]
        assert "Nothing was pruned" in json.loads((tmp_path / "pruning_results.json").read_text())["message"]
        assert "Nothing was pruned" in caplog.text
        same(snapshot(trainer), phase(tmp_path, "tune"))


def test_the_best_metric_wins(tmp_path):
    config = pruning(metric_for_best_model="size")
    trainer = size_preferred(-1)(make_trainer(tmp_path, config=config))
    output = trainer.train()
    assert sum(trainer.model.peft_config["default"].token_mask) == 2
    assert output.metrics["pruning_candidates"][-1]["metric"] == output.metrics["pruning_metric"]


def test_halving_needs_fewer_epochs_and_its_winner_is_fully_trained(tmp_path, run):
    _, _, _, grid = run
    trainings = Trainings()
    config = pruning(search="halving", halving_factor=2, halving_rounds=2)
    trainer = make_trainer(tmp_path, config=config, callbacks=[trainings])
    output = trainer.train()
    assert trainings.epochs == [2, 1, 1, 1, 1, 2, 2]
    rows = output.metrics["pruning_candidates"]
    assert sorted(row["epochs"] for row in rows) == [1, 1, 2, 3, 3]
    assert output.metrics["pruning_epochs"] == 10
    finalists = [row for row in rows[1:] if row["epochs"] == 3]
    for row in finalists:  # the same training as in the grid
        same(phase(tmp_path, row["name"]), phase(grid, row["name"]))
    assert output.metrics["pruning_metric"] in [row["metric"] for row in [rows[0], *finalists]]


def test_steps_and_warm_up_are_halved_too(tmp_path):
    seen = []

    class Steps(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append((args.max_steps, args.warmup_steps))

    config = pruning(search="halving", token_rates=[0.5])
    trainer = make_trainer(tmp_path, config=config, max_steps=9, warmup_steps=3, callbacks=[Steps()])
    trainer.train()
    assert seen == [(9, 3)] + [(1, 0)] * 2 + [(3, 1), (9, 3)]


def test_the_best_checkpoint_and_early_stopping_work_in_every_phase(tmp_path):
    trainings = Trainings()
    trainer = make_trainer(
        tmp_path,
        callbacks=[trainings, EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9)],
        num_train_epochs=4,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        learning_rate=0.05,
    )
    output = trainer.train()
    # The threshold is out of reach: the second epoch of every phase is the last one, not the first.
    assert trainings.epochs == [2] * 5
    for row in output.metrics["pruning_candidates"]:
        *during, after = trainings.accuracies[row["phase"]]
        assert row["metric"] == after == max(during)
    rewind_prompts(trainer.model, undo_pruning=True)
    same(snapshot(trainer), taken(adapted()))


def test_callbacks_that_count_begin_anew_in_every_phase(tmp_path):
    begun = []

    class Counts(TrainerCallback, ExportableState):
        steps = 0

        def state(self):
            return {"args": {}, "attributes": {"steps": self.steps}}

        def on_train_begin(self, *args, **kwargs):
            begun.append(self.steps)

        def on_step_end(self, *args, **kwargs):
            self.steps += 1

    make_trainer(tmp_path, config=pruning(token_rates=[0.5]), callbacks=[Counts()]).train()
    assert begun == [0, 0, 0]


def test_fresh_values_are_the_same_for_every_candidate_and_not_the_saved_ones(tmp_path, run):
    starts = {}

    class Starts(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            starts[args.output_dir.rpartition("/")[2]] = model.base_model.model.vit.layers[0].attention.full_prompts(
                "default"
            )

    config = pruning(rewind="fresh", segment_rates=[0.0])
    trainer = make_trainer(tmp_path, config=config, callbacks=[Starts()])
    trainer.train()
    kept = (starts["candidate-2"] != 0).any(-1)
    assert kept.sum() == 2
    assert torch.equal(starts["candidate-1"][kept], starts["candidate-2"][kept])
    assert not torch.equal(starts["candidate-1"][kept], starts["tune"][kept])


def test_a_loaded_adapter_needs_fresh_values(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")

    def loaded():
        return PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), tmp_path / "adapter", is_trainable=True)

    with pytest.raises(ValueError, match="rewind='saved'.*PruningConfig\\(rewind='fresh'\\)"):
        make_trainer(tmp_path / "out", model=loaded()).train()
    config = pruning(rewind="fresh", token_rates=[0.5], segment_rates=[0.5])
    output = make_trainer(tmp_path / "out", model=loaded(), config=config).train()
    assert len(output.metrics["pruning_candidates"]) == 2


def test_the_winner_is_trained_at_last_on_a_dataset_of_its_own(tmp_path, run):
    _, searched, _, _ = run
    trainings = Trainings()
    trainer = make_trainer(
        tmp_path, final_train_dataset=torch.utils.data.ConcatDataset([TRAIN, VALIDATION]), callbacks=[trainings]
    )
    output = trainer.train()
    assert trainings.folders[-1] == "final"
    assert output.metrics["pruning_candidates"] == searched.metrics["pruning_candidates"]
    assert output.global_step == searched.global_step + 2 * 7
    best = json.loads((tmp_path / "pruning_results.json").read_text())["best"]
    assert torch.equal(snapshot(trainer)["token_mask"], phase(tmp_path, best)["token_mask"])
    same(snapshot(trainer), phase(tmp_path, "final"))
    assert trainer.train_dataset is TRAIN


@pytest.mark.parametrize("config", [{"visual_prompt_depth": "shallow"}, {"num_kv_prompts": 0}])
def test_other_kinds_of_adapter(tmp_path, config):
    output = make_trainer(tmp_path, model=adapted(**config)).train()
    assert [row["tokens"] for row in output.metrics["pruning_candidates"]] == [4, 3, 3, 2, 2]


def test_what_was_pruned_before_stays_pruned(tmp_path):
    model = adapted()
    prune_prompts(model, token_mask=[True, True, True, False])
    config = pruning(token_rates=[0.4], segment_rates=[0.0], metric_for_best_model="size")
    trainer = size_preferred(-1)(make_trainer(tmp_path, model=model, config=config))
    rows = trainer.train().metrics["pruning_candidates"]
    assert [row["tokens"] for row in rows] == [3, 2]
    mask = model.peft_config["default"].token_mask
    assert sum(mask) == 2 and mask[3] is False


def test_an_adapter_of_transformers_own_add_adapter(tmp_path):
    model = tiny_vit(num_hidden_layers=2)
    model.add_adapter(E2VPTConfig(num_visual_prompts=4, num_segments=4, modules_to_save=["classifier"]))
    output = make_trainer(tmp_path, model=model).train()
    assert len(output.metrics["pruning_candidates"]) == 5


def test_mixed_precision_is_not_wrapped_again_in_every_phase(tmp_path):
    depths = []

    class Depth(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            assert "_original_forward" in model.__dict__, "mixed precision is on"
            forward, depth = model.forward, 0
            while hasattr(forward, "__wrapped__"):
                forward, depth = forward.__wrapped__, depth + 1
            depths.append(depth)

    make_trainer(tmp_path, bf16=True, callbacks=[Depth()]).train()
    assert len(depths) == 5
    assert len(set(depths)) == 1


def test_every_phase_begins_with_the_same_gradient_scale(tmp_path, monkeypatch):
    create = Trainer.create_accelerator_and_postprocess

    def create_with_scaler(trainer):  # as float16 has on a GPU
        create(trainer)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    class Scales(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begins.append(trainer.accelerator.scaler.get_scale())

        def on_train_end(self, args, state, control, **kwargs):
            ends.append(trainer.accelerator.scaler.get_scale())

    begins, ends = [], []
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_with_scaler)
    trainer = make_trainer(tmp_path, callbacks=[Scales()])
    trainer.train()
    assert begins == [2.0**127] * 5
    assert all(scale < 2.0**127 for scale in ends), "gradients have overflowed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eval_dataset": None}, ["eval_dataset=None"]),
        ({"train_dataset": None}, ["train_dataset=None"]),
        ({"config": pruning(metric_for_best_model="f1")}, ["'eval_f1'", "eval_accuracy", "eval_loss"]),
        ({"compute_metrics": None, "metric_for_best_model": "accuracy"}, ["'eval_accuracy'", "eval_loss"]),
        ({"model": adapted(num_visual_prompts=0)}, ["visual prompts", "'default'"]),
        ({"model": tiny_vit()}, ["active adapter"]),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, options, words):
    trainings = Trainings()
    trainer = make_trainer(tmp_path, callbacks=[trainings], **options)
    with pytest.raises(ValueError) as raised:
        trainer.train()
    for word in words:
        assert word in str(raised.value)
    assert trainings.folders == []
    assert not (tmp_path / "_pruning_state").exists()


def test_several_active_adapters_are_refused(tmp_path):
    model = adapted()
    model.add_adapter("other", E2VPTConfig(num_segments=4))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one active adapter.*'default', 'other'"):
        make_trainer(tmp_path, model=model).train()


def test_optimizers_of_the_user_are_refused(tmp_path):
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs"):
        make_trainer(tmp_path, model=model, optimizers=(optimizer, None)).train()


def test_a_checkpoint_folder_is_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match="must be True or False"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_table_is_plotted(run):
    pytest.importorskip("matplotlib")
    _, _, _, folder = run
    assert (folder / "pruning_results.png").stat().st_size > 1000


def test_accuracy_is_a_metric_like_any(tmp_path):
    trainer = make_trainer(tmp_path, metric_for_best_model="accuracy", compute_metrics=accuracy)
    rows = trainer.train().metrics["pruning_candidates"]
    assert all(0 <= row["metric"] <= 1 for row in rows)
