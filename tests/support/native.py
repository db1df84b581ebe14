"""transformers' own `add_adapter` and `load_adapter`, where it accepts the PEFT that is installed.

transformers 5.24.0 asks for PEFT 0.22 before there is one, and refuses every method.
"""

from __future__ import annotations

import pytest
from peft import LoraConfig

from .models import tiny_vit


def refusal() -> str | None:
    """What transformers says to LoRA, `None` if nothing."""
    try:
        tiny_vit().add_adapter(LoraConfig(target_modules="all-linear"))
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        return str(error)
    return None


REFUSAL = refusal()

needs_native_adapters = pytest.mark.skipif(
    REFUSAL is not None, reason=f"transformers refuses this PEFT, for LoRA as well: {REFUSAL}"
)
