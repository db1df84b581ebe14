"""Which visual prompts, and which of their segments, an adapter keeps.

Masks stand in the adapter's config, for the visual prompts that it had when it was made. One pair of masks serves all
layers, as in the paper. Pruned prompts are gone from the parameters; of prompts with pruned segments, only the
components that are left are parameters, in one flat tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch


class MaskedConfig(Protocol):
    """The fields of an [`~e2vpt_peft.E2VPTConfig`] that say which prompts are kept."""

    num_visual_prompts: int
    num_segments: int
    token_mask: list[bool] | None
    segment_mask: list[list[bool]] | None


class Scores(Protocol):
    """Scores of the visual prompts that are kept, (prompts,), and of their segments, (prompts, segments)."""

    @property
    def tokens(self) -> torch.Tensor: ...

    @property
    def segments(self) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class PromptMasks:
    """Which visual prompts, and which segments of them, are kept. A value: pruning makes another one.

    Attributes:
        tokens (`torch.Tensor`): Which prompts are kept, bool, (prompts,).
        segments (`torch.Tensor`): Which segments are kept, none of a pruned prompt's, bool, (prompts, segments).

    Example:

        ```py
        >>> masks = PromptMasks.of(config)
        >>> pruned = masks.prune(scores, rates=(0.3, 0.5), minimum=(1, 4))
        >>> pruned.num_parameters(hidden_size=768), masks.num_parameters(hidden_size=768)
        ```
    """

    tokens: torch.Tensor
    segments: torch.Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", self.segments & self.tokens[:, None])

    @classmethod
    def of(cls, config: MaskedConfig) -> PromptMasks:
        """The masks of an adapter, by its config."""
        masks = cls.unpruned(config)
        tokens = masks.tokens if config.token_mask is None else torch.tensor(config.token_mask)
        segments = masks.segments if config.segment_mask is None else torch.tensor(config.segment_mask)
        return cls(tokens, segments)

    @classmethod
    def unpruned(cls, config: MaskedConfig) -> PromptMasks:
        """The masks of an adapter of which nothing is pruned."""
        tokens = torch.ones(config.num_visual_prompts, dtype=torch.bool)
        return cls(tokens, tokens[:, None].expand(-1, config.num_segments))

    def write_to(self, config: MaskedConfig) -> None:
        """Put the masks into a config; `None` where nothing is pruned."""
        config.token_mask = None if self.tokens.all() else self.tokens.tolist()
        config.segment_mask = self.segments.tolist() if self.has_pruned_segments else None

    @cached_property
    def num_tokens(self) -> int:
        """How many prompts are kept."""
        return int(self.tokens.sum())

    @cached_property
    def num_segments(self) -> int:
        """How many segments are kept, of all prompts together."""
        return int(self.segments.sum())

    @property
    def kept_segments(self) -> torch.Tensor:
        """Which segments of the kept prompts are kept, bool, (kept prompts, segments)."""
        return self.segments[self.tokens]

    @cached_property
    def has_pruned_segments(self) -> bool:
        """Whether a kept prompt lacks a segment, so that its parameters are stored flat."""
        return not bool(self.kept_segments.all())

    def num_parameters(self, hidden_size: int) -> int:
        """How many parameters the visual prompts of one layer have."""
        return self.num_segments * hidden_size // self.segments.shape[1]

    def components(self, hidden_size: int) -> torch.Tensor | None:
        """Where the parameters of prompts with pruned segments belong.

        Component `j` of a prompt belongs to segment `j % segments`, as in the published code.

        Args:
            hidden_size (`int`): The number of components of a prompt.

        Returns:
            `Optional[torch.Tensor]`: Indices into the flattened (kept prompts, hidden size), or `None` if no kept
            prompt has a pruned segment.
        """
        if not self.has_pruned_segments:
            return None
        kept = self.kept_segments.repeat(1, hidden_size // self.segments.shape[1])
        return kept.flatten().nonzero()[:, 0]

    def check_not_empty(self) -> None:
        """Refuse masks that leave no visual prompt, or none of their segments.

        Raises:
            ValueError: They do.
        """
        if not self.segments.any():
            raise ValueError(
                "token_mask and segment_mask together keep no segment of any visual prompt: at least one must stay. "
                "For key-value prompts alone, make an adapter with num_visual_prompts=0."
            )

    def keep(self, tokens: torch.Tensor, segments: torch.Tensor) -> PromptMasks:
        """Keep only some of what is kept now.

        Args:
            tokens (`torch.Tensor`): Which of the kept prompts to keep, bool, (kept prompts,).
            segments (`torch.Tensor`): Which of their segments to keep, bool, (kept prompts, segments).
        """
        kept = self.tokens.nonzero()[:, 0]
        return PromptMasks(
            torch.zeros_like(self.tokens).index_copy(0, kept, tokens),
            torch.zeros_like(self.segments).index_copy(0, kept, segments & self.kept_segments),
        )

    def check_scores(self, scores: Scores) -> None:
        """Refuse scores that do not rank what is kept now.

        Raises:
            TypeError: They are no tensors of real numbers.
            ValueError: They are of another shape, or NaN where something is kept.
        """
        present = {"tokens": torch.ones(self.num_tokens, dtype=torch.bool), "segments": self.kept_segments}
        for name, kept in present.items():
            values = getattr(scores, name)
            if not isinstance(values, torch.Tensor) or values.is_complex() or values.dtype == torch.bool:
                kind = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
                raise TypeError(f"scores.{name} must be a tensor of real numbers, not {kind}.")
            if values.shape != kept.shape:
                raise ValueError(
                    f"scores.{name} must be of shape {tuple(kept.shape)}, for the {self.num_tokens} visual prompts "
                    f"of {self.segments.shape[1]} segments that the adapter has, but is of shape "
                    f"{tuple(values.shape)}: score it again."
                )
            unknown = int((values.isnan().cpu() & kept).sum())
            if unknown:
                raise ValueError(
                    f"scores.{name} is NaN for {unknown} of {int(kept.sum())}: what is not known cannot be ranked. "
                    "Scores of -inf are pruned first, of inf last."
                )

    def prune(self, scores: Scores, rates: tuple[float, float], minimum: tuple[int, int]) -> PromptMasks:
        """Prune the prompts, and then the segments of each that is left, that have the lowest scores.

        Args:
            scores (`Scores`): Of the prompts that are kept now, (kept prompts,), and of their segments.
            rates (`tuple[float, float]`): The shares of prompts, and of the segments of each, to prune, rounded down.
            minimum (`tuple[int, int]`): How many prompts, and segments of each, stay in any case.

        Raises:
            TypeError, ValueError: See [`check_scores`].
        """
        self.check_scores(scores)
        present = torch.ones(self.num_tokens, dtype=torch.bool)
        tokens = select(scores.tokens, present, minimum[0], rate=rates[0])
        segments = select(scores.segments, self.kept_segments, minimum[1], rate=rates[1])
        return self.keep(tokens, segments)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, PromptMasks):
            return NotImplemented
        return torch.equal(self.tokens, other.tokens) and torch.equal(self.segments, other.segments)

    def __hash__(self) -> int:
        return hash((self.tokens.numpy().tobytes(), self.segments.numpy().tobytes()))


def select(
    scores: torch.Tensor,
    present: torch.Tensor,
    minimum: int,
    *,
    rate: float | None = None,
    count: int | None = None,
) -> torch.Tensor:
    """Keep those with the highest scores in each row; ties are pruned from the lower index on.

    Args:
        scores (`torch.Tensor`): Of shape (..., candidates).
        present (`torch.Tensor`): Which of the candidates there are, bool, of the same shape.
        minimum (`int`): How many stay in each row, if there are so many.
        rate, count: The share of those present, rounded down, or the number, to prune in each row.

    Returns:
        `torch.Tensor`: Which to keep, bool, of the same shape.
    """
    # A stable sort leaves ties in the order of their indices. Absent ones come first, whatever the scores, and are
    # never kept.
    order = scores.double().cpu().argsort(dim=-1, stable=True)
    order = order.gather(-1, present.gather(-1, order).int().argsort(dim=-1, stable=True))
    available = present.sum(-1, keepdim=True)
    # 100 * 0.29 is a little less than 29; 100 * 0.53 is in float32 less than 53 by more than what is added.
    wanted = (
        torch.floor(available.double() * rate + 1e-9).long()
        if rate is not None
        else torch.full_like(available, count or 0)
    )
    pruned = torch.minimum(wanted, (available - minimum).clamp(min=0))
    rank = order.argsort(dim=-1)
    return rank >= present.shape[-1] - available + pruned
