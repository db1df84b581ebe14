"""The image classification example: options and recipes, data, augmentation, metric, training, resuming, pruning."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import augmentation
import evaluate
import image_classification as script
import numpy as np
import pytest
import torch
import yaml
from console import InputError
from datasets import ClassLabel, load_dataset
from peft import AutoPeftModel
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BeitConfig,
    CLIPConfig,
    DeiTConfig,
    Dinov2Config,
    SiglipConfig,
    SwinConfig,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

from tests.support.pictures import NAMES

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
RECIPES = ROOT / "examples" / "recipes"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT without a head for the task, and its image processor."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=7,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.1, 0.2, 0.3],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture
def options(backbone: Path, data: Path, tmp_path: Path) -> list[str]:
    return [
        f"--model={backbone}",
        f"--dataset={data}",
        f"--output_dir={tmp_path / 'out'}",
        "--num_visual_prompts=4",
        "--num_kv_prompts=2",
        "--num_segments=4",
        "--num_train_epochs=2",
        "--per_device_train_batch_size=8",
        "--use_cpu",
        "--disable_tqdm=true",
    ]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(first: Path, second: Path) -> None:
    one, other = adapter(first), adapter(second)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# The whole script


def test_plain_run(
    options: list[str], backbone: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    metrics = script.main([*options, "--num_train_epochs=10", "--learning_rate=0.02", "--save_backbone"])
    printed = capsys.readouterr().out
    assert "3 classes; images: 24 train, 12 test, 6 validation" in printed
    assert "trainable params" in printed
    assert metrics["eval_accuracy"] == metrics["test_accuracy"] == 1, "three colours are easily told apart"
    prompts = 2 * 4 * 32 + 2 * 2 * 32
    assert metrics["trainable_parameters"] == prompts + 3 * 32 + 3
    for split in ("train", "eval", "test"):
        assert (out / f"{split}_results.json").exists()
    assert json.loads((out / "all_results.json").read_text()).items() >= metrics.items()
    assert {name.split(".")[-2] for name in adapter(out) if "classifier" in name} == {"classifier"}
    assert json.loads((out / "preprocessor_config.json").read_text())["image_mean"] == [0.4, 0.5, 0.6]
    assert AutoConfig.from_pretrained(out).id2label == dict(enumerate(NAMES))
    card = (out / "README.md").read_text()
    assert backbone.name in card and "- e2vpt\n" in card and "| visual prompts | 4 per layer (deep) |" in card
    assert "| accuracy | validation | 1 |" in card and "| accuracy | test | 1 |" in card

    again = script.main([*options, "--do_train=false", f"--adapter={out}", f"--output_dir={tmp_path / 'again'}"])
    for name in ("eval_accuracy", "eval_loss", "test_accuracy", "test_loss"):
        assert again[name] == pytest.approx(metrics[name], rel=1e-6), name
    loaded_in_one_line(out, data, metrics["test_loss"])


def loaded_in_one_line(folder: Path, data: Path, loss: float) -> None:
    """As the guide says, prompts, head and labels; with `--save_backbone`, transformers alone loads all of it."""
    labels = AutoConfig.from_pretrained(folder).id2label
    adapted = AutoPeftModel.from_pretrained(folder, id2label=labels, ignore_mismatched_sizes=True)
    test = load_dataset("parquet", data_files=str(data / "test.parquet"))["train"]
    for classify in (
        pipeline("image-classification", model=adapted.get_base_model(), image_processor=str(folder)),
        pipeline("image-classification", model=str(folder)),
        pipeline(
            "image-classification",
            model=AutoModelForImageClassification.from_pretrained(folder),
            image_processor=str(folder),
        ),
    ):
        answers = classify(list(test["image"]), batch_size=4, top_k=3)
        names = [NAMES[label] for label in test["label"]]
        scores = [{one["label"]: one["score"] for one in answer}[name] for answer, name in zip(answers, names)]
        assert statistics.mean(-math.log(score) for score in scores) == pytest.approx(loss, rel=1e-4)


def test_the_same_seed_gives_the_same_adapter(options: list[str], tmp_path: Path) -> None:
    augmented = [*options, "--augmentation=resized_crop", "--horizontal_flip"]
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        script.main([*augmented, f"--output_dir={tmp_path / name}", f"--seed={seed}"])
    assert_same(tmp_path / "first", tmp_path / "again")
    first, other = adapter(tmp_path / "first"), adapter(tmp_path / "other")
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_resumed_run_equals_uninterrupted_run(options: list[str], tmp_path: Path) -> None:
    full, killed = tmp_path / "full", tmp_path / "killed"
    augmented = [*options, "--augmentation=crop", "--horizontal_flip", "--num_train_epochs=4", "--save_total_limit=9"]
    resume = "--resume_from_checkpoint=true"
    metrics = script.main([*augmented, f"--output_dir={full}", resume])  # nothing is there to go on from
    steps = sorted(int(path.name.split("-")[1]) for path in full.glob("checkpoint-*"))
    assert steps == [3, 6, 9, 12]
    killed.mkdir()
    shutil.copytree(full / "checkpoint-6", killed / "checkpoint-6")
    resumed = script.main([*augmented, f"--output_dir={killed}", resume])
    assert_same(full, killed)
    assert resumed["test_loss"] == metrics["test_loss"]
    named = script.main([*augmented, f"--output_dir={killed}", f"--resume_from_checkpoint={full / 'checkpoint-9'}"])
    assert named["test_loss"] == metrics["test_loss"]


PRUNE = ["--prune", "--token_rates", "0.5", "--segment_rates", "0", "0.5"]


def test_pruning_run(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = script.main([*options, *PRUNE, "--tolerance=1", "--importance=removal"])
    assert metrics["pruning_visual_prompts"] == 2, "any candidate is within a tolerance of 1"
    assert metrics["trainable_parameters"] < 2 * 4 * 32 + 2 * 2 * 32 + 99
    results = json.loads((out / "pruning_results.json").read_text())
    assert results["metric"] == "eval_accuracy"
    assert len(results["candidates"]) == 3
    stored = sum(value.numel() for name, value in adapter(out).items() if not name.endswith("segment_mask"))
    assert stored == metrics["trainable_parameters"]
    again = script.main([*options, "--do_train=false", f"--adapter={out}", f"--output_dir={tmp_path / 'again'}"])
    assert again["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-6)

    before = adapter(out)
    state = (out / "_pruning_state" / "state.json").read_text()
    script.main([*options, *PRUNE, "--tolerance=1", "--importance=removal", "--resume_from_checkpoint=true"])
    assert (out / "_pruning_state" / "state.json").read_text() == state, "finished candidates are trained again"
    assert all(torch.equal(value, before[name]) for name, value in adapter(out).items())


def test_final_training_on_all_images(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    train = Trainer.train

    def record(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        seen.append((type(self).__name__, len(self.train_dataset), len(self.eval_dataset)))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", record)
    metrics = script.main([*options, "--train_on_validation"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| accuracy | test |" in card and "| validation |" not in card
    assert seen == [("ModelCardTrainer", 30, 12)]
    assert "test_accuracy" in metrics and "eval_accuracy" not in metrics

    seen.clear()
    metrics = script.main([*options, *PRUNE, "--train_on_validation", "--num_train_epochs=1"])
    assert {name for name, *_ in seen} == {"E2VPTTrainer"}
    assert [sizes for _, *sizes in seen] == [[24, 6]] * 3 + [[30, 6]]
    assert "test_accuracy" in metrics and "eval_accuracy" not in metrics


def test_the_best_epoch_is_kept(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = iter([0.3, 0.9, 0.5, 0.9])  # of three epochs, and the evaluation of what is kept

    def make_compute_metrics(name: str) -> Any:
        return lambda prediction: {"accuracy": next(accuracy)}

    monkeypatch.setattr(script, "make_compute_metrics", make_compute_metrics)
    script.main([*options, "--num_train_epochs=3", "--save_total_limit=9", "--do_predict=false"])
    assert_same(tmp_path / "out", tmp_path / "out" / "checkpoint-6")
    last = adapter(tmp_path / "out" / "checkpoint-9")
    assert not any(torch.equal(value, last[name]) for name, value in adapter(tmp_path / "out").items())


def test_when_there_is_a_best_epoch() -> None:
    def keeps(*words: str) -> bool:
        args = script.parse(list(words))
        script.settle(args)
        return args.training.load_best_model_at_end

    assert keeps() and keeps("--prune")
    assert not keeps("--train_on_validation"), "what is left to evaluate on is the test split"
    assert not keeps("--save_strategy=no") and not keeps("--load_best_model_at_end=false")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model=./missing"], "model='./missing': there is no such folder"),
        (["--adapter=../missing"], "adapter='../missing': there is no such folder"),
        ([f"--output_dir={__file__}"], "output_dir='.*' is a file: name a folder"),
    ],
)
def test_wrong_places(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        script.main(words)


def test_an_adapter_for_other_classes(tmp_path: Path) -> None:
    ViTConfig(id2label={0: "ant", 1: "bee"}).save_pretrained(tmp_path)
    script.check_labels(str(tmp_path), ClassLabel(names=["ant", "bee"]))
    with pytest.raises(InputError, match=r"2 classes \(ant, bee\), but the data has 3 \(blue, green, red\)"):
        script.check_labels(str(tmp_path), ClassLabel(names=NAMES))
    with pytest.raises(InputError, match=r"\(ant, bee\), but the data has 2 \(bee, ant\): .* in the same order"):
        script.check_labels(str(tmp_path), ClassLabel(names=["bee", "ant"]))
    (tmp_path / "config.json").unlink()
    script.check_labels(str(tmp_path), ClassLabel(names=NAMES))  # nothing is known


# Recipes


def test_run_from_a_recipe(options: list[str], tmp_path: Path) -> None:
    recipe = dict(option.removeprefix("--").split("=") for option in options if "=" in option)
    recipe["num_visual_prompts"] = 1
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "use_cpu": True}))
    metrics = script.main([str(tmp_path / "recipe.json"), "--num_train_epochs=1"])
    assert metrics["epoch"] == 1
    assert metrics["trainable_parameters"] == 2 * 1 * 32 + 2 * 2 * 32 + 3 * 32 + 3


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_have_options_that_there_are(recipe: Path, tmp_path: Path) -> None:
    args = script.parse([str(recipe), f"--output_dir={tmp_path}"])
    script.settle(args)
    for name, value in yaml.safe_load(recipe.read_text()).items():
        (group,) = (group for group in args if hasattr(group, name))
        if name not in ("output_dir", "learning_rate", "optim"):
            assert getattr(group, name) == value, name


@pytest.mark.parametrize(("recipe", "batch"), [("vtab.yaml", 64), ("fgvc.yaml", 128)])
def test_papers_optimiser(recipe: str, batch: int, backbone: Path, data: Path, tmp_path: Path) -> None:
    """SGD with momentum, 10 of 100 epochs of warm-up, cosine, no decay on the head's bias, lr by the batch size."""
    args = script.parse(
        [
            str(RECIPES / recipe),
            f"--model={backbone}",
            f"--dataset={data}",
            f"--output_dir={tmp_path}",
            "--base_learning_rate=2.5",
            "--weight_decay=0.01",
            "--num_segments=4",
            "--use_cpu",
        ]
    )
    script.settle(args)
    assert args.training.learning_rate == pytest.approx(2.5 * batch / 256)
    splits = script.load_splits(args.data)
    model = script.adapt(
        script.load_backbone(args.model, splits["train"].features["label"]), args.model, args.prompts, True
    )
    trainer = script.make_trainer(args, model, script.load_processor(args.model, args.data), splits, dict)
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    assert type(trainer.optimizer) is torch.optim.SGD
    with_decay, without = trainer.optimizer.param_groups
    assert with_decay["momentum"] == without["momentum"] == 0.9
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.01, 0)
    assert [tuple(parameter.shape) for parameter in without["params"]] == [(3,)], "the head's bias, and nothing else"
    rates = []
    for _ in range(1000):
        rates.append(trainer.lr_scheduler.get_last_lr()[0] / args.training.learning_rate)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[0] == 0 and rates[50] == pytest.approx(0.5) and rates[100] == 1
    assert rates[550] == pytest.approx(0.5) and rates[999] == pytest.approx(0, abs=1e-5)
    assert args.training.max_grad_norm == 0


