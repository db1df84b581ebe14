"""E²VPT, effective and efficient visual prompt tuning (https://huggingface.co/papers/2307.13770), as a PEFT method.

Importing this package registers the method with PEFT: `get_peft_model`, `PeftModel.from_pretrained` and transformers'
`model.add_adapter` then know [`E2VPTConfig`] and adapters of peft type `E2VPT`.
"""

from .adapter import keep_prefixes
from .config import E2VPTConfig
from .conversion import convert_to_kv_prompts
from .layer import E2VPTLayer
from .model import E2VPTModel
from .model_card import CardDetails, push_model_card, write_model_card
from .optimizer import PromptOptimizerFactory, create_optimizer
from .pruning import (
    PromptScores,
    PruningSummary,
    prune_prompts,
    rewind_prompts,
    score_prompts,
    score_prompts_by_layer,
)
from .registration import E2VPTType, register_with_peft
from .trainer import E2VPTTrainer, ModelCardTrainer, PruningArguments, PruningConfig
from .utils.images import to_rgb
from .verification import check_prefix
from .version import __version__

__all__ = [
    "CardDetails",
    "E2VPTConfig",
    "E2VPTLayer",
    "E2VPTModel",
    "E2VPTTrainer",
    "E2VPTType",
    "ModelCardTrainer",
    "PromptOptimizerFactory",
    "PromptScores",
    "PruningArguments",
    "PruningConfig",
    "PruningSummary",
    "__version__",
    "check_prefix",
    "convert_to_kv_prompts",
    "create_optimizer",
    "keep_prefixes",
    "prune_prompts",
    "push_model_card",
    "rewind_prompts",
    "score_prompts",
    "score_prompts_by_layer",
    "to_rgb",
    "write_model_card",
]

register_with_peft(E2VPTConfig, E2VPTModel)
