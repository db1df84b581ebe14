"""The paper's ablations: variants of E²VPT, one table of results each.

Where the default is one of the variants, it has the name it has among the methods, and shares its trainings.
"""

from __future__ import annotations

from typing import Any

from e2vpt_peft.pruning import SCORING_METHODS

from .methods import METHODS, Method, Pruning, choose, e2vpt

TUNED = "E²VPT"
VPT, E2VPT, PRUNED = choose(METHODS, ["VPT-Deep", TUNED, "E²VPT, pruned"])


def visual(number: int) -> Method:
    """E²VPT with another number of visual prompts."""
    return e2vpt(f"{number} visual", num_visual_prompts=number)


def key_value(number: int) -> Method:
    """E²VPT with another number of key-value prompts."""
    return e2vpt(f"{number} key-value", num_kv_prompts=number)


KEY_VALUE: dict[str, Any] = {"num_visual_prompts": 0, "num_kv_prompts": 20, "share_kv_prompts": False}

ABLATIONS: dict[str, tuple[Method, ...]] = {
    "methods": METHODS,
    "components": (
        VPT,
        e2vpt("key-value prompts", num_visual_prompts=0),
        E2VPT,
        e2vpt("pruned tokens", Pruning(segments=False), TUNED),
        e2vpt("pruned segments", Pruning(tokens=False), TUNED),
        e2vpt("pruned, no rewinding", Pruning(rewind=False), TUNED),
        PRUNED,
    ),
    "visual_prompts": tuple(E2VPT if n == 10 else visual(n) for n in (1, 5, 10, 20, 50)),
    "kv_prompts": tuple(VPT if n == 0 else E2VPT if n == 5 else key_value(n) for n in (0, 1, 5, 10, 20)),
    "same_size": (VPT, visual(5), E2VPT),
    "sharing": (E2VPT, e2vpt("separate K and V", share_kv_prompts=False)),
    "rates": (
        E2VPT,
        e2vpt("20 separate key-value", **KEY_VALUE),
        e2vpt("20 separate key-value, own rates", kv_lr_ratio=10, **KEY_VALUE),
        *choose(METHODS, ["E²VPT, LoRA's size, GELU", "E²VPT, all beside", "E²VPT, more prompts", "LoRA"]),
    ),
    "initialisation": (E2VPT, e2vpt("truncated normal", init_weights="trunc_normal")),
    "dropout": (
        E2VPT,
        e2vpt("dropout 0.1 of both", kv_prompt_dropout=0.1),
        e2vpt("no dropout", prompt_dropout=0.0),
    ),
    "importance": (
        E2VPT,
        *(
            PRUNED if name == Pruning().importance else e2vpt(f"importance: {name}", Pruning(importance=name), TUNED)
            for name in SCORING_METHODS
        ),
    ),
}
"""By the name for `--compare`."""
