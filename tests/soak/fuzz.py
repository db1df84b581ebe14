"""Random damage to saved adapters, through every entrance: refused and the model is what it was, or harmless.

As a script: `python -m tests.soak.fuzz --inputs 20000 --seed 0`. Every input follows from the seed and its number:
`--first 1234 --inputs 1` tries that one again and shows what it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import reprlib
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from transformers.utils import logging

from e2vpt_peft import E2VPTConfig

from ..peft_contract.common import adapted, differences, layers_of, logits, snapshot
from ..support.models import BESIDE, tiny_vit

WEIGHTS, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None
SECONDS = 5
"""An input that takes more of the processor's time hangs."""
KINDS: dict[str, dict[str, Any]] = {
    "deep": {},
    "shallow": {"visual_prompt_depth": "shallow"},
    "pruned": {"token_mask": [True, False], "segment_mask": [[True] * 12 + [False] * 4, [False] * 16]},
    "unshared": {"share_kv_prompts": False},
    "beside": BESIDE,
    "some layers": {"layers_to_transform": [0, 2]},
    "no head": {"modules_to_save": None},
}


class Hangs(BaseException):
    pass


@dataclass
class Folder:
    """A saved adapter: its weights, as bytes or as tensors, and its configuration."""

    kind: str
    weights: bytes
    config: Any
    files: str = "whole"
    done: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """What is not as it was saved."""
        whole = next(folder.config for folder in SAVED if folder.kind == self.kind)
        changed = {name: value for name, value in self.config.items() if name not in whole or value != whole[name]}
        gone = sorted(set(whole) - set(self.config))
        return f"{self.kind}, {self.files}, {self.done} {reprlib.repr(changed)} {f'without {gone}' if gone else ''}"

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load(self.weights)

    def write(self, path: Path) -> None:
        if self.files == "pickled":
            try:
                torch.save(self.tensors, path / PICKLE)
            except SafetensorError:  # the bytes are damaged already
                (path / PICKLE).write_bytes(self.weights)
        elif self.files == "a folder":
            (path / WEIGHTS).mkdir()
        elif self.files == "a dangling link":
            (path / WEIGHTS).symlink_to("/nowhere")
        elif self.files != "no weights":
            (path / WEIGHTS).write_bytes(self.weights)
        (path / CONFIG).write_text(json.dumps(self.config))


def saved_adapters() -> list[Folder]:
    folders = []
    for kind, config in KINDS.items():
        with tempfile.TemporaryDirectory() as path:
            adapted(**config).save_pretrained(path)
            folders.append(
                Folder(kind, (Path(path) / WEIGHTS).read_bytes(), json.loads((Path(path) / CONFIG).read_text()))
            )
    return folders


# What is done to them


def damage_bytes(folder: Folder, draw: random.Random) -> None:
    content = bytearray(folder.weights)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(draw.randint(1, 4)):
        if not content:
            break
        at = draw.randrange(min(header, len(content)) if draw.random() < 0.7 else len(content))  # mostly in the header
        match draw.choice(["flip", "byte", "cut", "drop", "insert", "repeat"]):
            case "flip":
                content[at] ^= 1 << draw.randrange(8)
            case "byte":
                content[at] = draw.randrange(256)
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + draw.randint(1, 64)]
            case "insert":
                content[at:at] = draw.randbytes(draw.randrange(16))
            case "repeat":
                content[at:at] = content[at : at + draw.randint(1, 64)]
    folder.weights = bytes(content)


DTYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.uint8, torch.bool, torch.complex64),
]
WRAPPERS = ["module.", "_orig_mod.", "base_model.model.", "model.", "vit.", "encoder."]


