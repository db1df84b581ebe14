"""Kept prefixes are never out of date: after any sequence of changes, each inference is that of a model that keeps
nothing.

As a script: `python -m tests.soak.kept_prefixes --seeds 200 --steps 60`.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from e2vpt_peft import E2VPTConfig, E2VPTLayer, keep_prefixes, prune_prompts, rewind_prompts
from e2vpt_peft.pruning import PromptScores

from ..support.models import BESIDE, images, tiny_vit

NAMES = ["first", "second", "third"]
CONFIGS: dict[str, dict[str, Any]] = {
    "first": {"num_visual_prompts": 4, "num_kv_prompts": 2, "num_segments": 4},
    "second": {"num_visual_prompts": 4, "num_kv_prompts": 2, "num_segments": 4, **BESIDE},
    "third": {"num_visual_prompts": 3, "num_kv_prompts": 0, "layers_to_transform": [0, 2]},
}


class Walk:
    """A model that things happen to.

    Args:
        seed (`int`): Of all chances.
    """

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        torch.manual_seed(seed)
        heads = [None, ["classifier"], ["classifier", "layernorm_before"]][seed % 3]
        self.configs = {name: {**config, "modules_to_save": heads} for name, config in CONFIGS.items()}
        model = get_peft_model(tiny_vit().double(), E2VPTConfig(**self.configs["first"]), adapter_name="first")
        for name in NAMES[1:]:
            model.add_adapter(name, E2VPTConfig(**self.configs[name]))
        self.model: PeftModel = model.double().eval()
        self.inputs = images(4).double()

    # What may happen between two inferences.

    def _tensor(self, *, of_prompts: bool) -> nn.Parameter:
        layer = self.chance.choice([module for module in self.model.modules() if isinstance(module, E2VPTLayer)])
        if of_prompts:
            return self.chance.choice([*layer.e2vpt_visual_prompts.parameters(), *layer.e2vpt_kv_prompts.parameters()])
        sources = [layer.site.norm, *layer.site.projections()]
        return self.chance.choice([parameter for module in sources for parameter in module.parameters()])

    def change_prompts(self) -> None:
        with torch.no_grad():
            self._tensor(of_prompts=True).add_(torch.randn(()).double())

    def change_prompts_in_inference_mode(self) -> None:
        with torch.inference_mode():
            self._tensor(of_prompts=True).mul_(1.5)

    def change_prompts_through_data(self) -> None:
        tensor = self._tensor(of_prompts=True).data
        rows = tensor.view(-1, 32) if tensor.dim() > 1 else tensor[None]
        rows[self.chance.randrange(len(rows))].mul_(-1)

    def give_prompts_other_memory(self) -> None:
        tensor = self._tensor(of_prompts=True)
        tensor.data = torch.randn_like(tensor)

    def change_backbone(self) -> None:
        with torch.no_grad():
            self._tensor(of_prompts=False).mul_(1.1)

    def change_backbone_through_data(self) -> None:
        self._tensor(of_prompts=False).data.mul_(1.1)

    def change_eps(self) -> None:
        layer = next(module for module in self.model.modules() if isinstance(module, E2VPTLayer))
        norm = layer.site.norm
        norm = norm.original_module if hasattr(norm, "original_module") else norm
        norm.eps = self.chance.choice([1e-12, 0.1, 0.5])

    def replace_projection(self) -> None:
        layer = next(module for module in self.model.modules() if isinstance(module, E2VPTLayer))
        setattr(layer.base_layer, layer.site.value_projection, nn.Linear(32, 32).double())

    def wrap_and_merge(self) -> None:
        """As LoRA does: its matrices come and go, and what they did stays in the weight, by way of `.data`."""
        layer = self.chance.choice([module for module in self.model.modules() if isinstance(module, E2VPTLayer)])
        name = self.chance.choice([layer.site.key_projection, layer.site.value_projection])
        projection: nn.Linear = getattr(layer.base_layer, name)
        setattr(layer.base_layer, name, nn.Sequential(projection, nn.Linear(32, 32).double()))
        if self.chance.random() < 0.5:
            self.infer()
        setattr(layer.base_layer, name, projection)
        projection.weight.data += 0.1 * torch.randn(32, 1).double() @ torch.randn(1, 32).double()

    def train(self) -> None:
        self.model.train()
        optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.5)
        self.model(pixel_values=self.inputs, labels=torch.arange(4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        self.model.eval()

    def step_in_eval_mode(self) -> None:
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.1, foreach=True)
        self.model(pixel_values=self.inputs, labels=torch.arange(4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def load(self) -> None:
        state = {name: torch.randn_like(tensor) for name, tensor in self.model.named_parameters() if "e2vpt_" in name}
        self.model.load_state_dict(state, strict=False, assign=self.chance.random() < 0.5)

    def activate(self) -> None:
        name = self.chance.choice(self.known)
        several = self.chance.sample(self.known, 2) if self.configs[name]["modules_to_save"] is None else name
        self.model.base_model.set_adapter(self.chance.choice([name, several]))

    def replace_adapter(self) -> None:
        name = self.chance.choice([name for name in self.known if name not in self.model.active_adapters] or ["third"])
        if len(self.known) > 2 and name not in self.model.active_adapters:
            self.model.delete_adapter(name)
            if self.chance.random() < 0.8:
                self.model.add_adapter(name, E2VPTConfig(**self.configs[name]))
                self.model.double().eval()

    def prune(self) -> None:
        if "first" not in self.known:
            return
        if self.model.peft_config["first"].token_mask is None:
            scores = PromptScores(torch.rand(4), torch.rand(4, 4))
            prune_prompts(self.model, scores, token_rate=0.25, segment_rate=0.5, adapter_name="first")
        else:
            rewind_prompts(self.model, init="fresh", undo_pruning=True, adapter_name="first")

    def cast(self) -> None:
        self.model.to(torch.bfloat16).double()

    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    @property
    def known(self) -> list[str]:
        return [name for name in NAMES if name in self.model.peft_config]

    def infer(self) -> None:
        """An inference of a random kind is what it is when nothing is kept, and again."""
        guard = self.chance.choice([torch.no_grad, torch.inference_mode])
        names = [self.chance.choice([*self.known, "__base__"]) for _ in self.inputs]
        kwargs = self.chance.choice([{}, {}, {"adapter_names": names}])
        disabled = self.model.disable_adapter() if self.chance.random() < 0.1 else nullcontext()
        with guard(), disabled:
            found = [self.model(pixel_values=self.inputs, **kwargs).logits for _ in range(2)]
            twin = copy.deepcopy(self.model)
            keep_prefixes(twin, False)
            expected = twin(pixel_values=self.inputs, **kwargs).logits
        for logits in found:
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


CHANGES: list[Callable[[Walk], None]] = [
    change for name, change in vars(Walk).items() if callable(change) and name[0] != "_" and name != "infer"
]


def walk(seed: int, steps: int) -> Counter[str]:
    """Let random things happen to a model. Returns how often each did."""
    happened: Counter[str] = Counter()
    subject = Walk(seed)
    subject.infer()
    for _ in range(steps):
        change = subject.chance.choice(CHANGES)
        change(subject)
        happened[change.__name__] += 1
        for _ in range(subject.chance.randint(1, 2)):
            subject.infer()
    return happened


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    total: Counter[str] = Counter()
    for seed in range(args.seeds):
        total += walk(seed, args.steps)
    print(dict(total))
