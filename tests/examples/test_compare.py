"""The accuracy benchmark: data in every layout, methods, search, resuming, shards, tables, drawn tasks."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from scipy import ndimage

from examples.benchmarks import compare, report
from examples.benchmarks.accuracy import (
    ablations,
    drawing,
    methods,
    protocol,
    recipes,
    records,
    tables,
    tasks,
    training,
    trials,
)
from examples.benchmarks.accuracy import images as data
from examples.benchmarks.accuracy.shares import shares_of_prefix

HIDDEN, LAYERS = 32, 2  # of tiny_backbone
CLASSES = 3
HEAD = HIDDEN * CLASSES + CLASSES


def picture(label: int, width: int = 20, height: int = 14) -> PILImage.Image:
    """One channel is bright, which is the class."""
    array = np.zeros((height, width, 3), dtype=np.uint8)
    array[..., label] = 200
    return PILImage.fromarray(array)


def parquet(folder: Path, train: int = 15, test: int = 6) -> None:
    folder.mkdir(parents=True)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=CLASSES)})
    for name, number in (("train", train), ("test", test)):
        labels = [index % CLASSES for index in range(number)]
        columns = {"image": [picture(label) for label in labels], "label": labels}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    parquet(folder / "colours")
    return folder


@pytest.fixture
def plan(tiny_backbone: str, data_dir: Path) -> Any:
    return recipes.Plan(tiny_backbone, str(data_dir), "quick", 1, 8, (0, 1), "cpu")


@pytest.fixture
def colours(data_dir: Path) -> Any:
    return next(task for task in tasks.suite("mini", str(data_dir)) if task.name == "colours")


# Tasks


def check_splits(splits: Any, numbers: tuple[int, int, int], size: int) -> None:
    train, validation, test = numbers
    for part, number in (
        (splits.train, train), (splits.validation, validation), (splits.both, train + validation), (splits.test, test)
    ):  # fmt: skip
        assert part.pixels.shape == (number, 3, size, size) and part.pixels.dtype == torch.uint8
        assert torch.equal(part.pixels.amax((2, 3)).argmax(1), part.labels), "each image has its own label"


def test_vtab_layout(tmp_path: Path) -> None:
    task = tasks.paper_task("kitti_distance")
    folder = tmp_path / "kitti"
    (folder / "images").mkdir(parents=True)
    lists = {"train800": [0, 1, 2], "val200": [2, 1], "train800val200": [0, 1, 2, 2, 1], "test": [1, 0]}
    for name, labels in lists.items():
        for index, label in enumerate(labels):
            picture(label).save(folder / "images" / f"{name} {index}.png")
        lines = [f"images/{name} {index}.png {label}\n" for index, label in enumerate(labels)]
        (folder / f"{name}.txt").write_text("".join(lines))
    splits = data.load(task, str(tmp_path), 16)
    check_splits(splits, (3, 2, 2), 16)
    assert splits.classes == 4 and splits.train.labels.tolist() == [0, 1, 2]

    (folder / "test.txt").write_text("images/test 0.png 4\n")
    with pytest.raises(ValueError, match="kitti_distance has 4 classes, but .* has a label 4"):
        data.load(task, str(tmp_path), 16)


def test_fgvc_layout(tmp_path: Path) -> None:
    task = tasks.paper_task("stanford_dogs")
    folder = tmp_path / "Stanford-dogs"
    (folder / "Images").mkdir(parents=True)
    for name, labels in {"train": [0, 1, 2], "val": [1], "test": [2, 0]}.items():
        names = {f"{name}{index}.png": label for index, label in enumerate(labels)}
        for file, label in names.items():
            picture(label).save(folder / "Images" / file)
        # classes are numbered from 1 there
        (folder / f"{name}.json").write_text(json.dumps({file: label + 1 for file, label in names.items()}))
    splits = data.load(task, str(tmp_path), 14)
    check_splits(splits, (3, 1, 2), 16)  # larger by 8/7, for cropping
    (folder / "Images").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"train0.png of .*train.json is in none of"):
        data.load(task, str(tmp_path), 14)


def test_parquet_and_image_folders(tmp_path: Path) -> None:
    parquet(tmp_path / "files")
    for split, number in (("train", 5), ("test", 2)):
        for label in range(CLASSES):
            folder = tmp_path / "pictures" / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(number):
                picture(label).save(folder / f"{index}.png")
    for name in ("files", "pictures"):
        check_splits(data.load(tasks.dataset_task(tmp_path / name), str(tmp_path), 16), (12, 3, 6), 16)


def test_digits_are_the_same_every_time_and_all_different() -> None:
    first, second = data.read_digits(8), data.read_digits(8)
    assert [len(part) for part in first] == [1000, 797]
    assert torch.equal(first[0].pixels, second[0].pixels)
    assert len(set(first[0].labels.tolist())) == 10


def test_suites_hold_the_papers_tasks() -> None:
    vtab, fgvc = tasks.suite("vtab", "data"), tasks.suite("fgvc", "data")
    assert [sum(task.group == group for task in vtab) for group in tasks.GROUPS[:3]] == [7, 4, 8]
    assert len(fgvc) == 5 and all(task.crop and task.imagenet_colours for task in fgvc)
    caltech = next(task for task in vtab if task.name == "caltech101")
    assert (caltech.classes, caltech.visual_prompts, caltech.kv_prompts, caltech.folder) == (102, 32, 5, "caltech101")
    with pytest.raises(ValueError, match="suite='vtab' needs data_dir"):
        tasks.suite("vtab", None)
    with pytest.raises(ValueError, match=r"leave_out has \['cifar'\]"):
        tasks.select(vtab, None, ["cifar"])
    assert len(tasks.select(vtab, None, ["cifar100"])) == 18


def test_photos_are_eight_data_sets_and_the_drawn_tasks(tmp_path: Path) -> None:
    photos = tasks.suite("photos", "data")
    assert [sum(task.group == group for task in photos) for group in tasks.GROUPS[:3]] == [4, 4, 4]
    with pytest.raises(ValueError, match="suite='photos' needs data_dir"):
        tasks.suite("photos", None)
    with pytest.raises(ValueError, match="suite='photo' must be one of mini, photos, vtab, fgvc"):
        tasks.suite("photo", "data")
    gtsrb = next(task for task in photos if task.name == "gtsrb")
    parquet(tmp_path / "gtsrb")
    splits = data.load(gtsrb, str(tmp_path), 16)
    check_splits(splits, (12, 3, 6), 16)
    assert splits.both.labels.tolist() == [index % CLASSES for index in range(15)], "in the order of the file"


# Drawn tasks


@pytest.mark.parametrize("name", drawing.DRAWN)
def test_drawn_tasks_repeat_and_are_balanced(name: str) -> None:
    classes = drawing.DRAWN[name][0]
    pixels, labels = drawing.draw_task(name, 2 * classes, seed=3)
    again, _ = drawing.draw_task(name, 2 * classes, seed=3)
    other, _ = drawing.draw_task(name, 2 * classes, seed=4)
    assert np.array_equal(pixels, again) and not np.array_equal(pixels, other)
    assert np.bincount(labels).tolist() == [2] * classes


def outlines(canvas: Any, draw: Any, label: int) -> np.ndarray:
    """Where the image differs from its background."""
    background = canvas.pixels.copy()
    draw(canvas, label)
    return np.abs(canvas.pixels - background).max(-1) > 0.05


@pytest.mark.parametrize("name", drawing.DRAWN)
def test_labels_can_be_read_off_the_drawings(name: str) -> None:
    classes, draw = drawing.DRAWN[name]
    for label in range(classes):
        mask = outlines(drawing.Canvas(np.random.default_rng(label)), draw, label)
        rows, columns = np.nonzero(mask)
        if name == "drawn_count":
            assert ndimage.label(mask, np.ones((3, 3)))[1] == label + 1
        elif name == "drawn_location":
            middle = (columns.mean() + 0.5) / drawing.SIZE
            assert math.floor((middle - 0.1) / 0.8 * 16) == pytest.approx(label, abs=1)
        elif name == "drawn_orientation":
            x, y = columns - columns.mean(), rows - rows.mean()
            angle = 0.5 * math.atan2(2 * (x * y).mean(), (x * x).mean() - (y * y).mean())  # of the longer axis
            along = x * math.cos(angle) + y * math.sin(angle)
            angle += math.pi * ((along**3).mean() < 0)  # towards the tip, which is further from the middle
            assert (angle * 16 / (2 * math.pi) - label + 8) % 16 - 8 == pytest.approx(0, abs=0.8)
        else:
            lowest = (rows.max() + 1) / drawing.SIZE  # of the nearest, 0.3 + 0.65 / distance
            assert math.floor((0.65 / (lowest - 0.3) - 1) / 0.5) == pytest.approx(label, abs=1)


# Methods

PROMPTS = {"visual": LAYERS * 10 * HIDDEN, "kv": LAYERS * 5 * HIDDEN}
TRAINABLE = {
    "linear probe": 0,
    "LayerNorm tuning": (2 * LAYERS + 1) * 2 * HIDDEN,
    "(IA)³": LAYERS * (2 * HIDDEN + 64),
    "LoRA": LAYERS * 2 * 2 * HIDDEN * 8,
    "LoRA and E²VPT": LAYERS * 2 * 2 * HIDDEN * 8 + PROMPTS["visual"] + PROMPTS["kv"],
    "VPT-Shallow": 10 * HIDDEN,
    "VPT-Deep": PROMPTS["visual"],
    "E²VPT": PROMPTS["visual"] + PROMPTS["kv"],
    "E²VPT, pruned": LAYERS * 7 * HIDDEN // 2 + PROMPTS["kv"],
    "E²VPT, LoRA's size": LAYERS * (16 + 2 * 8) * HIDDEN,
    "E²VPT, more prompts": LAYERS * (50 + 2 * 20) * HIDDEN,
    "E²VPT, more prompts, norms": (LAYERS * (50 + 2 * 20) + (2 * LAYERS + 1) * 2) * HIDDEN,
}


def test_every_method_trains_what_it_should(plan: Any, colours: Any, tmp_path: Path) -> None:
    bench = protocol.Bench(colours, plan, records.Store(tmp_path / "out.jsonl"))
    how = training.Optimisation("adamw", 1e-2, 1e-4, 1, 8, seed=0)
    for method in methods.METHODS:
        rates = (0.3, 0.5) if method.pruning else None
        found = bench.measure(method, "validation", how, rates)
        assert 0 <= found["accuracy"] <= 1 and found["head"] == HEAD
        adapted = found["trainable"] - found["head"]
        if method.name in TRAINABLE:
            assert adapted == TRAINABLE[method.name], method.name

    model = bench.build_backbone(0)
    everything = {name: p.numel() for name, p in model.named_parameters()}
    biases = sum(number for name, number in everything.items() if name.endswith(".bias"))
    by_name = {method.name: method for method in methods.METHODS}
    for name, number in (("full fine-tuning", sum(everything.values())), ("BitFit", biases + HIDDEN * CLASSES)):
        trained = by_name[name].adapt(bench.build_backbone(0), colours)
        assert sum(p.numel() for p in trained.parameters() if p.requires_grad) == number


def test_training_repeats_and_changes_trainable_parameters_alone(plan: Any, colours: Any, tmp_path: Path) -> None:
    bench = protocol.Bench(colours, plan, records.Store(tmp_path / "out.jsonl"))
    method = methods.e2vpt()
    models = []
    for seed in (0, 0, 1):
        model = bench.build(method, seed=0)
        before = copy.deepcopy(model.state_dict())
        how = training.Optimisation("sgd", 1e-1, 0.0, 1, 8, seed)
        training.train(model, bench.splits.train, bench.preprocessing, how)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) == (name not in trainable), name
        models.append(model.state_dict())
    first, again, other = models
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("ratio", [None, 4.0])
def test_key_value_prompts_have_the_rate_of_the_method(ratio: Any, plan: Any, colours: Any, tmp_path: Path) -> None:
    bench = protocol.Bench(colours, plan, records.Store(tmp_path / "out.jsonl"))
    method = methods.e2vpt(kv_lr_ratio=ratio)
    trial = trials.Trial(method, "validation", 0.5, 0.1, 0, None, 1)
    model = bench.build(method, seed=0)
    optimizer = training.make_optimizer(model, bench.optimisation(trial), torch.device("cpu"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len([p for p in model.parameters() if p.requires_grad])
    for name, rate in rates.items():
        assert rate == (0.5 * (ratio or 1) if "e2vpt_kv_prompts" in name else 0.5), name


def test_probe_on_features_agrees_with_the_whole_model(plan: Any, colours: Any, tmp_path: Path) -> None:
    bench = protocol.Bench(colours, plan, records.Store(tmp_path / "out.jsonl"))
    model = bench.build_backbone(0).eval()
    inputs = next(training.batches(bench.splits.test, bench.preprocessing))
    logits = model(pixel_values=inputs["pixel_values"]).logits
    probe = training.Probe(model.classifier)
    torch.testing.assert_close(probe(bench.cached_features.test.pixels).logits, logits)


def test_crops_are_parts_of_the_image() -> None:
    preprocessing = training.Preprocessing(4, torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1))
    pixels = torch.arange(3 * 36, dtype=torch.uint8).view(1, 3, 6, 6).repeat(20, 1, 1, 1)
    windows = pixels[0].unfold(1, 4, 1).unfold(2, 4, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 4, 4).float() / 255
    choices = torch.cat([windows, windows.flip(-1)])
    crops = preprocessing.for_training(pixels)
    found = [int((choices == crop).flatten(1).all(1).nonzero()[0]) for crop in crops]
    assert len(set(found)) > 5 and any(index >= len(windows) for index in found)
    assert torch.equal(preprocessing.for_evaluation(pixels)[0], pixels[0, :, 1:5, 1:5] / 255)


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_names_are_unique_and_searches_exist(name: str) -> None:
    variants = ablations.ABLATIONS[name]
    names = [method.name for method in variants]
    assert len(set(names)) == len(names)
    assert {method.same_search for method in variants} - {None} <= set(names)
    assert len(pickle.loads(pickle.dumps(variants))) == len(variants), "they travel to other processes"


def test_what_is_the_same_has_one_name_in_all_tables() -> None:
    names: dict[str, set[str]] = {}
    for method in (method for variants in ablations.ABLATIONS.values() for method in variants):
        if isinstance(method.adapt, partial) and method.adapt.func is methods.add_prompts:
            options = {"num_visual_prompts": 10, "num_kv_prompts": 5, **method.adapt.keywords}
            what = (sorted(options.items()), method.pruning, method.variants, method.kv_lr_ratio)
            names.setdefault(str(what), set()).add(method.name)
    assert all(len(found) == 1 for found in names.values()), "so that its trainings are shared"


# Search, resuming, shards


def test_search_uses_validation_alone_and_finishes_what_was_killed(
    tiny_backbone: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    options = [
        f"--out={out}", f"--data_dir={data_dir}", "--tasks", "colours", f"--model={tiny_backbone}", "--epochs=1",
        "--seeds", "0", "1", "--methods", "linear probe", "E²VPT", "E²VPT, pruned", "--device=cpu",
    ]  # fmt: skip
    results = compare.main(options)
    lines = records.read(out)
    searched = [line["settings"] for line in lines if line["settings"]["part"] == "validation"]
    assert len(searched) == 2 * 5 + 4 and {settings["seed"] for settings in searched} == {0}, (
        "one search for both E²VPT"
    )
    assert len(results) == 3 * 2 == len(lines) - len(searched)

    whole = out.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(whole[:-2]) + whole[-2][:40], encoding="utf-8")  # killed while it wrote
    trained: list[Any] = []
    measure = protocol.Bench.measure
    monkeypatch.setattr(protocol.Bench, "measure", lambda *args: trained.append(args) or measure(*args))
    assert [r["accuracy"] for r in compare.main(options)] == [r["accuracy"] for r in results]
    assert len(trained) == 2
    compare.main(options)
    assert len(trained) == 2 and len(records.read(out)) == len(lines)

    text = report.main([str(out), f"--plot={tmp_path / 'plot.png'}"])
    assert "points over E²VPT" in text
    with pytest.raises(ValueError, match="against='LoRA' has no results"):
        report.main([str(out), "--against", "LoRA"])
    assert "| E²VPT, pruned |" in text and "mean of groups" in text and "Groups: colours natural." in text
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_best_learning_rate_and_rates_are_chosen_by_validation(plan: Any, colours: Any, tmp_path: Path) -> None:
    bench = protocol.Bench(colours, plan, records.Store(tmp_path / "out.jsonl"))
    method = methods.e2vpt("pruned", methods.Pruning(), "E²VPT")
    right = {0.003: 0.1, 0.009: 0.5, 0.03: 0.5, 0.09: 0.4, 0.3: 0.2}
    pruned = {(0.3, 0.0): (0.5, 70), (0.3, 0.5): (0.6, 40), (0.6, 0.0): (0.6, 50), (0.6, 0.5): (0.4, 20)}

    def measure(method: Any, part: str, how: Any, rates: Any) -> dict[str, Any]:
        assert part == "validation"
        value, size = (right[how.learning_rate], 100) if rates is None else pruned[tuple(rates)]
        return {"accuracy": value, "trainable": size}

    bench.measure = measure
    best = bench.search(method)
    assert (best.learning_rate, best.weight_decay, best.epochs) == (0.009, 1e-4, 1)
    assert bench.search_rates(best) == (0.3, 0.5), "of two that are as good, the smaller"
    tokens_alone = methods.e2vpt("tokens", methods.Pruning(segments=False), "E²VPT")
    assert bench.search_rates(best._replace(method=tokens_alone)) == (0.6, 0.0)
    right[0.009] = 0.7
    fresh = protocol.Bench(colours, plan, records.Store(tmp_path / "fresh.jsonl"))
    fresh.measure = measure
    assert fresh.search_rates(best) == (0.0, 0.0), "no candidate is as good as unpruned"


def test_every_method_has_the_same_number_of_trials() -> None:
    for recipe, number in (("quick", 5), ("modern", 6), ("paper", 40)):
        assert {len(recipes.RECIPES[recipe].trials(method, 64)) for method in methods.METHODS} == {number}
    assert recipes.RECIPES["paper"].trials(methods.METHODS[0], 64)[0][1:] == (0.0125, 0.01)


def modern(plan: Any, **changes: Any) -> Any:
    return recipes.Plan(**{**vars(plan), "recipe": "modern", "epochs": 8, **changes})


def judged_by(table: dict[tuple[float, int], float], seen: list[Any]) -> Any:
    """Instead of a training: its accuracy by learning rate and length."""

    def measure(method: Any, part: str, how: Any, rates: Any) -> dict[str, Any]:
        seen.append((how.learning_rate, how.epochs, part))
        return {"accuracy": table.get((how.learning_rate, how.epochs), 0.0)}

    return measure


@pytest.mark.parametrize(
    ("last", "search_epochs", "length"),
    [
        (0.9, (2, 4, 8), 8),
        (0.5, (2, 4, 8), 4),
        (0.6, (2, 4, 8), 4),
        (0.9, (2,), 8),
        (0.5, (2, 4), 8),
        (0.9, (), 8),
    ],
    ids=["longest best", "shorter better", "shortest of equals", "not reached", "not reached by two", "of the recipe"],
)
def test_the_better_third_goes_on_and_the_best_length_is_taken(
    last: float, search_epochs: Any, length: int, plan: Any, colours: Any, tmp_path: Path
) -> None:
    plan = modern(plan, search_epochs=search_epochs)
    seen: list[Any] = []
    bench = protocol.Bench(colours, plan, records.Store(tmp_path / "out.jsonl"))
    table = {(0.003, 2): 0.5, (0.03, 2): 0.4, (0.3, 2): 0.3, (0.003, 4): 0.1, (0.03, 4): 0.6, (0.03, 8): last}
    bench.measure = judged_by(table, seen)
    bench.run(methods.e2vpt())
    lengths = search_epochs or (4, 8)
    all_rates = [0.0009, 0.003, 0.009, 0.03, 0.09, 0.3]
    rates = [all_rates, [0.003, 0.03], [0.03]] if search_epochs else [all_rates, [0.03, 0.003]]
    searched = [(rate, epochs, "validation") for epochs, tried in zip(lengths, rates) for rate in tried]
    winner = 0.003 if len(lengths) == 1 else 0.03
    assert seen == [*searched, *[(winner, length, "test")] * 2]


@pytest.mark.parametrize(("lengths", "searched"), [((8,), 0), ((4, 8), 2)], ids=["one length", "two"])
def test_nothing_is_trained_to_choose_one_of_one(
    lengths: Any, searched: int, plan: Any, colours: Any, tmp_path: Path
) -> None:
    plan = modern(plan, factors=(1.0,), search_epochs=lengths)
    seen: list[Any] = []
    bench = protocol.Bench(colours, plan, records.Store(tmp_path / "out.jsonl"))
    bench.measure = judged_by({(0.03, 8): 0.9}, seen)
    bench.run(methods.e2vpt())
    assert [part for *_, part in seen] == ["validation"] * searched + ["test"] * 2
    assert seen[-2:] == [(0.03, 8, "test")] * 2


def test_variants_are_searched_in_as_many_trials(plan: Any, colours: Any, tmp_path: Path) -> None:
    (method,) = methods.choose(methods.METHODS, ["E²VPT, prompts searched"])
    trials = recipes.RECIPES["modern"].trials(method, 8)
    assert [variant.variant for variant, *_ in trials] == [{}, methods.MORE_PROMPTS] * 3
    store = records.Store(tmp_path / "out.jsonl")
    bench = protocol.Bench(colours, modern(plan, epochs=1, factors=(1.0, 3.0)), store)
    found = bench.run(method)
    searched = [r for r in store.known.values() if r["settings"]["part"] == "validation"]
    assert [(r["settings"]["variant"], r["settings"]["learning_rate"]) for r in searched] == [
        ({}, 0.01), (methods.MORE_PROMPTS, 0.03)
    ]  # fmt: skip
    best = max(searched, key=lambda record: record["accuracy"])
    assert {str(r["settings"]["variant"]) for r in found} == {str(best["settings"]["variant"])}
    sizes = [TRAINABLE["E²VPT"], TRAINABLE["E²VPT, more prompts"]]
    assert [r["trainable"] - r["head"] for r in searched] == sizes, "each is what it says"


def test_the_modern_recipe_normalises_as_in_pretraining(plan: Any) -> None:
    task = tasks.paper_task("cifar100")
    for recipe, mean in (("quick", 0.485), ("modern", 0.5)):
        preprocessing = trials.Trainings(task, recipes.Plan(**{**vars(plan), "recipe": recipe})).preprocessing
        assert float(preprocessing.mean[0, 0]) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe=paper", "--factors", "1"], "factors=[1.0] cannot be given with recipe='paper'"),
        (["--epochs=4", "--search_epochs", "2", "5"], "search_epochs=[2, 5] must be from 1 to 4"),
        (["--precision=float16"], "precision='float16' must be one of auto, float32, bfloat16"),
        (["--recipe=modern", "--engine=ray", "--grace_epochs=1"], "grace_epochs=1 cannot be given with a search by"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compare.main(["--out=out.jsonl", *options])


def test_shards_share_out_all_work() -> None:
    cells = list(range(7))
    shards = [protocol.split_work(cells, (index, 3)) for index in range(3)]
    assert sorted(sum(shards, [])) == cells and max(map(len, shards)) - min(map(len, shards)) <= 1
    with pytest.raises(ValueError, match="shard=3/3 must be from 0/3 to 2/3"):
        protocol.split_work(cells, (3, 3))
    with pytest.raises(ValueError, match="shard='half' must be two numbers"):
        compare.parse_shard("half")


def test_a_method_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"methods has \['VPT'\], but must be among 'linear probe'"):
        methods.choose(methods.METHODS, ["VPT"])


@pytest.mark.parametrize("part, trained_on", [("validation", "train"), ("test", "both")])
def test_accuracy_is_of_what_is_judged_and_training_accuracy_of_what_was_trained_on(
    part: str, trained_on: str, plan: Any, colours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = trials.Trainings(colours, plan)
    monkeypatch.setattr(trials, "accuracy", lambda model, images, *rest: images)
    (method,) = methods.choose(methods.METHODS, ["E²VPT"])
    trial = trials.Trial(method, part, 0.01, 0.0, 0, None, 1)
    record = bench.measure(method, part, bench.optimisation(trial), None)
    assert record["accuracy"] is getattr(bench.splits, part)
    fit = getattr(bench.splits, trained_on) if part == "test" else None
    assert record.get("training_accuracy") is fit, "a search has no use for it"
    shares = {when: len(values) for when, values in record.get("shares", {}).items()}
    assert shares == ({"start": LAYERS, "end": LAYERS} if part == "test" else {})


# Tables


def line(task: str, group: str, method: str, seed: int, accuracy: float, **settings: Any) -> dict[str, Any]:
    common = {"part": "test", "learning_rate": 0.01, "rates": None}
    common |= {
        "model": "m",
        "recipe": "quick",
        "epochs": 1,
        "batch_size": 8,
        "image_size": None,
        "precision": "float32",
    }
    known = {"task": task, "group": group, "method": method, "seed": seed}
    measured = {"accuracy": accuracy, "trainable": 30, "head": 10, "seconds": 600.0, "hardware": "CPU", "torch": "2"}
    return {"settings": common | known | settings, **measured}


def test_means_of_groups_and_of_tasks() -> None:
    lines = [
        line(task, group, "LoRA", seed, value + 0.1 * seed)
        for task, group, value in (("a", "natural", 0.1), ("b", "natural", 0.3), ("c", "structured", 0.6))
        for seed in (0, 1)
    ]
    (summary,) = tables.summarise([*lines, line("a", "natural", "other", 0, 0.9)], ["LoRA"])
    assert (summary.adapted, summary.head) == (20, 10)
    assert str(summary.tasks["a"]) == "15.0 ± 7.1"
    means = {name: value.mean for name, value in summary.means.items()}
    expected = {"natural": 25, "structured": 65, "mean of groups": 45, "mean of tasks": 100 * (1 / 3 + 0.05)}
    assert means == pytest.approx(expected)
    assert all(value.deviation == pytest.approx(100 * 0.1 / math.sqrt(2)) for value in summary.means.values())


def test_fit_is_shown_where_all_results_of_a_method_tell() -> None:
    told = [line("a", "natural", "LoRA", seed, 0.5) | {"training_accuracy": 0.8 + 0.1 * seed} for seed in (0, 1)]
    untold = [line("a", "natural", "E²VPT", seed, 0.5) for seed in (0, 1)]
    untold[0]["training_accuracy"] = 0.9
    shown = tables.markdown(tables.summarise([*told, *untold], ["LoRA", "E²VPT"]), ["a"])
    assert "| mean of tasks | training images |" in shown
    assert [line.rsplit("| ", 1)[1] for line in shown.splitlines()[2:4]] == ["85.0 |", " |"]
    assert "training images" not in tables.markdown(tables.summarise(untold, ["E²VPT"]), ["a"])


def test_attention_paid_to_prompts_is_averaged_over_tasks_and_seeds() -> None:
    lines = [line(task, "natural", "E²VPT", 0, 0.5) for task in "ab"]
    for record, (start, end) in zip(lines, ((0.2, 0.1), (0.4, 0.3))):
        record["shares"] = {"start": [start, 0.9], "end": [end, 0.8]}
    other = line("a", "natural", "LoRA", 0, 0.5)
    shown = tables.shares([*lines, other], ["LoRA", "E²VPT"]).splitlines()
    assert shown[0] == "| attention paid to prompts | 0 | 1 |"
    assert shown[2:] == ["| E²VPT, start | 30 | 90 |", "| E²VPT, end | 20 | 80 |"]
    assert tables.shares([other], ["LoRA"]) == ""


@pytest.mark.parametrize("prompts", [(3, 2), (0, 4)])
def test_with_queries_of_zero_prompts_are_paid_by_their_number(
    prompts: tuple[int, int], plan: Any, colours: Any
) -> None:
    bench = trials.Trainings(colours, plan)
    model = bench.build(methods.e2vpt(num_visual_prompts=prompts[0], num_kv_prompts=prompts[1]), seed=0)
    for name, parameter in model.named_parameters():
        if ".q_proj." in name:
            parameter.data.zero_()
    before = model.get_base_model().config._attn_implementation
    pixels = bench.preprocessing.for_evaluation(bench.splits.test.pixels)
    tokens = 1 + (16 // 8) ** 2
    expected = sum(prompts) / (sum(prompts) + tokens)
    assert shares_of_prefix(model, pixels) == pytest.approx([expected] * LAYERS)
    assert model.get_base_model().config._attn_implementation == before
    for other in ("LoRA", "VPT-Shallow", "BitFit", "E²VPT, all beside"):
        (method,) = methods.choose(methods.METHODS, [other])
        assert shares_of_prefix(bench.build(method, seed=0), pixels) is None


def test_differences_are_taken_seed_by_seed() -> None:
    values = {"E²VPT": (0.5, 0.6, 0.7), "LoRA": (0.4, 0.65, 0.7), "half": (0.4,)}
    lines = [
        line(task, "natural", method, seed, value + 0.1 * seed - 0.02 * seed * (method == "LoRA"))
        for method, own in values.items()
        for task, value in zip("abc", own)
        for seed in (0, 1)
    ]
    shown = tables.differences(lines, list(values), "E²VPT")
    assert "| method | points over E²VPT | tasks won | lost | tied |" in shown
    assert "| LoRA | -2.7 ± 1.4 | 1 | 2 | 0 |" in shown
    assert "half" not in shown, "it is not finished"


def test_unfinished_methods_have_no_means() -> None:
    lines = [line(task, "natural", "LoRA", seed, 0.5) for task in "ab" for seed in (0, 1)][:-1]
    (summary,) = tables.summarise(lines, ["LoRA"])
    assert summary.means == {} and summary.incomplete == [("b", 1)]
    finished = [line(task, "natural", "E²VPT", seed, 0.5) for task in "ab" for seed in (0, 1)]
    shown = tables.markdown(tables.summarise([*lines, *finished], ["LoRA", "E²VPT"]), ["a", "b"])
    assert "| LoRA | 20 | 30 | 600 | not finished |" in shown


def test_what_does_not_compare_is_refused() -> None:
    for name, values in (("epochs", (1, 2)), ("image_size", (84, None)), ("precision", ("float32", "bfloat16"))):
        lines = [line("a", "natural", "LoRA", 0, 0.5, **{name: value}) for value in values]
        with pytest.raises(ValueError, match=f"several values of {name}: {re.escape(str(list(values)))}"):
            tables.summarise(lines, ["LoRA"])


def test_learning_rates_at_the_edge_are_told() -> None:
    lines = [
        line("a", "natural", method, 0, accuracy, part="validation", learning_rate=rate)
        for method, accuracies in (("LoRA", (0.1, 0.2, 0.3)), ("E²VPT", (0.1, 0.3, 0.2)))
        for rate, accuracy in zip((0.01, 0.1, 1.0), accuracies)
    ]
    assert tables.at_the_edge(lines) == ["LoRA on a: 1"]


def test_files_of_several_machines_are_read_together(tmp_path: Path) -> None:
    one, other = line("a", "natural", "LoRA", 0, 0.5), line("a", "natural", "LoRA", 1, 0.6)
    for name, lines in (("first", [one]), ("second", [one, other])):
        store = records.Store(tmp_path / f"{name}.jsonl")
        for record in lines:
            rest = {key: value for key, value in record.items() if key != "settings"}
            store.once(record["settings"], lambda rest=rest: rest)
    other_kind = tmp_path / "growth.jsonl"
    other_kind.write_text('{"what": "cost"}\n', encoding="utf-8")
    assert records.read_all([tmp_path / "first.jsonl", tmp_path / "second.jsonl", other_kind]) == [one, other]


# Reports


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two methods on two tasks, their searches, one that has only begun, an ablation, and another backbone."""
    main = [
        line(task, "natural", method, seed, accuracy, part=part)
        for method, accuracy in (("LoRA", 0.5), ("E²VPT", 0.6))
        for part, tasks in (("validation", "ab"), ("test", "ab"))
        for task in tasks
        for seed in (0, 1)
    ]
    begun = line("c", "natural", "LoRA", 0, 0.5, part="validation")
    ablation = [line("a", "natural", "separate K and V", seed, 0.7) for seed in (0, 1)]
    other = [line("a", "natural", "LoRA", 0, 0.9, model="other")]
    for name, lines in (("main", [*main, begun]), ("ablation", [*ablation, main[-1]]), ("other", other)):
        text = "".join(json.dumps(record) + "\n" for record in lines)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return [str(tmp_path / f"{name}.jsonl") for name in ("main", "ablation", "other")]


