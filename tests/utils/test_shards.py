"""What shards are taken for; models that really are in shards are in tests/distributed."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from e2vpt_peft.utils.shards import gathered, is_sharded, refuse_shards


@pytest.fixture
def one_process(tmp_path):
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def model():
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))


def fully_sharded(model):
    model[1].__class__ = type("FSDPSequential", (FSDPModule, nn.Sequential), {})


def wrapped_by_fsdp(model):
    model[1].__class__ = type("Wrapped", (FullyShardedDataParallel, nn.Sequential), {"__init__": None})


def of_zero_3(model):
    model[1][0].weight.ds_id = 7


def test_a_whole_model_is_not_refused():
    refuse_shards(model())


@pytest.mark.parametrize("sharded", [fully_sharded, wrapped_by_fsdp, of_zero_3])
def test_a_model_any_part_of_which_is_in_shards_is_refused_with_the_way_out(sharded):
    in_shards = model()
    sharded(in_shards)
    with pytest.raises(ValueError, match=r"The model is in shards.*copy.deepcopy.*load_state_dict"):
        refuse_shards(in_shards)


def test_whole_tensors_are_themselves():
    tensors = [torch.ones(2), torch.zeros(3)]
    with gathered(iter(tensors)) as values:
        assert all(value is tensor for value, tensor in zip(values, tensors, strict=True))


def test_tensors_of_fsdp_are_given_in_full(one_process):
    whole = torch.arange(4.0)
    part = distribute_tensor(whole, one_process, [Shard(0)])
    with gathered([part, whole]) as values:
        assert type(part) is DTensor and [type(value) for value in values] == [torch.Tensor] * 2
        assert all(torch.equal(value, whole) for value in values)


def test_a_part_of_a_tensor_is_told_from_a_whole_one(one_process):
    whole = nn.Parameter(torch.arange(4.0))
    assert not is_sharded(whole)
    assert is_sharded(nn.Parameter(distribute_tensor(whole, one_process, [Shard(0)])))
    whole.ds_id = 7
    assert is_sharded(whole)


def test_tensors_of_zero_3_are_gathered_by_deepspeed_while_they_are_used(monkeypatch):
    events = []

    @contextmanager
    def gather(tensors):
        events.append(("gathered", tensors))
        yield
        events.append("released")

    deepspeed = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gather))
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    tensors = [torch.ones(2), torch.zeros(3)]
    tensors[1].ds_id = 7
    with gathered(tensors) as values:
        assert all(value is tensor for value, tensor in zip(values, tensors, strict=True))
        assert events == [("gathered", values)]
    assert events[1:] == ["released"]
