"""Pretrain the tiny vision transformer that the quickstart adapts, on images that this script draws itself.

    python examples/pretrain_backbone.py                                   # remakes examples/backbone
    python examples/pretrain_backbone.py --data_dir DATA --output_dir DIR  # real images: parquet with image and label

The drawn classes are printed symbols and shapes of the fonts that come with matplotlib (stars, arrows, hearts, signs),
characters of an invented script (random pen strokes, every image a new hand) and textures. There are no letters and no
digits among them: a model that tells handwritten digits apart has learned that from the digits.

The labels are fine for the patches and coarse for the image: every patch token learns to name the class, the class
token only its kind (symbol, invented character or texture). So there is more in the backbone than its class token
says, as in backbones that were pretrained without labels.

The result is a `ViTModel` without a head, weights stored in float16 to keep the repository small.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import trange
from transformers import HfArgumentParser, ViTConfig, ViTModel, set_seed

SYMBOLS = "■▲●★◆○□△☆◇♠♥♣♪☀☂→←↑↓↔∞√∫≈≠±÷&@#$%?!+=<>{}~§¶€£¥©"
FONTS = ("DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf")
BANK_SIZE = 48  # pixels of a printed character before it is distorted

Sampler = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # number, generator -> images in [0, 1], labels


@dataclass
class PretrainingArguments:
    """Options of the pretraining; the defaults made the backbone that ships with the repository."""

    output_dir: str = field(default=str(Path(__file__).parent / "backbone"), metadata={"help": "Where to save."})
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Pretrain on real images instead: a parquet file or a folder of them (columns image, label)."
        },
    )
    steps: int = field(default=1200, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=128, metadata={"help": "Images per step."})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    invented_characters: int = field(default=64, metadata={"help": "Characters of the invented script."})
    image_size: int = field(default=24, metadata={"help": "Height and width of the backbone's input."})
    patch_size: int = field(default=6, metadata={"help": "Height and width of a patch."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the backbone."})
    num_layers: int = field(default=6, metadata={"help": "Depth of the backbone."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads of a layer."})
    num_eval_images: int = field(default=4096, metadata={"help": "Images for the final accuracy."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda if there is one."})
    num_threads: int = field(default=1, metadata={"help": "CPU threads; the result depends on them in the last bits."})
    seed: int = field(default=0, metadata={"help": "Seed of the images and of the initial weights."})


def uniform(generator: torch.Generator, low: float, high: float, *size: int) -> Tensor:
    """Uniform random numbers between `low` and `high`."""
    return torch.rand(*size, generator=generator) * (high - low) + low


def printed_characters(characters: str) -> list[Tensor]:
    """Draw each character in every font that has it.

    Returns one tensor (fonts, `BANK_SIZE`, `BANK_SIZE`) in [0, 1] per character, each glyph scaled to the same size.
    """
    import matplotlib
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    paths = [path for pattern in FONTS for path in sorted(folder.glob(pattern)) if "Display" not in path.name]
    fonts = [(ImageFont.truetype(str(path), 96), FT2Font(str(path)).get_charmap()) for path in paths]
    inner = BANK_SIZE - 8
    bank = []
    for character in characters:
        glyphs = []
        for font, charmap in fonts:
            if ord(character) not in charmap:
                continue
            left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
            size = max(right - left, bottom - top) + 4
            image = Image.new("L", (size, size))
            corner = ((size - right + left) / 2 - left, (size - bottom + top) / 2 - top)
            ImageDraw.Draw(image).text(corner, character, fill=255, font=font)
            pixels = np.asarray(image.resize((inner, inner), Image.Resampling.BICUBIC), dtype=np.float32) / 255
            glyphs.append(F.pad(torch.from_numpy(pixels), (4, 4, 4, 4)))
        if glyphs:
            bank.append(torch.stack(glyphs))
    return bank


def affine(number: int, generator: torch.Generator) -> Tensor:
    """Random rotation, slant, scale, aspect and shift: (number, 2, 3), from output to input coordinates in [-1, 1]."""
    angle = uniform(generator, -0.3, 0.3, number)
    slant = uniform(generator, -0.35, 0.35, number)
    height = uniform(generator, 0.9, 1.4, number)
    width = height * uniform(generator, 0.8, 1.5, number)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos * width, (cos * slant - sin) * width, sin * height, (sin * slant + cos) * height], 1)
    shift = uniform(generator, -0.15, 0.15, number, 2, 1)
    return torch.cat([matrix.view(number, 2, 2), shift], 2)


def distort(masks: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Thicken or thin (number, height, width) masks, move and bend them: (number, size, size)."""
    number = len(masks)
    masks = masks[:, None]
    thickness = uniform(generator, -0.7, 1.0, number, 1, 1, 1)
    thick, thin = F.max_pool2d(masks, 3, 1, 1), -F.max_pool2d(-masks, 3, 1, 1)
    masks = masks + thickness.clamp(min=0) * (thick - masks) + (-thickness).clamp(min=0) * (thin - masks)
    grid = F.affine_grid(affine(number, generator), [number, 1, size, size], align_corners=False)
    bend = torch.randn(number, 2, 4, 4, generator=generator) * uniform(generator, 0, 0.12, number, 1, 1, 1)
    bend = F.interpolate(bend, (size, size), mode="bicubic", align_corners=False)
    return F.grid_sample(masks, grid + bend.permute(0, 2, 3, 1), align_corners=False)[:, 0]


