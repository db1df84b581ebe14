"""The data of a search, looked at before it begins."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import has_length

from ..utils.randomness import host_random_state, random_state_kept, seed_host
from .fingerprints import fingerprint

logger = logging.getLogger(__name__)

SAMPLES = 8
"""How many are looked at, from the first to the last, or the first ones of data without an index."""


@dataclass(frozen=True)
class DataSample:
    """Some samples of a data set, and what they say about it.

    Attributes:
        length (`int`, *optional*): Of the data set, if it has one.
        columns (`list[str]`): The names in a sample.
        samples (`str`, *optional*): A fingerprint of the samples; none if they differ whenever they are read.
        draws (`bool`): Whether random numbers are drawn to read or to collate them, as augmentation does.
        batch (`Any`): The samples as a batch; `None` if there are none.
    """

    length: int | None
    columns: list[str]
    samples: str | None
    draws: bool
    batch: Any

    @classmethod
    def of(cls, loader: DataLoader[Any], name: str) -> DataSample:
        """Read some samples, twice from the same seed.

        Args:
            loader (`DataLoader`): A loader of the data set, as for evaluation. No worker is started.
            name (`str`): What the data set is called when it differs each time.
        """
        with random_state_kept():
            prints = []
            for _ in range(2):
                seed_host(0)
                before = host_random_state()
                samples = _read(loader.dataset)
                batch = loader.collate_fn(samples) if samples else None
                draws = host_random_state() != before
                prints.append(fingerprint(samples))
        if prints[0] != prints[1]:
            logger.warning(
                "%s gives other samples whenever it is read, also from the same seed: after an interruption the "
                "search is another one. Draw random numbers from the generators of random, numpy or torch.",
                name,
            )
        first = samples[0] if samples else None
        return cls(
            length=_length(loader.dataset),
            columns=sorted(map(str, first)) if isinstance(first, Mapping) else [],
            samples=prints[0] if prints[0] == prints[1] else None,
            draws=draws or prints[0] != prints[1],
            batch=batch,
        )

    def describe(self) -> dict[str, Any]:
        """What a search is compared by when it is resumed."""
        return {"length": self.length, "columns": self.columns, "samples": self.samples}


def _read(dataset: Any) -> list[Any]:
    length = _length(dataset)
    if length is None or isinstance(dataset, IterableDataset):
        return list(islice(iter(dataset), SAMPLES))
    indices = {round((length - 1) * number / (SAMPLES - 1)) for number in range(SAMPLES)} if length else set()
    return [dataset[index] for index in sorted(indices)]


def _length(dataset: Any) -> int | None:
    return len(dataset) if has_length(dataset) else None
