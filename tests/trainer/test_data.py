from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from e2vpt_peft.trainer.data import DataSample
from e2vpt_peft.utils.randomness import host_random_state

from .toy import BrightPatch


class Noisy(Dataset[Any]):
    def __init__(self, draw: Any) -> None:
        self.draw, self.read = draw, list[int]()

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        return {"pixel_values": torch.ones(2) * self.draw(), "labels": index}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield {"labels": 1}


def look(dataset: Any, collate: Any = default_collate) -> DataSample:
    return DataSample.of(DataLoader(dataset, batch_size=4, collate_fn=collate), "train_dataset")


def test_a_few_samples_from_the_first_to_the_last_are_looked_at() -> None:
    data = Noisy(lambda: 1)
    sample = look(data)
    assert sorted(set(data.read)) == [0, 4, 8, 12, 17, 21, 25, 29]
    assert (sample.length, sample.columns, sample.draws) == (30, ["labels", "pixel_values"], False)
    assert sample.batch["labels"].tolist() == [0, 4, 8, 12, 17, 21, 25, 29]
    assert look(Noisy(lambda: 2)).describe() != sample.describe() == look(Noisy(lambda: 1)).describe()


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_random_samples_are_known_as_such_and_leave_no_trace(draw: Any, caplog: Any) -> None:
    before = host_random_state()
    sample = look(Noisy(draw))
    assert sample.draws and host_random_state() == before
    draw()
    assert look(Noisy(draw)).samples == sample.samples is not None
    assert not caplog.text


def test_a_random_collator_makes_random_batches() -> None:
    def mix(samples: Any) -> Any:
        return {"weight": random.random(), **default_collate(samples)}

    assert look(Noisy(lambda: 1), mix).draws


def test_data_with_a_generator_of_their_own_cannot_be_compared_and_that_is_said(caplog: Any) -> None:
    sample = look(Noisy(random.Random(0).random))
    assert sample.samples is None and sample.draws
    assert "train_dataset gives other samples whenever it is read" in caplog.text


def test_data_without_a_length_or_without_samples() -> None:
    assert look(Stream()).describe() == {**look(Stream()).describe(), "length": None, "columns": ["labels"]}
    assert look(BrightPatch(3, seed=0)).length == 3
    assert look(BrightPatch(0, seed=0)).batch is None
