"""Which visual prompts, and which of their segments, an adapter keeps.

Masks stand in the adapter's config, for the visual prompts that it had when it was made. One pair of masks serves all
layers, as in the paper. Pruned prompts are gone from the parameters; of prompts with pruned segments, only the
components that are left are parameters, in one flat tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch

if TYPE_CHECKING:
    from .config import E2VPTConfig


def token_mask(config: E2VPTConfig) -> torch.Tensor:
    """Which visual prompts are kept, bool, (number of visual prompts,)."""
    if config.token_mask is None:
        return torch.ones(config.num_visual_prompts, dtype=torch.bool)
    return torch.tensor(config.token_mask, dtype=torch.bool)


def segment_mask(config: E2VPTConfig) -> torch.Tensor:
    """Which segments are kept, none of a pruned prompt's, bool, (number of visual prompts, number of segments)."""
    mask = torch.ones(config.num_visual_prompts, config.num_segments, dtype=torch.bool)
    if config.segment_mask is not None:
        mask = torch.tensor(config.segment_mask, dtype=torch.bool)
    return mask & token_mask(config)[:, None]


def kept_components(config: E2VPTConfig, hidden_size: int) -> Optional[torch.Tensor]:
    """Where the parameters of visual prompts with pruned segments belong.

    Component `j` of a prompt belongs to segment `j % num_segments`.

    Args:
        config ([`E2VPTConfig`]): The adapter's configuration.
        hidden_size (`int`): The number of components of a prompt.

    Returns:
        `Optional[torch.Tensor]`: Indices into the flattened (kept prompts, hidden size), or `None` if no kept prompt
        has a pruned segment.
    """
    kept = segment_mask(config)[token_mask(config)]
    if kept.all():
        return None
    components = kept.repeat(1, hidden_size // config.num_segments)
    return components.flatten().nonzero()[:, 0]