@pytest.mark.parametrize("prune", [False, True])
def test_kinds_of_prompts_have_their_own_rates_if_told_so(prune: bool, options: list[str]) -> None:
    args = script.parse([*options, "--learning_rate=0.5", "--kv_prompt_lr_ratio=4", f"--prune={prune}", "--optim=sgd"])
    script.settle(args)
    splits = script.load_splits(args.data)
    backbone = script.load_backbone(args.model, splits["train"].features["label"])
    model = script.adapt(backbone, args.model, args.prompts, True)
    trainer = script.make_trainer(args, model, script.load_processor(args.model, args.data), splits, dict)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)].split(".")[-2]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert type(optimizer) is torch.optim.SGD
    assert rates["e2vpt_kv_prompts"] == 4 * rates["default"] == 2.0, "four times that of the head"
    assert rates["e2vpt_visual_prompts"] == rates["default"], "the default of create_optimizer"


# Augmentation and preprocessing


def processor_of(backbone: Path, **values: Any) -> Any:
    return script.load_processor(script.ModelArguments(model=str(backbone)), script.DataArguments(**values))


def test_mean_and_deviation_are_the_processors(backbone: Path) -> None:
    image = PILImage.new("RGB", (16, 16), (255, 0, 128))
    batch = {"image": [image], "label": [1]}
    for values, mean, deviation in (
        ({}, [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, [0.5] * 3, [0.25] * 3),
    ):
        inputs = script.preprocess(batch, processor_of(backbone, **values), None)
        assert inputs["labels"] == [1]
        expected = [(c / 255 - m) / d for c, m, d in zip((255, 0, 128), mean, deviation)]
        assert inputs["pixel_values"][0, :, 3, 5].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["none", "resized_crop", "crop"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16", "F", "CMYK"])
def test_every_image_gets_the_models_size(backbone: Path, kind: str, mode: str) -> None:
    processor = processor_of(backbone)
    images = [PILImage.new(mode, size) for size in ((16, 16), (5, 40), (300, 7), (1, 1))]
    for transform in script.make_transforms(script.DataArguments(augmentation=kind), processor):
        inputs = script.preprocess({"image": images, "label": [0] * 4}, processor, transform, flip=True)
        assert inputs["pixel_values"].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("kind", ["resized_crop", "crop"])
def test_workers_that_are_spawned_get_the_transforms(backbone: Path, kind: str) -> None:
    image = noise()
    for transform in script.make_transforms(script.DataArguments(augmentation=kind), processor_of(backbone)):
        copied = pickle.loads(pickle.dumps(transform))
        if transform is not None:
            results = []
            for function in (transform, copied):
                torch.manual_seed(0)
                results.append(function(image).tobytes())
            assert results[0] == results[1]


def test_size_of_processors_that_crop() -> None:
    from transformers import CLIPImageProcessor

    assert script.input_size(CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=32)) == (32, 32)


def test_crops_of_an_image_of_the_models_own_size_keep_pixels(backbone: Path) -> None:
    """What the processor resizes is not resized twice, and the middle is the middle."""
    processor = processor_of(backbone)
    array = np.random.default_rng(0).integers(0, 256, (18, 18, 3), dtype=np.uint8)
    image = PILImage.fromarray(array)
    _, evaluation = script.make_transforms(script.DataArguments(augmentation="crop"), processor)
    assert np.array_equal(np.asarray(evaluation(image)), array[1:17, 1:17])


def test_grey_levels_above_255_are_no_white(backbone: Path) -> None:
    images = [PILImage.new("I;16", (16, 16), level) for level in (3000, 60000)]
    dark, bright = script.preprocess({"image": images, "label": [0, 1]}, processor_of(backbone), None)["pixel_values"]
    assert (bright - dark).min() > 2


def noise(width: int = 30, height: int = 20) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "augment",
    [
        lambda image, generator: augmentation.random_resized_crop(image, (12, 14), generator=generator),
        lambda image, generator: augmentation.random_crop(image, (12, 14), generator),
    ],
    ids=["random_resized_crop", "random_crop"],
)
def test_crops_depend_on_the_seed_alone(augment: Any) -> None:
    def results(seed: int) -> list[bytes]:
        generator = torch.Generator().manual_seed(seed)
        return [augment(noise(), generator).tobytes() for _ in range(8)]

    assert results(0) == results(0) != results(1)
    assert len(set(results(0))) > 4
    result = augment(noise(), None)
    assert (result.width, result.height) == (14, 12)
    before = torch.get_rng_state()
    first = augment(noise(), None).tobytes()
    torch.set_rng_state(before)
    assert augment(noise(), None).tobytes() == first, "without a generator, torch's global state decides"


