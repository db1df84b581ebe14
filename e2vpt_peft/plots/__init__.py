"""Pictures of adapters and of pruning results. Needs matplotlib."""

from .attention_maps import plot_attention_on_image, plot_attention_to_prompts
from .candidates import plot_candidates
from .features import plot_features
from .scores import plot_importance

__all__ = [
    "plot_attention_on_image",
    "plot_attention_to_prompts",
    "plot_candidates",
    "plot_features",
    "plot_importance",
]
