"""The tasks as data: VTAB-1k, FGVC, `photos`, and `mini`, which needs no download. Some settings are the paper's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .drawing import DRAWN

Layout = Literal["vtab", "fgvc", "digits", "drawn", "dataset", "shuffled"]

SETTINGS = Path(__file__).parents[2] / "recipes" / "paper_settings.json"
PAPER: dict[str, Any] = json.loads(SETTINGS.read_text(encoding="utf-8"))

GROUPS = ("natural", "specialized", "structured", "fgvc")

SUITES = ("mini", "photos", "vtab", "fgvc")

VTAB_FOLDERS = {
    "cifar100": "cifar",
    "clevr_distance": "clevr_dist",
    "kitti_distance": "kitti",
    "dsprites_location": "dsprites_loc",
    "dsprites_orientation": "dsprites_ori",
    "smallnorb_azimuth": "smallnorb_azi",
    "smallnorb_elevation": "smallnorb_ele",
}
"""Folders of the community's VTAB-1k that are not called as the paper calls the task."""

FGVC_FOLDERS = {
    "cub200": "CUB_200_2011",
    "nabirds": "nabirds",
    "oxford_flowers": "OxfordFlower",
    "stanford_dogs": "Stanford-dogs",
    "stanford_cars": "Stanford-cars",
}

PHOTOS = {
    "natural": ("caltech101", "dtd10", "flowers12", "gtsrb"),
    "specialized": ("aid", "chest_xray", "pacs_sketch", "sign_digits"),
}
"""Folders of `photos`. Their training files are in random order, so that the first 1,000 rows are the task's."""

MINI_SPECIALIZED = ("digits", "sign_digits")
"""Of `mini`, the tasks with one kind of thing, always seen the same way; other photographs are natural."""


@dataclass(frozen=True)
class Task:
    """One image classification task.

    Attributes:
        name (`str`): Its name.
        group (`str`): One of [`GROUPS`], over which means are taken.
        layout (`str`): How its files lie, see [`images`].
        folder (`str`): Its folder in the data directory.
        classes (`int | None`): Number of classes; `None` if the data says so.
        visual_prompts, kv_prompts (`int`): The paper's numbers of prompts, or its most used ones.
        crop (`bool`): Whether to train on random crops, mirrored at random, as for FGVC.
        imagenet_colours (`bool`): Whether to normalise by ImageNet's mean and deviation, whatever the backbone's own.
    """

    name: str
    group: str
    layout: Layout
    folder: str = ""
    classes: int | None = None
    visual_prompts: int = 10
    kv_prompts: int = 5
    crop: bool = False
    imagenet_colours: bool = False


def paper_task(name: str) -> Task:
    """A task of VTAB-1k or FGVC, with the paper's settings."""
    settings = PAPER["tasks"][name]
    fgvc = settings["group"] == "fgvc"
    return Task(
        name,
        settings["group"],
        "fgvc" if fgvc else "vtab",
        FGVC_FOLDERS[name] if fgvc else VTAB_FOLDERS.get(name, name),
        settings["classes"],
        settings["num_visual_prompts"],
        settings["num_kv_prompts"],
        crop=fgvc,
        imagenet_colours=True,
    )


def dataset_task(folder: Path) -> Task:
    """A folder with a parquet file, or a folder of images, for each split."""
    group = "specialized" if folder.name in MINI_SPECIALIZED else "natural"
    return Task(folder.name, group, "dataset", folder.name)


def suite(name: str, data_dir: str | None) -> list[Task]:
    """The tasks of a suite.

    `vtab`, `fgvc`, `photos` (eight data sets and the drawn tasks), or `mini`: digits, every data set in the data
    directory, and the drawn tasks.

    Raises:
        ValueError: There is no such suite, or it needs a data directory.
    """
    if name not in SUITES:
        raise ValueError(f"suite={name!r} must be one of {', '.join(SUITES)}.")
    if data_dir is None and name != "mini":
        raise ValueError(f"suite={name!r} needs data_dir, the folder with the data of all its tasks.")
    if name in ("vtab", "fgvc"):
        return [task for task in map(paper_task, PAPER["tasks"]) if task.layout == name]
    drawn = [Task(task, "structured", "drawn", classes=classes) for task, (classes, _) in DRAWN.items()]
    if name == "photos":
        photos = [Task(task, group, "shuffled", task) for group, names in PHOTOS.items() for task in names]
        return [*photos, *drawn]
    folders = [] if data_dir is None else sorted(path for path in Path(data_dir).iterdir() if path.is_dir())
    digits = Task("digits", "specialized", "digits", classes=10)
    return [*map(dataset_task, folders), digits, *drawn]


def select(tasks: list[Task], wanted: list[str] | None, left_out: list[str]) -> list[Task]:
    """Some tasks of a suite, by name.

    Raises:
        ValueError: A name is not there.
    """
    names = [task.name for task in tasks]
    for option, chosen in (("tasks", wanted or []), ("leave_out", left_out)):
        if unknown := sorted(set(chosen) - set(names)):
            raise ValueError(f"{option} has {unknown}, but the suite has {', '.join(names)}.")
    return [task for task in tasks if task.name in (wanted or names) and task.name not in left_out]