def test_resized_crop_takes_parts_of_the_asked_area_and_shape() -> None:
    """An image whose pixels tell where they are: the corners of the result give the box."""
    x, y = np.meshgrid(np.arange(200), np.arange(200))
    image = PILImage.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    generator = torch.Generator().manual_seed(0)
    areas, shapes, places = [], [], []
    for _ in range(200):
        crop = augmentation.random_resized_crop(image, (50, 50), (0.25, 0.5), (0.5, 2.0), generator=generator)
        part = np.asarray(crop).astype(float)
        width = (part[25, 49, 0] - part[25, 0, 0]) * 50 / 49
        height = (part[49, 25, 1] - part[0, 25, 1]) * 50 / 49
        areas.append(width * height / 200**2)
        shapes.append(math.log(width / height))
        places.append(part[0, 0, 0])
    assert 0.23 < min(areas) < 0.28 and 0.45 < max(areas) < 0.53
    assert -0.75 < min(shapes) < -0.5 and 0.5 < max(shapes) < 0.75
    assert abs(statistics.mean(shapes)) < 0.1
    assert min(places) < 10 and max(places) > 60


def test_resized_crop_of_a_long_image_is_its_middle() -> None:
    image = PILImage.new("RGB", (1000, 10))
    image.paste((255, 255, 255), (490, 0, 510, 10))
    result = augmentation.random_resized_crop(image, (10, 10), scale=(1.0, 1.0))
    assert np.asarray(result).mean() == 255


