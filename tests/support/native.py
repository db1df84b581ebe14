"""transformers' own `add_adapter`, `load_adapter` and the like, where it refuses the PEFT that is installed.

transformers 5.24.0 asks for PEFT 0.22 before there is one. A test that gets there is skipped, after transformers has
said so to LoRA as well: what it refuses for prompts alone is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
from peft import LoraConfig
from transformers.integrations import peft as integration

from .models import tiny_vit


@contextmanager
def skipping_where_transformers_refuses_this_peft() -> Iterator[None]:
    check = integration.check_peft_version

    def skip_if_refused(min_version: str) -> None:
        try:
            check(min_version)
        except ValueError as error:
            unpatched = mock.patch.object(integration, "check_peft_version", check)
            with unpatched, pytest.raises(ValueError) as to_lora:
                tiny_vit().add_adapter(LoraConfig(target_modules="all-linear"))
            assert str(to_lora.value) == str(error)
            pytest.skip(f"transformers refuses this PEFT for every method: {error}")

    with mock.patch.object(integration, "check_peft_version", skip_if_refused):
        yield
