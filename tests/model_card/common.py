"""What the tests of model cards share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model

from e2vpt_peft import E2VPTConfig, write_model_card

from ..support.models import tiny_vit

PERSONS = b"---\r\nlicense: mit   # as agreed\r\ntags: [mine]\r\n---\r\n\r\n# Flowers\r\n\r\nTrained by hand.\r\n"


def adapted(backbone: Any = None, **config: Any) -> PeftModel:
    settings = {"num_visual_prompts": 4, "num_kv_prompts": 2, "num_segments": 4, "modules_to_save": ["classifier"]}
    return get_peft_model(backbone or tiny_vit(), E2VPTConfig(**{**settings, **config}))  # type: ignore


def card(model: Any, folder: Path, **details: Any) -> str:
    write_model_card(model, folder, **details)
    return (folder / "README.md").read_text()


def metadata(text: str) -> Any:
    """As huggingface_hub reads it, which refuses a model-index that the Hub cannot show."""
    return ModelCard(text).data


def snippet(text: str) -> str:
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert code.startswith("import e2vpt_peft")
    return code


def generated(text: str) -> str:
    return re.findall(r"<!-- e2vpt_peft writes.*<!-- e2vpt_peft: end -->", text, re.DOTALL)[0]
