"""What compiled flex attention needs on CPUs with AVX2 and no AVX-512, where PyTorch's is wrong for small heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F

CPU_CAPABILITY = torch.backends.cpu.get_cpu_capability()
"""The vector instructions that PyTorch uses. Read once, because `torch.compile` cannot trace the call."""

FAULTY_HEAD_SIZES = (8, 16)
"""Multiples of AVX2's 8 floats for which PyTorch chooses the faulty kernel, as it does below 24."""

SAFE_HEAD_SIZE = 32


def avoid_faulty_head_size(
    query: torch.Tensor, key: torch.Tensor, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """Widen queries and keys by zeros where PyTorch's compiled flex attention would be wrong. Scores stay the same.

    For AVX2, PyTorch (2.13) multiplies queries and keys in blocks of 16 keys. With heads of 8 or 16, and 8 keys left
    for the last block, it computes 16 all the same: it reads 8 keys behind the last one, and writes their scores over
    the running maximum of the softmax. The result is wrong or NaN, depending on what is in memory behind the keys. A
    prefix makes such lengths where the backbone has none. Other head sizes go through another kernel, which is right.

    Args:
        query, key (`torch.Tensor`): Of shape (batch size, heads, length, head size).
        scaling (`Optional[float]`): The factor of the scores, or `None` for one over the root of the head size.

    Returns:
        `tuple`: Queries, keys and factor to use instead: the same ones wherever PyTorch is right.
    """
    head_size = query.shape[-1]
    # The length does not matter here, so that it does not become a constant of compiled models.
    if CPU_CAPABILITY != "AVX2" or query.device.type != "cpu" or head_size not in FAULTY_HEAD_SIZES:
        return query, key, scaling
    more = (0, SAFE_HEAD_SIZE - head_size)
    return F.pad(query, more), F.pad(key, more), head_size**-0.5 if scaling is None else scaling
