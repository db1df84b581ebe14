"""The paper's recipe on transformers' Trainer: tune, score, search over pruning rates, keep the best."""

from .config import PruningArguments, PruningConfig
from .trainer import E2VPTTrainer

__all__ = ["E2VPTTrainer", "PruningArguments", "PruningConfig"]