def change_tensors(folder: Folder, draw: random.Random) -> None:
    tensors = folder.tensors
    for _ in range(draw.randint(1, 3)):
        if not tensors:
            break
        name = draw.choice(sorted(tensors))
        match draw.choice(
            ["drop", "drop kind", "rename", "swap", "shape", "dtype", "value", "add", "prefix", "layers"]
        ):
            case "drop":
                del tensors[name]
            case "drop kind":
                ending = name.rpartition(".")[2]
                tensors = {key: value for key, value in tensors.items() if not key.endswith(ending)}
            case "rename":
                at = draw.randint(0, len(name))
                tensors[name[:at] + draw.choice(["", "x", ".", "1", "ü"]) + name[at + 1 :]] = tensors.pop(name)
            case "swap":
                other = draw.choice(sorted(tensors))
                tensors[name], tensors[other] = tensors[other], tensors[name]
            case "shape":
                tensors[name] = torch.zeros([draw.randint(0, 33) for _ in range(draw.randint(0, 4))])
            case "dtype":
                tensors[name] = tensors[name].to(draw.choice(DTYPES))
            case "value" if tensors[name].is_floating_point() and tensors[name].numel():
                tensors[name] = tensors[name].float()
                tensors[name].view(-1)[0] = draw.choice([float("nan"), float("inf"), -float("inf"), 1e38, 0.0])
            case "add":
                known = [key for key, _ in BACKBONE.named_parameters()]
                extra = draw.choice([*known, "x", "e2vpt_kv_prompts", "classifier.extra", "a.e2vpt_nonsense"])
                tensors[draw.choice(["", "base_model.model."]) + extra] = torch.ones(draw.randint(0, 3), 5)
            case "prefix":
                added, at = draw.choice(WRAPPERS), draw.choice(["", "base_model.model."])
                tensors = {at + added + key.removeprefix(at): value for key, value in tensors.items()}
            case "layers":
                moved = str(draw.randint(0, 4))
                tensors = {key.replace("layers.1", f"layers.{moved}"): value for key, value in tensors.items()}
    folder.weights = save({name: value.clone().contiguous() for name, value in tensors.items()})


def any_value(draw: random.Random, depth: int = 2) -> Any:
    kinds = ["none", "bool", "small", "huge", "float", "text"] + (["list", "object"] if depth else [])
    match draw.choice(kinds):
        case "none":
            return None
        case "bool":
            return draw.random() < 0.5
        case "small":
            return draw.randint(-2, 20)
        case "huge":
            return draw.choice([2**31, 2**70, -(2**70), 10_000, 100_000])
        case "float":
            return draw.choice([0.0, 0.5, 1.0, -1.0, 1e30, float("nan"), float("inf")])
        case "text":
            return draw.choice(["", "a", "deep", "(", "\ud800", "`x`\n# y", "x" * 3000, "classifier", "/etc", "\0"])
        case "list":
            return [any_value(draw, depth - 1) for _ in range(draw.randint(0, 4))]
        case _:
            return {draw.choice(["a", "hidden_size", "num_layers"]): any_value(draw, depth - 1)}


