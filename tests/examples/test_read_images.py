"""What is said of data sets that cannot be used, before anything else happens."""

from __future__ import annotations

from pathlib import Path

import pytest
from console import InputError
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from read_images import check_images, check_place, read_dataset


def save(*names: str, folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (4, 4)).save(folder / name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.png", "b.JPG", "c.png"], r"a.png, b.JPG and 1 more in \S+ belong to no class: put .* as in .*cat/a.png"),
        (["train/a.png", "test/b.png"], "a.png in .*test|b.png in .*test belong to no class"),
        (["cat/a.png", "dog/b.png", "c.png"], "c.png in .* belong to no class"),
        (["cat/a.png", "cat/b.png"], "there is only one class, cat. Two are needed at least"),
        (["train/cat/a.png", "test/cat/b.png"], "there is only one class, cat"),
        ([], "there are no images in this folder"),
    ],
)
def test_folders_that_are_not_sorted(names: list[str], message: str, tmp_path: Path) -> None:
    save(*names, folder=tmp_path)
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(InputError, match=message):
        read_dataset(str(tmp_path))


def test_an_image_in_the_place_of_a_folder(tmp_path: Path) -> None:
    save("a.png", folder=tmp_path)
    with pytest.raises(InputError, match="a.png' is a file, but no parquet file. Give the folder"):
        read_dataset(str(tmp_path / "a.png"))


def test_folders_with_a_table_are_left_to_datasets(tmp_path: Path) -> None:
    save("a.png", "b.png", folder=tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,kind\na.png,cat\nb.png,dog\n")
    assert read_dataset(str(tmp_path))["train"].column_names == ["image", "kind"]


@pytest.mark.parametrize("name", ["./missing", "../missing", "/missing/folder", "a/b/c"])
def test_paths_that_lead_nowhere(name: str) -> None:
    with pytest.raises(InputError, match=f"dataset='{name}': there is no such folder or file"):
        read_dataset(name)
    check_place("model", "google/vit-base-patch16-224")


@pytest.mark.parametrize("encoded", [False, True], ids=["files", "bytes"])
def test_images_that_cannot_be_read_are_named(encoded: bool, tmp_path: Path) -> None:
    save(*[f"{index}.jpg" for index in range(6)], folder=tmp_path)
    (tmp_path / "1.jpg").write_bytes(b"text")
    PILImage.effect_noise((64, 64), 90).save(tmp_path / "4.jpg")
    whole = (tmp_path / "4.jpg").read_bytes()
    (tmp_path / "4.jpg").write_bytes(whole[: len(whole) // 2])  # its header is there
    files = sorted(tmp_path.iterdir())
    images = [{"bytes": file.read_bytes(), "path": None} if encoded else str(file) for file in files]
    data = Dataset.from_dict({"image": images}, features=Features({"image": Image()}))
    with pytest.raises(InputError) as found:
        check_images({"train": data.select([0, 1, 2]), "test": data.select([3, 4, 5])})
    message = str(found.value)
    assert message.startswith("2 of 6 images cannot be read: ")
    names = ["train image 1", "test image 1"] if encoded else [str(files[1]), str(files[4])]
    assert f"{names[0]} (not an image), {names[1]} (" in message
    check_images({"train": data.select([0, 2, 3, 5])})