def test_a_report_counts_what_it_shows_once(files: list[str]) -> None:
    first, second = report.main(files).split("\n\nTest accuracy")
    assert "Backbone m," in first and "16 trainings, 2.7 hours" in first, "the copy once, no other table"
    assert "| LoRA | 90.0 |" not in first and "Backbone other," in second and "1 trainings" in second

    text = report.main([*files, "--compare", "sharing", "--where", "task=a"])
    assert "6 trainings, 1.0 hours" in text, "E²VPT and its search come from the other file"
    assert "| separate K and V | 20 | 30 | 600 | 70.0 ± 0.0 |" in text and "not finished" not in text


def test_what_differs_in_one_setting_is_shown_together(tmp_path: Path) -> None:
    lines = [
        line("a", "natural", method, seed, accuracy, precision=precision)
        for method, seed, accuracy, precision in (
            ("LoRA", 0, 0.5, "tf32"),
            ("LoRA", 1, 0.7, "bfloat16"),
            ("E²VPT", 0, 0.6, "tf32"),
            ("E²VPT", 0, 0.1, "bfloat16"),  # run again elsewhere
            ("E²VPT", 1, 0.8, "bfloat16"),
        )
    ]
    file = tmp_path / "both.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in lines), encoding="utf-8")
    assert report.main([str(file)]).count("Test accuracy") == 2
    text = report.main([str(file), "--together", "precision"])
    assert text.count("Test accuracy") == 1 and "bfloat16, tf32" in text and "4 trainings" in text
    assert "| LoRA | -10.0 ± 0.0 | 0 | 1 | 0 |" in text, "of two trainings the first counts"
    with pytest.raises(ValueError, match=r"together has \['seed'\], but must be among model, recipe"):
        report.main([str(file), "--together", "seed"])


def test_where_chooses_results(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose those of one backbone and so on with --where"):
        report.main([*files, f"--plot={tmp_path / 'plot.png'}"])
    text = report.main([*files, "--where", "model=m", "task=a,b", f"--plot={tmp_path / 'plot.png'}"])
    assert "Backbone m," in text and "other" not in text and (tmp_path / "plot.png").stat().st_size > 0
    with pytest.raises(ValueError, match=r"where has task=d, but the results have \['a', 'b', 'c'\]"):
        report.main([*files, "--where", "task=a,d"])
    with pytest.raises(ValueError, match="where has tasks=a, but the results have no such setting"):
        report.main([*files, "--where", "tasks=a"])