class InventedScript:
    """Characters of one to three random pen strokes, written by a different hand every time.

    A stroke is a path of constant speed whose curvature changes a few times; each image adds smooth noise to the
    path, moves it, and draws it with a pen of random width.
    """

    points = 20

    def __init__(self, number: int, generator: torch.Generator) -> None:
        strokes, steps = 3, self.points - 1
        pieces = torch.randint(0, 4, (number, strokes, 1), generator=generator)
        piece = (torch.arange(steps) * (pieces + 1)) // steps
        curvature = torch.randn(number, strokes, 4, generator=generator) * 0.22
        curvature[torch.rand(curvature.shape, generator=generator) < 0.3] = 0  # straight
        corner = torch.where(
            torch.rand(number, strokes, 4, generator=generator) < 0.4,
            uniform(generator, -2.5, 2.5, number, strokes, 4),
            0,
        )
        turn = curvature.gather(2, piece)
        starts = torch.cat([torch.zeros_like(piece[..., :1], dtype=torch.bool), piece.diff(dim=2) > 0], 2)
        turn = turn + corner.gather(2, piece) * starts
        heading = uniform(generator, 0, 2 * math.pi, number, strokes, 1) + turn.cumsum(2)
        length = uniform(generator, 0.5, 1.0, number, strokes, 1, 1)
        path = torch.stack([heading.cos(), heading.sin()], 3).cumsum(2) * length / steps
        path = torch.cat([torch.zeros(number, strokes, 1, 2), path], 2)
        path = path - path.mean(2, keepdim=True) + uniform(generator, -0.25, 0.25, number, strokes, 1, 2)
        used = torch.arange(strokes) < torch.randint(1, strokes + 1, (number, 1), generator=generator)
        path = torch.where(used[..., None, None], path, path[:, :1])  # an unused stroke repeats the first one
        low, high = path.amin((1, 2), keepdim=True), path.amax((1, 2), keepdim=True)
        self.paths = (path - (low + high) / 2) * 1.7 / (high - low).amax(3, keepdim=True)
        self.used = used

    def __len__(self) -> int:
        return len(self.paths)

    def draw(self, labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Masks (number, size, size) in [0, 1] of the characters `labels`."""
        number, strokes = len(labels), self.paths.shape[1]
        time_ = torch.linspace(0, math.pi, self.points)
        waves = torch.stack([(k * time_).cos() / (k + 1) for k in range(4)])
        noise = torch.randn(number, strokes, 2, 4, generator=generator) * uniform(
            generator, 0.02, 0.13, number, 1, 1, 1
        )
        paths = self.paths[labels] + (noise @ waves).transpose(2, 3)
        paths = torch.where(self.used[labels][..., None, None], paths, paths[:, :1])
        matrix = affine(number, generator)
        paths = (paths - matrix[:, None, None, :, 2]) @ matrix[:, :, :2].inverse().transpose(1, 2)[:, None] * 1.25
        start, step = paths[:, :, :-1].flatten(1, 2), paths.diff(dim=2).flatten(1, 2)
        axis = (torch.arange(size) + 0.5) * 2 / size - 1
        pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), 2).view(1, -1, 2)
        # squared distance of pixel p to the segment a + t s, from dot products: no tensor with a coordinate axis
        squared = (step**2).sum(2)[:, None] + 1e-9
        along = pixels @ step.transpose(1, 2) - (start * step).sum(2)[:, None]
        offset = (pixels**2).sum(2)[..., None] - 2 * pixels @ start.transpose(1, 2) + (start**2).sum(2)[:, None]
        t = (along / squared).clamp(0, 1)
        distance = (offset - 2 * t * along + t * t * squared).amin(2).clamp(min=0).sqrt()
        width = uniform(generator, 0.05, 0.2, number, 1)
        return ((width - distance) * size / 2.5 + 0.5).clamp(0, 1).view(number, size, size)


TEXTURES = 24


def textures(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Masks (number, size, size) of gratings, checks and dots: four orientations by two scales each."""
    number = len(labels)
    kind, direction, scale = labels // 8, labels % 4, labels // 4 % 2
    angle = direction * math.pi / 4 + uniform(generator, -0.25, 0.25, number)
    frequency = torch.where(scale == 1, 9.0, 4.0) * uniform(generator, 0.8, 1.25, number)
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    cos, sin = (angle.cos() * frequency)[:, None, None], (angle.sin() * frequency)[:, None, None]
    phase = uniform(generator, 0, 2 * math.pi, 2, number, 1, 1)
    first, second = (cos * x + sin * y + phase[0]).sin(), (cos * y - sin * x + phase[1]).sin()
    kind = kind[:, None, None]
    pattern = torch.where(kind == 0, first, torch.where(kind == 1, first * second * 2, first + second - 0.8))
    return (pattern * 2 + 0.5).clamp(0, 1)


def photograph(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Colour masks (number, size, size), blur them through a lower resolution, add uneven light and noise.

    Half of the images stay plain, bright on dark. Returns (number, 3, size, size) in [0, 1].
    """
    number, size = len(masks), masks.shape[-1]
    masks = masks[:, None]
    coarse = torch.randint(0, 4, (number,), generator=generator)
    for index, resolution in enumerate((8, 10, 14)):
        chosen = coarse == index
        small = F.interpolate(masks[chosen], (resolution, resolution), mode="area")
        masks[chosen] = F.interpolate(small, (size, size), mode="bilinear", align_corners=False)
    plain = torch.rand(number, 1, 1, 1, generator=generator) < 0.5
    ink, paper = torch.rand(2, number, 3, 1, 1, generator=generator)
    grey = torch.rand(number, 1, 1, 1, generator=generator) < 0.5
    ink, paper = torch.where(grey, ink[:, :1], ink), torch.where(grey, paper[:, :1], paper)
    ink = torch.where((ink - paper).abs().amax(1, keepdim=True) < 0.3, (paper + 0.5) % 1, ink)
    ink = torch.where(plain, uniform(generator, 0.6, 1.0, number, 1, 1, 1), ink)
    paper = torch.where(plain, uniform(generator, 0.0, 0.1, number, 1, 1, 1), paper)
    light = F.interpolate(torch.randn(number, 1, 3, 3, generator=generator), (size, size), mode="bicubic")
    noise = torch.randn(number, 3, size, size, generator=generator) * uniform(generator, 0, 0.12, number, 1, 1, 1)
    spoil = torch.where(plain, 0.0, light * uniform(generator, 0, 0.15, number, 1, 1, 1) + noise)
    return (paper + (ink - paper) * masks + spoil).clamp(0, 1)


class DrawnImages:
    """The pretraining task: images of drawn classes. The same seed and generator state always give the same images."""

    def __init__(self, image_size: int, invented_characters: int, seed: int = 0, characters: str = SYMBOLS) -> None:
        self.image_size = image_size
        self.bank = printed_characters(characters)
        self.script = InventedScript(invented_characters, torch.Generator().manual_seed(seed))
        sizes = torch.tensor([len(self.bank), len(self.script), TEXTURES])
        self.kinds = torch.arange(3).repeat_interleave(sizes)
        self.num_classes = len(self.kinds)

    def sample(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw images (number, 3, size, size) in [0, 1] of uniformly chosen classes, and their labels."""
        labels = torch.randint(self.num_classes, (number,), generator=generator)
        fonts = torch.randint(1 << 30, (number,), generator=generator)
        masks = torch.zeros(number, self.image_size, self.image_size)
        printed, texture = labels < len(self.bank), labels >= self.num_classes - TEXTURES
        invented = ~printed & ~texture
        if printed.any():
            glyphs = [
                self.bank[c][f % len(self.bank[c])] for c, f in zip(labels[printed], fonts[printed], strict=True)
            ]
            masks[printed] = distort(torch.stack(glyphs), self.image_size, generator)
        if invented.any():
            masks[invented] = self.script.draw(labels[invented] - len(self.bank), self.image_size, generator)
        if texture.any():
            kinds = labels[texture] - (self.num_classes - TEXTURES)
            masks[texture] = textures(kinds, self.image_size, generator)
        return photograph(masks, generator), labels


class RealImages:
    """Images of parquet files with columns `image` and `label`, randomly cropped and flipped for training."""

    def __init__(self, data_dir: str, image_size: int) -> None:
        from datasets import Image, load_dataset

        path = Path(data_dir)
        found = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
        if not found:
            raise FileNotFoundError(f"No parquet file in {path}.")
        held_out = [file for file in found if "test" in file.stem or "val" in file.stem]
        files = {"train": [str(file) for file in found if file not in held_out]}
        if held_out:
            files["test"] = [str(file) for file in held_out]
        splits = load_dataset("parquet", data_files=files)
        if not held_out:
            splits = splits["train"].train_test_split(0.1, seed=0)

        def decode(split: str) -> tuple[Tensor, Tensor]:
            data = splits[split].cast_column("image", Image(mode="RGB"))
            arrays = [np.asarray(image.resize((image_size, image_size))) for image in data["image"]]
            return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), torch.tensor(data["label"][:])

        self.images, self.labels = decode("train")
        self.test_images, self.test_labels = decode("test")
        self.num_classes = int(max(self.labels.max(), self.test_labels.max())) + 1
        self.kinds = torch.arange(self.num_classes)  # nothing is known about them: each class is its own kind
        self.padding = max(1, image_size // 8)

    def sample(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented training images in [0, 1] and their labels."""
        chosen = torch.randint(len(self.images), (number,), generator=generator)
        images = F.pad(self.images[chosen].float() / 255, [self.padding] * 4, mode="reflect")
        size = self.images.shape[-1]
        flip = torch.rand(number, generator=generator) < 0.5
        images[flip] = images[flip].flip(3)
        rows, columns = torch.randint(2 * self.padding + 1, (2, number, 1), generator=generator) + torch.arange(size)
        index = torch.arange(number)[:, None, None]
        images = images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
        return images.permute(0, 3, 1, 2), self.labels[chosen]

    def sample_test(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Test images as they are."""
        chosen = torch.randint(len(self.test_images), (number,), generator=generator)
        return self.test_images[chosen].float() / 255, self.test_labels[chosen]


def normalise(images: Tensor) -> Tensor:
    """What the image processor of the backbone does with pixels in [0, 1]."""
    return (images - 0.5) / 0.5


def batches(
    sample: Sampler, number: int, batch_size: int, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """`number` batches of normalised images and labels, made on the CPU, so that every device gets the same ones."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        images, labels = sample(batch_size, generator)
        yield normalise(images).to(device), labels.to(device)


class PretrainingModel(nn.Module):
    """A vision transformer with two heads: the patch tokens name the class, the class token names the kind."""

    def __init__(self, config: ViTConfig, num_classes: int, num_kinds: int) -> None:
        super().__init__()
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.vit.set_attn_implementation("eager")  # at this size the fastest to train on a CPU
        self.class_head = nn.Linear(config.hidden_size, num_classes)
        self.kind_head = nn.Linear(config.hidden_size, num_kinds)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the class (number, patches, classes) and of the kind (number, kinds)."""
        tokens = self.vit(pixel_values=images).last_hidden_state
        return self.class_head(tokens[:, 1:]).float(), self.kind_head(tokens[:, 0]).float()


def right(logits: tuple[Tensor, Tensor], labels: Tensor, kinds: Tensor) -> Tensor:
    """Share of images whose class the patches get right, by their mean, and whose kind the class token gets right."""
    of_classes, of_kinds = logits
    return (
        torch.stack([of_classes.mean(1).argmax(1) == labels, of_kinds.argmax(1) == kinds[labels]], 1).float().mean(0)
    )


@torch.inference_mode()
def accuracy(model: PretrainingModel, kinds: Tensor, sample: Sampler, number: int, seed: int) -> tuple[float, float]:
    """Share of new images whose class, and whose kind, the model gets right."""
    model.eval()
    size = min(number, 256)
    stream = batches(sample, math.ceil(number / size), size, seed, kinds.device)
    shares = [right(model(images), labels, kinds) for images, labels in stream]
    of_classes, of_kinds = torch.stack(shares).mean(0).tolist()
    return of_classes, of_kinds


def pretrain(args: PretrainingArguments) -> tuple[PretrainingModel, tuple[float, float]]:
    """Train a vision transformer from scratch. Returns it and its accuracy on images it has not seen."""
    set_seed(args.seed)
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    task: DrawnImages | RealImages
    test: Sampler
    if args.data_dir is None:
        task = DrawnImages(args.image_size, args.invented_characters, args.seed)
        test = task.sample
    else:
        task = RealImages(args.data_dir, args.image_size)
        test = task.sample_test
    config = ViTConfig(
        image_size=args.image_size,
        patch_size=args.patch_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        intermediate_size=4 * args.hidden_size,
    )
    kinds = task.kinds.to(device)
    model = PretrainingModel(config, task.num_classes, int(kinds.max()) + 1).to(device)
    model.train()
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1, cycle_momentum=False
    )
    stream = batches(task.sample, args.steps, args.batch_size, args.seed + 1, device)
    progress = trange(args.steps, desc=f"{task.num_classes} classes", mininterval=1)
    for step, (images, labels) in zip(progress, stream, strict=True):
        with torch.autocast(device.type, torch.bfloat16):
            of_classes, of_kinds = model(images)
        every_patch = labels[:, None].expand(of_classes.shape[:2])
        loss = F.cross_entropy(of_classes.flatten(0, 1), every_patch.flatten(), label_smoothing=0.1)
        loss = loss + F.cross_entropy(of_kinds, kinds[labels], label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            hits = right((of_classes, of_kinds), labels, kinds)
            progress.set_postfix(loss=f"{loss.item():.3f}", classes=f"{hits[0]:.3f}", kinds=f"{hits[1]:.3f}")
    return model, accuracy(model, kinds, test, args.num_eval_images, args.seed + 2)


def save(backbone: ViTModel, output_dir: str) -> None:
    """Save the backbone, weights stored in float16 and loaded as float32, and its image processor."""
    backbone.set_attn_implementation("sdpa")
    weights = {name: tensor.half().cpu() for name, tensor in backbone.state_dict().items()}
    backbone.save_pretrained(output_dir, state_dict=weights)
    preprocessing = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": backbone.config.image_size, "width": backbone.config.image_size},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    Path(output_dir, "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Pretrain and save; returns the accuracy on unseen images, of classes and of kinds."""
    (args,) = HfArgumentParser(PretrainingArguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    torch.set_num_threads(args.num_threads)
    start = time.perf_counter()
    model, (of_classes, of_kinds) = pretrain(args)
    save(model.vit, args.output_dir)
    minutes = (time.perf_counter() - start) / 60
    print(
        f"New images: class right {of_classes:.1%} ({model.class_head.out_features} classes, by the patch tokens), "
        f"kind right {of_kinds:.1%} ({model.kind_head.out_features} kinds, by the class token); {minutes:.1f} minutes"
    )
    print(f"Saved to {args.output_dir}")
    return of_classes, of_kinds


if __name__ == "__main__":
    main()
