from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from e2vpt_peft import E2VPTConfig, PromptOptimizerFactory, create_optimizer, prune_prompts
from e2vpt_peft.pruning import PromptScores

from .support.models import tiny_vit
from .trainer.toy import TRAIN, adapted, arguments, make_trainer, pruning

RATES = {"lr": 0.5, "visual_prompt_lr_ratio": 4.0, "kv_prompt_lr_ratio": 16.0, "weight_decay": 0.25}
MATRICES, VECTORS, VISUAL, KV = (0.5, 0.25), (0.5, 0.0), (2.0, 0.0), (8.0, 0.0)


def rates_by_name(model, **options):
    """(learning rate, weight decay) of each parameter that the optimizer has."""
    groups = create_optimizer(model, **{**RATES, **options}).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


def expected(name):
    if "e2vpt_visual_prompts" in name:
        return VISUAL
    if "e2vpt_kv_prompts" in name:
        return KV
    return VECTORS if name.endswith("bias") or "norm" in name else MATRICES


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_each_trainable_parameter_has_the_rate_and_the_decay_of_its_kind(depth, share):
    saved = ["classifier", "layernorm_before", "layernorm_after"]
    model = adapted(visual_prompt_depth=depth, share_kv_prompts=share, modules_to_save=saved)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert rates_by_name(model) == {name: expected(name) for name in trainable}
    assert {expected(name) for name in trainable} == {MATRICES, VECTORS, VISUAL, KV}


def test_flat_prompts_of_a_pruned_adapter_keep_the_rate_of_their_kind():
    model = adapted()
    prune_prompts(model, PromptScores(torch.rand(4), torch.rand(4, 4)), token_rate=0.25, segment_rate=0.5)
    flat = {name: p for name, p in model.named_parameters() if "e2vpt_visual_prompts" in name}
    assert {parameter.dim() for parameter in flat.values()} == {1}
    rates = rates_by_name(model)
    assert {rates[name] for name in flat} == {VISUAL}


def test_adapters_that_are_not_trained_are_left_out_and_other_methods_are_taken_in():
    lora = get_peft_model(tiny_vit(num_hidden_layers=1), LoraConfig(target_modules=["q_proj"]))
    model = get_peft_model(lora, E2VPTConfig(num_segments=4))
    model.add_adapter("other", E2VPTConfig(num_segments=4))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    rates = rates_by_name(model)
    assert not [name for name in rates if "other" in name]
    assert {rate for name, rate in rates.items() if "lora_" in name} == {MATRICES}
    assert set(rates.values()) == {MATRICES, VISUAL, KV}


def test_all_kinds_of_prompts_have_the_rate_of_the_head_by_default():
    groups = create_optimizer(adapted(), lr=0.5).param_groups
    assert len(groups) == 4 and {group["lr"] for group in groups} == {0.5}


def test_the_first_rate_which_trainer_logs_is_that_of_the_head():
    assert create_optimizer(adapted(), lr=0.5).param_groups[0]["lr"] == 0.5


def test_the_optimizer_is_the_one_asked_for():
    optimizer = create_optimizer(adapted(), torch.optim.SGD, **RATES, momentum=0.9, nesterov=True)
    assert type(optimizer) is torch.optim.SGD
    assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0.9, True)}


@pytest.mark.parametrize("name", RATES)
def test_a_rate_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name}=-1 must be "):
        create_optimizer(adapted(), **{**RATES, name: -1})
    with pytest.raises(TypeError, match=rf"{name}='1' must be a number"):
        create_optimizer(adapted(), **{**RATES, name: "1"})


def test_a_loaded_adapter_that_cannot_be_trained_is_refused(tmp_path):
    adapted().save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), str(tmp_path))
    with pytest.raises(ValueError, match="no trainable parameter: load the adapter with is_trainable=True"):
        create_optimizer(model)


def test_trainer_takes_it(tmp_path):
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = create_optimizer(model, lr=3e-3)
    Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=TRAIN, optimizers=(optimizer, None)).train()
    assert not [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]


def test_the_phases_of_a_search_make_their_own_by_the_factory(tmp_path):
    seen = []

    class Noting(PromptOptimizerFactory):
        def __call__(self, model, **kwargs):
            optimizer = super().__call__(model, **kwargs)
            trained = [p for p in model.parameters() if p.requires_grad]
            held = [p for group in optimizer.param_groups for p in group["params"]]
            seen.append(({id(p) for p in trained} == {id(p) for p in held}, sum(p.numel() for p in held)))
            return optimizer

    config = pruning(token_rates=[0.5], segment_rates=[0.0])
    trainer = make_trainer(tmp_path, config=config, max_steps=1, optimizer_cls_and_kwargs=(Noting, RATES))
    trainer.train()
    assert [complete for complete, _ in seen] == [True, True]
    assert seen[1][1] < seen[0][1]


def test_a_search_is_not_resumed_with_another_rate(tmp_path):
    config = pruning(token_rates=[0.5], segment_rates=[0.0])
    options = {"config": config, "max_steps": 1}
    make_trainer(tmp_path, **options, optimizer_cls_and_kwargs=(PromptOptimizerFactory, RATES)).train()
    other = {**RATES, "kv_prompt_lr_ratio": 2.0}
    trainer = make_trainer(tmp_path, **options, optimizer_cls_and_kwargs=(PromptOptimizerFactory, other))
    with pytest.raises(ValueError, match="'kv_prompt_lr_ratio': 2.0.*it was.*'kv_prompt_lr_ratio': 16.0"):
        trainer.train(resume_from_checkpoint=True)
