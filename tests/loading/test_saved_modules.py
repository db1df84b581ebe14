from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, CLIPModel, ViTForImageClassification, ViTModel

from e2vpt_peft import E2VPTConfig
from e2vpt_peft.loading.saved_modules import warn_of_new_head

from ..support.adapted import assert_refused
from ..support.models import images, tiny_vit
from ..support.zoo import WORDS, ZOO
from ..test_mixed_towers import clip


class TestNamesThatNoModuleHas:
    @pytest.mark.parametrize(
        ("wanted", "words"),
        [
            ("classifer", "Is 'classifier' meant?"),
            ("head", "Is 'classifier' meant?"),
            ("vit.layernrom", "Is 'vit.layernorm' meant?"),
            ("layernorm_befor", "Is 'layernorm_before' meant?"),
            ("Classifier", "Is 'classifier' meant?"),
            ("classifier.", "Is 'classifier' meant?"),
            ("modules_to_save", "no module of the model has a name that ends like that"),
            ("attention.q_proj", "no module of the model has a name that ends like that"),  # once it is adapted
        ],
    )
    def test_they_are_refused_with_the_nearest_one_and_nothing_is_changed(self, wanted, words):
        config = {"modules_to_save": ["vit.layernorm", wanted]}
        assert_refused(tiny_vit(), config, ["modules_to_save=[", repr(wanted), words])

    def test_adding_an_adapter_is_refused_too(self):
        model = get_peft_model(tiny_vit(), E2VPTConfig(modules_to_save=["classifier"])).eval()
        before = model(images()).logits
        with pytest.raises(ValueError, match="Is 'classifier' meant"):
            model.add_adapter("other", E2VPTConfig(modules_to_save=["clasifier"]))
        assert list(model.peft_config) == ["default"]
        assert torch.equal(model(images()).logits, before)
        model.add_adapter("other", E2VPTConfig(modules_to_save=["classifier"]))

    def test_an_adapter_with_a_head_is_refused_by_a_model_without_one(self, tmp_path):
        get_peft_model(tiny_vit().vit, E2VPTConfig(modules_to_save=["layernorm"])).save_pretrained(tmp_path / "norm")
        PeftModel.from_pretrained(tiny_vit().vit, tmp_path / "norm")
        get_peft_model(tiny_vit(), E2VPTConfig(modules_to_save=["classifier"])).save_pretrained(tmp_path / "head")
        with pytest.raises(ValueError, match=r"\['classifier'\].*no module of the model"):
            PeftModel.from_pretrained(tiny_vit().vit, tmp_path / "head")

    @pytest.mark.parametrize("task_type", [TaskType.SEQ_CLS, TaskType.TOKEN_CLS])
    def test_peft_may_guess_at_the_names_of_a_head(self, task_type, tmp_path):
        backbone = ZOO["bert"].make() if task_type == TaskType.SEQ_CLS else ZOO["roberta"].make()
        model = get_peft_model(backbone, E2VPTConfig(task_type=task_type, modules_to_save=["embeddings.LayerNorm"]))
        assert any("classifier.modules_to_save" in name for name, _ in model.named_parameters())
        with pytest.raises(ValueError, match="Is 'classifier' meant"):
            get_peft_model(ZOO["bert"].make(), E2VPTConfig(task_type=task_type, modules_to_save=["classifer"]))


class TestNewHeads:
    """Of models that come from a checkpoint, as by `from_pretrained(backbone, num_labels=...)`."""

    @pytest.fixture
    def backbone(self, tmp_path):
        tiny_vit().vit.save_pretrained(tmp_path / "backbone")
        return tmp_path / "backbone"

    @staticmethod
    def warned(make):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make()
        return [str(warning.message) for warning in caught if "newly initialised" in str(warning.message)]

    def test_one_that_nobody_saves_is_warned_of_once(self, backbone):
        model = ViTForImageClassification.from_pretrained(backbone, num_labels=7)
        (message,) = self.warned(lambda: get_peft_model(model, E2VPTConfig()))
        assert "'classifier' are newly" in message and "Pass modules_to_save=['classifier']" in message
        peft_model = get_peft_model(ViTForImageClassification.from_pretrained(backbone, num_labels=7), E2VPTConfig())
        assert self.warned(lambda: peft_model.add_adapter("other", E2VPTConfig())) == []

    def test_one_of_another_size_than_the_checkpoints_is_new(self, tmp_path):
        tiny_vit().save_pretrained(tmp_path)
        same = ViTForImageClassification.from_pretrained(tmp_path)
        assert self.warned(lambda: get_peft_model(same, E2VPTConfig())) == []
        other = ViTForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
        assert len(self.warned(lambda: get_peft_model(other, E2VPTConfig()))) == 1

    def test_transformers_own_way_warns_as_well(self, backbone):
        model = ViTForImageClassification.from_pretrained(backbone, num_labels=7)
        assert len(self.warned(lambda: model.add_adapter(E2VPTConfig()))) == 1

    def test_loading_an_adapter_without_a_head_says_that_the_head_is_random(self, backbone, tmp_path):
        get_peft_model(tiny_vit(), E2VPTConfig()).save_pretrained(tmp_path / "adapter")
        model = ViTForImageClassification.from_pretrained(backbone, num_labels=7)
        assert len(self.warned(lambda: PeftModel.from_pretrained(model, tmp_path / "adapter"))) == 1

    @pytest.mark.parametrize(
        "config",
        [
            E2VPTConfig(modules_to_save=["classifier"]),
            E2VPTConfig(modules_to_save=["fier"]),  # as PEFT finds it
        ],
    )
    def test_one_that_is_saved_is_no_matter(self, backbone, config):
        model = ViTForImageClassification.from_pretrained(backbone, num_labels=7)
        assert self.warned(lambda: get_peft_model(model, config)) == []

    def test_one_that_another_methods_adapter_saves_is_no_matter(self, backbone):
        model = ViTForImageClassification.from_pretrained(backbone, num_labels=7).requires_grad_(False)
        lora = LoraConfig(modules_to_save=["classifier"])
        assert self.warned(lambda: warn_of_new_head(model, [lora, E2VPTConfig()])) == []
        assert len(self.warned(lambda: warn_of_new_head(model, [LoraConfig(), E2VPTConfig()]))) == 1

    @pytest.mark.parametrize("task_type", [TaskType.SEQ_CLS, TaskType.TOKEN_CLS])
    def test_one_that_peft_saves_by_itself_is_no_matter(self, task_type, tmp_path):
        BertForSequenceClassification(BertConfig(**WORDS)).bert.save_pretrained(tmp_path)
        model = BertForSequenceClassification.from_pretrained(tmp_path)
        config = E2VPTConfig(task_type=task_type, modules_to_save=["embeddings.LayerNorm"])
        assert self.warned(lambda: get_peft_model(model, config)) == []

    def test_models_without_a_head_or_from_no_checkpoint_have_no_new_one(self, backbone, tmp_path):
        pooled = ViTModel.from_pretrained(backbone)  # with a pooler that is not in the file
        assert pooled.pooler is not None
        clip().save_pretrained(tmp_path / "clip")
        for model in (pooled, CLIPModel.from_pretrained(tmp_path / "clip"), tiny_vit()):
            assert self.warned(lambda model=model: get_peft_model(model, E2VPTConfig())) == []
