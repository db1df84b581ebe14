"""Mixed batches of random shapes, on models with one tower and several, from threads that share them: every answer is
that of each input's adapter alone, or the number of names is refused.

As a script: `python -m tests.soak.mixed_batches --calls 3000 --threads 4`.
"""

from __future__ import annotations

import argparse
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from ..support.models import images, tiny_vit
from ..support.zoo import ZOO
from ..test_mixed_batch import BOTH_DEPTHS, adapted
from ..test_mixed_towers import CONFIGS, IMAGE_TOKEN, NAMES, clip, llava, texts

POOL = 5


@dataclass
class Case:
    """A model, and what it makes of each input of a pool with each adapter.

    Attributes:
        model (`PeftModel`): With several adapters.
        names (`list[str]`): Those that may be asked for.
        draw (`Callable`): Draws a batch: inputs of the model, and the number of names for them.
        call (`Callable`): Of the model, inputs and names: the outputs, one for each name.
        alone (`dict[str, torch.Tensor]`): The outputs for the pool by adapter.
    """

    model: PeftModel
    names: list[str]
    draw: Callable[[random.Random], tuple[dict[str, torch.Tensor], list[int]]]
    call: Callable[[PeftModel, dict[str, torch.Tensor], list[str] | None], torch.Tensor]
    alone: dict[str, torch.Tensor]


def single_tower(make: Callable[[], Any], size: int, configs: dict[str, Any]) -> Case:
    pool = images(POOL, size)
    model = adapted(make(), configs)

    def call(model: PeftModel, inputs: dict[str, torch.Tensor], names: list[str] | None) -> torch.Tensor:
        logits: torch.Tensor = model(**inputs, adapter_names=names).logits
        return logits

    def draw(chance: random.Random) -> tuple[dict[str, torch.Tensor], list[int]]:
        rows = chance.choices(range(POOL), k=chance.randint(1, 7))
        return {"pixel_values": pool[rows]}, rows

    return finish(model, [*configs, "__base__"], draw, call, {"pixel_values": pool})


def dual_encoder(tower: str) -> Case:
    pool, ids = images(POOL), texts(POOL)
    targets = {"target_modules": rf".*{tower}_model.*self_attn"}
    model = adapted(clip(), {name: {**config, **targets} for name, config in CONFIGS["deep"].items()}, heads=[])
    embeds = {"vision": "image_embeds", "text": "text_embeds"}[tower]

    def call(model: PeftModel, inputs: dict[str, torch.Tensor], names: list[str] | None) -> torch.Tensor:
        found: torch.Tensor = model(**inputs, adapter_names=names)[embeds]
        return found

    def draw(chance: random.Random) -> tuple[dict[str, torch.Tensor], list[int]]:
        rows, others = (chance.choices(range(POOL), k=chance.randint(1, 7)) for _ in range(2))
        pixels, words = (rows, others) if tower == "vision" else (others, rows)
        return {"pixel_values": pool[pixels], "input_ids": ids[words]}, rows

    return finish(model, NAMES, draw, call, {"pixel_values": pool, "input_ids": ids})


def several_images() -> Case:
    pool = images(POOL)
    model = adapted(llava(), CONFIGS["shallow"], heads=[])
    local = threading.local()
    projector = model.get_base_model().model.multi_modal_projector
    projector.register_forward_pre_hook(lambda module, args: setattr(local, "features", args[0]))

    def call(model: PeftModel, inputs: dict[str, torch.Tensor], names: list[str] | None) -> torch.Tensor:
        model(**inputs, adapter_names=names)
        features: torch.Tensor = local.features
        return features

    def ids(counts: list[int]) -> torch.Tensor:
        rows = [[1] + [IMAGE_TOKEN] * 4 * count + [5, 6] for count in counts]
        longest = max(map(len, rows))
        return torch.tensor([[0] * (longest - len(row)) + row for row in rows])

    def draw(chance: random.Random) -> tuple[dict[str, torch.Tensor], list[int]]:
        counts = [chance.randint(1, 3) for _ in range(chance.randint(1, 3))]
        rows = chance.choices(range(POOL), k=sum(counts))
        return {"pixel_values": pool[rows], "input_ids": ids(counts)}, rows

    return finish(model, NAMES, draw, call, {"pixel_values": pool, "input_ids": ids([POOL])})


def finish(model: PeftModel, names: list[str], draw: Any, call: Any, pool: dict[str, torch.Tensor]) -> Case:
    alone = {}
    with torch.no_grad():
        for name in names:
            if name == "__base__":
                with model.disable_adapter():
                    alone[name] = call(model, pool, None)
            else:
                model.set_adapter(name)
                alone[name] = call(model, pool, None)
    return Case(model, names, draw, call, alone)


def cases() -> list[Case]:
    return [
        single_tower(tiny_vit, 16, BOTH_DEPTHS),
        single_tower(lambda: ZOO["swin"].make(), 32, CONFIGS["deep"]),
        dual_encoder("vision"),
        dual_encoder("text"),
        several_images(),
    ]


@torch.no_grad()
def ask(case: Case, chance: random.Random) -> str:
    """One call; returns what came of it: "right", "refused", or else "wrong" or "not refused"."""
    inputs, rows = case.draw(chance)
    number = len(rows) if chance.random() < 0.8 else chance.randint(0, 14)
    names = chance.choices(case.names, k=number)
    try:
        outputs = case.call(case.model, inputs, names)
    except ValueError as error:
        return "refused" if number != len(rows) and "one name for each" in str(error) else f"wrong: {error}"
    if number != len(rows):
        return "not refused"
    expected = torch.stack([case.alone[name][row] for name, row in zip(names, rows)])
    return "right" if torch.allclose(outputs, expected, atol=1e-4) else "wrong"


def soak(calls: int, threads: int, seed: int = 0) -> Counter[str]:
    """How often each outcome came."""
    shared, outcomes = cases(), []

    def work(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        outcomes.extend(ask(chance.choice(shared), chance) for _ in range(calls // threads))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return Counter(outcomes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    print(dict(soak(**vars(parser.parse_args()))))
