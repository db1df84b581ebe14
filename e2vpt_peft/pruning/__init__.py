"""Prompt pruning (section 3.3 of the paper): score, prune, rewind.

`scores` is what users call; it averages over batches what one of the `methods` finds on one batch, through a `probe`
of the model. `segment_removal` is the computation behind the default method. `prune` and `rewind` act on the scores,
and `snapshot` keeps an adapter as it is at one moment.
"""

from .methods import SCORING_METHODS
from .prune import PruningSummary, prune_prompts
from .rewind import rewind_prompts
from .scores import PromptScores, score_prompts, score_prompts_by_layer
from .snapshot import AdapterSnapshot, InitialValues

__all__ = [
    "SCORING_METHODS",
    "AdapterSnapshot",
    "InitialValues",
    "PromptScores",
    "PruningSummary",
    "prune_prompts",
    "rewind_prompts",
    "score_prompts",
    "score_prompts_by_layer",
]