def test_flip() -> None:
    image = noise()
    assert augmentation.horizontal_flip(image, 0.0) is image
    flipped = np.asarray(augmentation.horizontal_flip(image, 1.0))
    assert np.array_equal(flipped, np.asarray(image)[:, ::-1])
    generator = torch.Generator().manual_seed(0)
    share = statistics.mean(augmentation.horizontal_flip(image, 0.3, generator) is not image for _ in range(500))
    assert 0.24 < share < 0.36


# Metric and head


def test_metric_equals_a_hand_computation(tmp_path: Path) -> None:
    metric = evaluate.load(script.DataArguments().metric)
    assert metric.name == "accuracy"
    assert metric.compute(predictions=[0, 1, 2, 2, 1], references=[0, 1, 1, 2, 0]) == {"accuracy": 3 / 5}
    assert metric.compute(predictions=[0, 1], references=[0, 0], normalize=False) == {"accuracy": 1}
    weighted = metric.compute(predictions=[0, 1], references=[0, 0], sample_weight=[3.0, 1.0])
    assert weighted == {"accuracy": 0.75}
    compute = script.make_compute_metrics(script.DataArguments().metric)
    logits = np.array([[2.0, 1.0], [0.0, 5.0], [1.0, 0.0]])
    prediction = script.EvalPrediction(predictions=logits, label_ids=np.array([0, 1, 1]))
    assert compute(prediction) == {"accuracy": pytest.approx(2 / 3)}
    prediction = script.EvalPrediction(predictions=(logits, logits), label_ids=np.array([0, 1, 1]))
    assert compute(prediction) == {"accuracy": pytest.approx(2 / 3)}


SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "head"),
    [
        (ViTConfig(**SMALL), "classifier"),
        (DeiTConfig(**SMALL, architectures=["DeiTForImageClassification"]), "classifier"),
        (Dinov2Config(**{**SMALL, "mlp_ratio": 1}), "classifier"),
        (BeitConfig(**SMALL, out_indices=[1]), "classifier"),
        (SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1]), "classifier"),
        (CLIPConfig(vision_config=SMALL, text_config={**SMALL, "vocab_size": 8}), "classifier"),
        (SiglipConfig(vision_config=SMALL, text_config={**SMALL, "vocab_size": 8}), "classifier"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_head_is_found(config: Any, head: str) -> None:
    assert script.head_names(AutoModelForImageClassification.from_config(config)) == [head]


# The documentation, and data that is not part of the repository


def test_commands_in_the_documentation() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    commands = [
        command.replace("\\\n", " ")
        for page in pages
        for command in re.findall(
            r"^python examples/image_classification.py ((?:\\\n|[^\n])*)", page.read_text(), re.M
        )
    ]
    assert len(commands) >= 5
    for command in commands:
        script.parse([str(ROOT / word) if word.startswith("examples/recipes/") else word for word in command.split()])


@pytest.mark.slow
def test_digits_recipe(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    metrics = script.main([str(RECIPES / "digits.yaml"), f"--output_dir={tmp_path}"])
    assert metrics["test_accuracy"] > 0.75  # 0.79 with the shipped backbone, where chance gives 0.1


@pytest.mark.slow
def test_real_photographs(tmp_path: Path) -> None:
    model, flowers = SHARED / "checkpoints" / "vit-tiny-cifar10", SHARED / "data" / "flowers12"
    if not (model.exists() and flowers.exists()):
        pytest.skip(f"{SHARED} is not there")
    metrics = script.main(
        [
            str(RECIPES / "fgvc.yaml"),
            f"--model={model}",
            f"--dataset={flowers}",
            f"--output_dir={tmp_path}",
            "--max_train_samples=60",
            "--max_eval_samples=24",
            "--num_train_epochs=1",
            "--per_device_train_batch_size=16",
            "--dataloader_num_workers=0",
        ]
    )
    assert 0 <= metrics["test_accuracy"] <= 1
