"""The paper's recipe on transformers' Trainer: tune, score, search over pruning rates, keep the best."""

from .checkpoints import last_whole_checkpoint
from .config import PruningArguments, PruningConfig
from .model_card import ModelCardTrainer
from .trainer import E2VPTTrainer

__all__ = ["E2VPTTrainer", "ModelCardTrainer", "PruningArguments", "PruningConfig", "last_whole_checkpoint"]