LIKELY: dict[str, list[Any]] = {
    "num_visual_prompts": [0, 1, 2, 3, 10_000],
    "visual_prompt_depth": ["deep", "shallow"],
    "num_kv_prompts": [0, 3, 4, 10_000],
    "share_kv_prompts": [True, False],
    "kv_prompt_activation": [None, "gelu"],
    "init_weights": [True, False, "trunc_normal"],
    "prompt_dropout": [0.0, 0.5, 1.0],
    "num_segments": [1, 2, 7, 16, 32, 2**70, 5_000_000],
    "target_modules": [["attention"], ".*attention", ["q_proj"], ["vit"], ["nothing"], [], "dummy-target-modules"],
    "exclude_modules": [["layers.1.attention"], ".*1.*", ["attention"], ".*"],
    "layers_to_transform": [[0], [1, 2], [2, 2, 2], 7, [-1], [0] * 20_000],
    "layers_pattern": ["layers", ["layers"], "(", ["(\\w+\\.?)+!"]],
    "modules_to_save": [
        *(["classifier"], ["layernorm"], ["nothing"], ["q_proj"], ["classifier", "ayers"], ["model"], ["vit"], ["("]),
        *(["attention"], ["layers.0"], ["layers.0", "mlp"], ["embeddings"], ["(\\w+\\.?)+!"], ["classifier"] * 2000),
    ],
    "attention_norm": ["layernorm_before", "none", "forward", "0", "mlp"],
    "num_special_tokens": [0, 1, 20, 10**9],
    "backbone": [None, {"hidden_size": [32] * 2000, "num_heads": list(range(1, 2001))}, {"num_layers": 12}],
    "token_mask": [[True, False], [True, True, True], [False, False]],
    "segment_mask": [[[True] * 12 + [False] * 4, [False] * 16], [[True] * 16] * 2, [[False] * 4 + [True] * 12] * 2],
    "task_type": ["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "x"],
    "inference_mode": [True, False],
    "revision": [None, "main"],
    "base_model_name_or_path": [None, "google/vit", "a" * 5000, "\ud800"],
    "prompt_mixing": [None, "soft"],
}


def change_configuration(folder: Folder, draw: random.Random) -> None:
    config = folder.config
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(sorted({*config, *LIKELY} - {"peft_type"}))
        draws = draw.random()
        if draws < 0.15:
            config.pop(name, None)
        elif draws < 0.6 and name in LIKELY:
            config[name] = copy.deepcopy(draw.choice(LIKELY[name]))
        else:
            config[name] = any_value(draw)


def change_files(folder: Folder, draw: random.Random) -> None:
    folder.files = draw.choice(["pickled", "a folder", "a dangling link", "no weights", "whole"])


def swap_weights(folder: Folder, draw: random.Random) -> None:
    """Of another adapter, whose configuration may be that of this one but for the weights."""
    folder.weights = draw.choice(SAVED).weights


MUTATORS: dict[Callable[[Folder, random.Random], None], int] = {
    damage_bytes: 2,
    change_tensors: 5,
    change_configuration: 5,
    change_files: 1,
    swap_weights: 1,
}


# Where they go in


def bare() -> nn.Module:
    return copy.deepcopy(BACKBONE)


def with_first() -> nn.Module:
    return copy.deepcopy(FIRST[0])


def injected() -> nn.Module:
    return copy.deepcopy(FIRST[1])


def without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): value for name, value in tensors.items()}


def options(draw: random.Random, *names: str) -> dict[str, bool]:
    return {name: True for name in names if draw.random() < 0.15}


FLAGS = ("low_cpu_mem_usage", "is_trainable", "ignore_mismatched_sizes")
Enter = Callable[[Any, Path, Folder, random.Random], Any]
ENTRANCES: dict[str, tuple[Callable[[], nn.Module], Enter, str]] = {
    "from_pretrained": (bare, lambda m, p, f, d: PeftModel.from_pretrained(m, p, **options(d, *FLAGS)), "default"),
    "load_adapter": (with_first, lambda m, p, f, d: m.load_adapter(p, "other", **options(d, *FLAGS)), "other"),
    "load_adapter, the name of another": (with_first, lambda m, p, f, d: m.load_adapter(p, "first"), "first"),
    "set_peft_model_state_dict": (
        with_first,
        lambda m, p, f, d: set_peft_model_state_dict(m, f.tensors, "first", **options(d, "low_cpu_mem_usage")),
        "first",
    ),
    "set_peft_model_state_dict, injected": (
        injected,
        lambda m, p, f, d: set_peft_model_state_dict(m, without_prefix(f.tensors), "first"),
        "first",
    ),
    "hotswap": (with_first, lambda m, p, f, d: hotswap_adapter(m, str(p), "first"), "first"),
    "get_peft_model": (bare, lambda m, p, f, d: get_peft_model(m, made(f)), "default"),
    "add_adapter": (with_first, lambda m, p, f, d: m.add_adapter("other", made(f)), "other"),
    "inject_adapter_in_model": (injected, lambda m, p, f, d: inject_adapter_in_model(made(f), m, "other"), "other"),
    "add_adapter of transformers": (bare, lambda m, p, f, d: m.add_adapter(made(f)), "default"),
    "config=": (
        bare,
        lambda m, p, f, d: PeftModel.from_pretrained(m, p, config=PeftConfig.from_pretrained(p)),
        "default",
    ),
    "load_adapter of transformers": (bare, lambda m, p, f, d: m.load_adapter(str(p)), "default"),
}
NOT_OURS = {"config=", "load_adapter of transformers"}
"""PEFT and transformers read the weights when the adapter is in the model, and do not ask the method before."""
WITHOUT_WEIGHTS = {"get_peft_model", "add_adapter", "inject_adapter_in_model", "add_adapter of transformers"}


