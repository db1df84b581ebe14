"""The peft type `E2VPT`, and its registration with PEFT."""

from __future__ import annotations

import enum
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING


class E2VPTType(str, enum.Enum):
    """The peft type of this package.

    `peft.PeftType` is a closed enum, and a plain string does not do: PEFT and transformers read `peft_type.value`. A
    member of a `str` enum compares and hashes like its string, so PEFT's mappings find it under `"E2VPT"`, which is
    what stands in `adapter_config.json`.
    """

    E2VPT = "E2VPT"


def register_with_peft(config_cls: type, model_cls: type) -> None:
    """Make `get_peft_model`, `PeftModel.from_pretrained`, `model.add_adapter`, ... know the peft type `E2VPT`.

    Does for an outside package what `peft.utils.register_peft_method` does for PEFT's own methods. Calling it again,
    for example after a reload, puts the newest classes in place.

    Args:
        config_cls (`type`): The configuration class, [`E2VPTConfig`].
        model_cls (`type`): The tuner class, [`E2VPTModel`].

    Raises:
        KeyError: Another package registered the peft type `E2VPT` or its parameter prefix. Nothing is changed.
    """
    prefix: str = model_cls.prefix  # type: ignore[attr-defined]
    configs: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    prefixes: dict[Any, str] = PEFT_TYPE_TO_PREFIX_MAPPING
    owners = [configs.get(E2VPTType.E2VPT), tuners.get(E2VPTType.E2VPT)]
    owners += [configs.get(name) for name, taken in prefixes.items() if taken == prefix]
    package = __name__.partition(".")[0]
    for owner in owners:
        if owner is not None and owner.__module__.partition(".")[0] != package:
            raise KeyError(
                f"The peft type '{E2VPTType.E2VPT.value}' or the parameter prefix '{prefix}' is taken by "
                f"{owner.__module__}.{owner.__qualname__}. Import either that package or {package} in one process."
            )
    configs[E2VPTType.E2VPT] = config_cls
    tuners[E2VPTType.E2VPT] = model_cls
    prefixes[E2VPTType.E2VPT] = prefix
