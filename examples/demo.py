"""A web page on which all adapters of one backbone answer about an image, in one forward pass.

    python examples/demo.py                            # three tasks on handwritten digits, trained at the first start
    python examples/demo.py --adapters flowers birds   # folders that image_classification.py has written

Drop an image, or click on one of the examples. Below the answers stands where in the image the class token looks, by
one of the adapters and in one layer, and how much of its attention goes to the prompts.

The adapters must have the same backbone and the same number of classes, because the answers of a batch are one tensor.
Needs gradio.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from console import InputError, hide_notices, run
from many_adapters import TASKS, load_images, make_model, train
from peft import PeftConfig, PeftModel
from read_images import check_place
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, set_seed

from e2vpt_peft import to_rgb
from e2vpt_peft.plots import plot_attention_on_image

HERE = Path(__file__).parent
LABELS = {"digit": list("0123456789"), "even": ["odd", "even"], "upside_down": ["upright", "upside down"]}
"""The classes of the tasks in `many_adapters.py`."""
UNUSED = ""
"""The label of an output that no class belongs to: all heads have as many as the largest needs."""
LOOK = "Where the class token looks, head by head, and how much of its attention goes to the prompts:"
TITLE = "E²VPT: {} adapters, one backbone, one forward pass"


@dataclass
class Answers:
    """What each adapter answers, with one model.

    Args:
        model (`PeftModel`): The backbone with all adapters.
        processor (`Any`): Its image processor.
        labels (`dict[str, list[str]]`): The classes of each adapter.
    """

    model: PeftModel
    processor: Any
    labels: dict[str, list[str]]

    def __post_init__(self) -> None:
        self.lock = threading.Lock()  # a picture makes its adapter the active one

    @torch.no_grad()
    def __call__(self, image: PIL.Image.Image) -> dict[str, dict[str, float]]:
        """The probability of each class by each adapter, in one batch with as many copies as there are adapters."""
        names = list(self.labels)
        pixels = self.inputs(image)["pixel_values"].expand(len(names), -1, -1, -1)
        with self.lock:
            logits = self.model(pixel_values=pixels, adapter_names=names).logits
        return {name: self._probabilities(row, labels) for row, (name, labels) in zip(logits, self.labels.items())}

    def picture(self, image: PIL.Image.Image, adapter: str, layer: int) -> Any:
        """Where the class token looks, as a figure of matplotlib."""
        with self.lock:
            self.model.set_adapter(adapter, inference_mode=True)
            return plot_attention_on_image(self.model, self.inputs(image), layer)

    def inputs(self, image: PIL.Image.Image) -> dict[str, torch.Tensor]:
        return dict(self.processor(to_rgb(image), return_tensors="pt"))

    @staticmethod
    def _probabilities(logits: torch.Tensor, labels: list[str]) -> dict[str, float]:
        used = [index for index, label in enumerate(labels) if label != UNUSED]
        return dict(zip((labels[index] for index in used), logits[used].softmax(-1).tolist()))


def load(folders: Sequence[str]) -> Answers:
    """The backbone with the adapters of some folders, which are named like their folders.

    Raises:
        InputError: They belong to several backbones, or have heads of different sizes.
    """
    for folder in folders:
        check_place("adapters", folder if "/" in folder else f"./{folder}")
    configs = {Path(folder).name: AutoConfig.from_pretrained(folder) for folder in folders}
    backbones = {str(PeftConfig.from_pretrained(folder).base_model_name_or_path) for folder in folders}
    labels = {name: list(config.id2label.values()) for name, config in configs.items()}
    sizes = {name: len(names) for name, names in labels.items()}
    if len(backbones) > 1 or len(set(sizes.values())) > 1:
        raise InputError(
            "All adapters must have one backbone and the same number of classes, but these have the backbones "
            f"{', '.join(sorted(backbones))} and the numbers of classes {sizes}."
        )
    backbone = AutoModelForImageClassification.from_pretrained(
        backbones.pop(), num_labels=next(iter(sizes.values())), ignore_mismatched_sizes=True
    )
    first, *others = folders
    model = PeftModel.from_pretrained(backbone, first, adapter_name=Path(first).name)
    for folder in others:
        model.load_adapter(folder, adapter_name=Path(folder).name)
    return Answers(model.eval(), AutoImageProcessor.from_pretrained(str(model.config._name_or_path)), labels)


def train_digits(folder: Path, epochs: int) -> list[str]:
    """Train the adapters of `many_adapters.py`, and save each with the names of its classes."""
    set_seed(0)
    model = make_model()
    images, digits = load_images(model.config.image_size)
    for name, task in TASKS.items():
        print(f"training the adapter {name!r} ...")
        train(model, name, *task(images[:-300], digits[:-300]), epochs)
    model.save_pretrained(str(folder))
    for name in TASKS:
        labels = LABELS[name] + [UNUSED] * (model.config.num_labels - len(LABELS[name]))
        config: PreTrainedConfig = type(model.config).from_dict(model.config.to_dict())
        config.id2label = dict(enumerate(labels))
        config.save_pretrained(folder / name)
    return [str(folder / name) for name in TASKS]


def digit_images(count: int) -> list[np.ndarray]:
    """Handwritten digits that were not trained on, every other one upside down, large enough to be seen."""
    images, _ = load_images(96)
    turned = [image.flip(-1, -2) if index % 2 else image for index, image in enumerate(images[-count:])]
    return [((image.permute(1, 2, 0) + 1) * 127.5).byte().numpy() for image in turned]


def build(answers: Answers, examples: Sequence[np.ndarray] = ()) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio

    names, num_layers = list(answers.labels), answers.model.config.num_hidden_layers

    def answer(image: PIL.Image.Image | None, adapter: str, layer: int) -> list[Any]:
        if image is None:
            return [None] * (len(names) + 1)
        found = answers(image)
        return [*(found[name] for name in names), answers.picture(image, adapter, int(layer) - 1)]

    with gradio.Blocks(title="E²VPT", analytics_enabled=False) as page:
        gradio.Markdown(f"## {TITLE.format(len(names))}")
        with gradio.Row():
            with gradio.Column(scale=1):
                image = gradio.Image(type="pil", image_mode=None, label="image", height=240)
            with gradio.Column(scale=2), gradio.Row():
                labels = [gradio.Label(num_top_classes=3, label=name) for name in names]
        if len(examples):
            gradio.Examples([[one] for one in examples], [image], label="handwritten digits")
        gradio.Markdown(LOOK)
        with gradio.Row():
            adapter = gradio.Radio(names, value=names[0], label="adapter")
            layer = gradio.Slider(1, num_layers, value=num_layers, step=1, label="layer")
        picture = gradio.Plot(show_label=False)
        inputs = [image, adapter, layer]
        gradio.on([one.change for one in inputs], answer, inputs, [*labels, picture], api_name="answer")
    return page


def main(argv: list[str] | None = None) -> None:
    """Load or train the adapters, and serve the page until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", help="Folders of adapters; default: three tasks on digits.")
    parser.add_argument("--trained", type=Path, default=Path("demo-adapters"), help="Where those of digits are kept.")
    parser.add_argument("--epochs", type=int, default=12, help="Epochs for each of them.")
    parser.add_argument("--port", type=int, default=7860, help="Port of the page, which this machine alone can reach.")
    args = parser.parse_args(argv)
    hide_notices()
    folders, examples = args.adapters, []
    if folders is None:
        examples = digit_images(8)
        folders = [str(args.trained / name) for name in TASKS]
        if not all(Path(folder, "config.json").exists() for folder in folders):
            folders = train_digits(args.trained, args.epochs)
    page = build(load(folders), examples)
    print(f"http://127.0.0.1:{args.port}    (Ctrl-C ends it)", flush=True)
    page.launch(server_name="127.0.0.1", server_port=args.port, footer_links=[], quiet=True)


if __name__ == "__main__":
    run(main)