def made(folder: Folder) -> E2VPTConfig:
    """A configuration that a user makes, of a size that is worth trying."""
    fields = {name: value for name, value in folder.config.items() if name not in ("peft_type", "auto_mapping")}
    config = E2VPTConfig(**fields)
    if config.num_visual_prompts + config.num_kv_prompts > 100:
        raise ValueError("large")
    return config


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Stop what computes for longer than that, or waits for far longer: on a busy machine, time passes faster."""

    def stop(*_: Any) -> None:
        raise Hangs

    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(60 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def prompts_of(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{kind}": getattr(layer, kind)[adapter]
        for number, layer in enumerate(layers_of(model))
        for kind in ("e2vpt_visual_prompts", "e2vpt_kv_prompts")
        if adapter in getattr(layer, kind)
    }


def faults_of(model: nn.Module, folder: Folder, entrance: str, adapter: str, before: dict[str, Any]) -> list[str]:
    """What is wrong with a model that has taken an adapter."""
    faults = []
    if not prompts_of(model, adapter):
        faults.append("an adapter without prompts")
    if entrance not in WITHOUT_WEIGHTS:
        saved = folder.tensors.values()
        for name, prompts in prompts_of(model, adapter).items():
            if not any(one.shape == prompts.shape and torch.equal(one.to(prompts.dtype), prompts) for one in saved):
                faults.append(f"random or changed prompts: {name.partition('.')[2]}")
    state = model.state_dict()
    plain = {}
    for name, value in state.items():
        for part in ("base_model.model.", "base_layer.", "original_module."):
            name = name.replace(part, "")
        plain[name] = value
    if any(not torch.equal(plain[name], value) for name, value in BACKBONE.state_dict().items()):
        faults.append("a backbone that is overwritten")
    if adapter != "first":
        others = {name: value for name, value in before["state"].items() if "first" in name.split(".")}
        if any(name not in state or not torch.equal(state[name], value) for name, value in others.items()):
            faults.append("another adapter that is overwritten")
    return faults


def faults_later(model: Any, entrance: str, before: dict[str, Any]) -> list[str]:
    """What is wrong with a model that has taken an adapter when that is deleted again, or saved and loaded."""
    if entrance == "load_adapter":
        model.delete_adapter("other")
        # Loading puts a model into eval mode, and after shallow prompts a set of hooks stays, for the next ones.
        changed = set(differences(before, snapshot(model))) - {"modes", "hooks"}
        return [f"traces of a deleted adapter: {sorted(changed)}"] if changed else []
    if entrance != "get_peft_model" or model.peft_config["default"].task_type:  # whose models take no images
        return []
    with tempfile.TemporaryDirectory(dir=SCRATCH) as path:
        model.save_pretrained(path)
        loaded = PeftModel.from_pretrained(bare(), path)
    same = torch.equal(logits(loaded.eval()), logits(model.eval()))
    return [] if same else ["another adapter than was saved"]


BACKBONE: Any = tiny_vit()
SAVED: list[Folder] = []
FIRST: list[nn.Module] = []
UNCHANGED: dict[Callable[[], nn.Module], tuple[Any, dict[str, Any]]] = {}
"""Models that have refused all that they were given, with what they looked like before: good for the next input."""


def prepare() -> None:
    if SAVED:
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SAVED.extend(saved_adapters())
        FIRST.append(adapted(bare(), adapter_name="first"))
        config = copy.copy(FIRST[0].peft_config["first"])
        FIRST.append(inject_adapter_in_model(config, bare(), "first"))


def try_input(seed: int, number: int) -> tuple[str, str, list[str], str]:
    """One input: the entrance, the outcome, what is wrong, and what it was."""
    draw = random.Random(f"{seed}/{number}")
    folder = copy.deepcopy(draw.choice(SAVED))
    for _ in range(draw.choice([1, 1, 1, 2])):
        mutate = draw.choices(list(MUTATORS), list(MUTATORS.values()))[0]
        try:
            mutate(folder, draw)
        except Exception:  # of bytes that are damaged already
            damage_bytes(folder, draw)
        folder.done.append(mutate.__name__)
    entrance = draw.choice(list(ENTRANCES))
    make, enter, adapter = ENTRANCES[entrance]
    if make not in UNCHANGED:
        model = make()
        UNCHANGED[make] = model, snapshot(model)
    model, before = UNCHANGED[make]
    words = ""
    torch.manual_seed(number)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as path, warnings.catch_warnings(), limited(SECONDS):
        warnings.simplefilter("ignore")
        try:
            folder.write(Path(path))
            entered = enter(model, Path(path), folder, draw)
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            where = traceback.extract_tb(error.__traceback__)[-1].filename
            changed = differences(before, snapshot(model))
            outcome, faults = "refused", ["the model differs"] if changed else []
            if changed:
                del UNCHANGED[make]
            words += f" (differs: {changed})" if changed else ""
            is_ours = "e2vpt_peft" in where and isinstance(error, (ValueError, TypeError))
            if not str(error) or ("e2vpt_peft" in where and not is_ours):
                faults = [*faults, f"an error that is not meant for people: {type(error).__name__}"]
            outcome += " by this package" if is_ours else f" elsewhere, {type(error).__name__}"
        else:
            outcome = "taken"
            del UNCHANGED[make]
            model = entered if isinstance(entered, nn.Module) else model
            faults = faults_of(model, folder, entrance, adapter, before)
            try:
                faults += faults_later(model, entrance, before)
            except Exception as error:
                faults.append("an adapter that cannot be saved, loaded or deleted")
                words = f"{type(error).__name__}: {error}"
    return entrance, outcome, faults, f"{folder.describe()}: {words}"


def try_whole_input(seed: int, number: int) -> tuple[str, str, list[str], str]:
    """As [`try_input`], if it does not hang."""
    try:
        return try_input(seed, number)
    except Hangs:
        UNCHANGED.clear()
        return "any", "hangs", ["a hang"], f"seed {seed}, input {number}"


def run(inputs: int, seed: int, first: int = 0, show: int = 3) -> dict[str, Any]:
    """Try inputs; returns counts by entrance and outcome, what went wrong where, and the slowest."""
    prepare()
    outcomes: Counter[tuple[str, str]] = Counter()
    wrong: dict[tuple[str, str], list[tuple[int, str]]] = {}
    slowest = (0.0, -1)
    for number in range(first, first + inputs):
        start = time.process_time()
        entrance, outcome, faults, what = try_whole_input(seed, number)
        slowest = max(slowest, (time.process_time() - start, number))
        outcomes[entrance, outcome] += 1
        for fault in faults:
            wrong.setdefault((entrance, fault), []).append((number, what))
    return {"outcomes": outcomes, "wrong": wrong, "slowest": slowest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--show", type=int, default=2, help="how many inputs to show of each fault")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    results = run(arguments.inputs, arguments.seed, arguments.first)
    for (entrance, outcome), count in sorted(results["outcomes"].items()):
        print(f"{entrance:38s} {outcome:45s} {count:6d}")
    for (entrance, fault), found in sorted(results["wrong"].items()):
        print(f"\n{'(not ours) ' if entrance in NOT_OURS else ''}{entrance}: {fault}: {len(found)}")
        for number, what in found[: arguments.show]:
            print(f"    {number}: {what[:1500]}")
    ours = sum(len(found) for (entrance, _), found in results["wrong"].items() if entrance not in NOT_OURS)
    seconds, number = results["slowest"]
    print(f"\n{arguments.inputs} inputs, seed {arguments.seed}, in {time.time() - start:.0f} s")
    print(f"the slowest took {seconds:.1f} s of the processor (input {number})")
    print(f"faults at entrances that are ours: {ours}")


if __name__ == "__main__":
    main()
