"""What was tried to make prompts cheaper, against what the package does.

    python -m examples.benchmarks.alternatives --threads 1

1. Attention over the sequence and over the prefix, joined by their log-sum-exp, in place of one attention over both:
   `o = (1 - a) o_s + a o_p` with `a = sigmoid(lse_p - lse_s)`, which is exact. It spares the copy of keys and values.
   "No copy" is one attention over both where the copy was made before: what the kernel itself takes.
2. Key-value prompts beside the attention, `gelu(s q K^T) V`: by products for each sample and head, or for each head.
3. Where the time of dropout on visual prompts goes: each sample has prompts of its own, and projects them.

Times are those of the process, as ratios: medians over rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from e2vpt_peft.attention.beside import add_beside
from e2vpt_peft.attention.prefix import KeysAndValues

from .measuring.calls import Call
from .measuring.timing import ratios, time_side_by_side


def bare(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *prefix: torch.Tensor) -> torch.Tensor:
    """Attention without a prefix."""
    return F.scaled_dot_product_attention(query, key, value)


def join(rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Keys or values of the prefix and of the sequence, as the package joins them."""
    return torch.cat([rows.expand(len(states), -1, -1, -1), states.transpose(1, 2)], 1).transpose(1, 2)


def concatenated(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """As the package does it."""
    return bare(query, join(keys, key), join(values, value))


def joined(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Two attentions by the kernel of the CPU, joined."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    size = len(query)
    own, own_lse = attend(query, key, value)
    other, other_lse = attend(
        query, keys.transpose(1, 2).expand(size, -1, -1, -1), values.transpose(1, 2).expand(size, -1, -1, -1)
    )
    share = torch.sigmoid(other_lse - own_lse).view(*query.shape[:3], 1)
    return torch.lerp(own, other, share)


def joined_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """The part of the prefix written out: two products, short as it is."""
    own, own_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    scores = (query @ keys.permute(0, 2, 3, 1)) * query.shape[-1] ** -0.5
    lse = scores.logsumexp(-1, keepdim=True)
    share = torch.sigmoid(lse - own_lse.view(lse.shape))
    return own * (1 - share) + (scores - lse).exp().mul_(share) @ values.transpose(1, 2)


def over_the_first(calls: dict[str, Call], rounds: int) -> list[float]:
    """Times of calls side by side, over that of the first."""
    times = list(time_side_by_side(calls, torch.device("cpu"), rounds, clock="cpu").values())
    return [ratios(taken, times[0]).value for taken in times]


@torch.inference_mode()
def compare_joining(batch_size: int, rows: int, rounds: int, length: int = 197, heads: int = 6) -> list[float]:
    """No copy, concatenated, joined, and joined by products, over attention without a prefix."""
    sequence = [torch.randn(batch_size, length, heads, 64).transpose(1, 2) for _ in range(3)]
    prefix = [torch.randn(1, rows, heads, 64) for _ in range(2)]
    ways = (bare, concatenated, joined, joined_by_products)
    outputs = [way(*sequence, *prefix) for way in ways[1:]]
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)
    query, key, value = sequence
    no_copy = partial(bare, query, *(join(rows, states) for rows, states in zip(prefix, (key, value))))
    calls = {way.__name__: partial(way, *sequence, *prefix) for way in ways}
    return over_the_first({"bare": calls.pop("bare"), "no copy": no_copy, **calls}, rounds)[1:]


def sample_by_sample(output: torch.Tensor, query: torch.Tensor, rows: KeysAndValues, scaling: float) -> torch.Tensor:
    """As the equation has it."""
    keys, values = (part.transpose(1, 2) for part in rows)
    return output.add_(F.gelu(query @ (scaling * keys).mT) @ values)


@torch.inference_mode()
def compare_reading(batch_size: int, rows: int, rounds: int, length: int = 197, heads: int = 6) -> float:
    """The time that the package takes, over that of products for each sample."""
    output, query = (torch.randn(batch_size, length, heads, 64).transpose(1, 2) for _ in range(2))
    prompts = (torch.randn(1, rows, heads, 64), torch.randn(1, rows, heads, 64))
    ways = (sample_by_sample, add_beside)
    torch.testing.assert_close(*(way(output.clone(), query, prompts, 0.125) for way in ways), rtol=1e-4, atol=1e-4)
    return over_the_first({way.__name__: partial(way, output, query, prompts, 0.125) for way in ways}, rounds)[1]


def share_dropout(prompts: int, rounds: int, batch_size: int = 32, hidden_size: int = 384) -> list[float]:
    """The parts of the time that prompts with dropout take in one layer, forward and backward: drawing, norm and
    projections."""
    parameter = nn.Parameter(torch.randn(prompts, hidden_size))
    norm = nn.LayerNorm(hidden_size).requires_grad_(False)
    key, value = (nn.Linear(hidden_size, hidden_size).requires_grad_(False) for _ in range(2))

    def drop() -> torch.Tensor:
        return F.dropout(parameter.expand(batch_size, -1, -1), 0.1, True)

    def run(*steps: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        def function() -> None:
            states = drop()
            for step in steps:
                states = step(states)
            states.sum().backward()

        return function

    calls = {"whole": run(norm, lambda states: key(states) + value(states)), "drawn": run(), "normed": run(norm)}
    _, drawn, normed = over_the_first(calls, rounds)
    return [drawn, normed - drawn, 1 - normed]


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rows", type=int, nargs="+", default=[15, 105])
    parser.add_argument("--rows-beside", type=int, nargs="+", default=[5, 8, 16, 24])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("| images | rows of the prefix | no copy | concatenated | joined | joined by products |")
    print("|---|---|---|---|---|---|")
    for batch_size in args.batch_sizes:
        for rows in args.rows:
            cells = [f"{ratio:.2f}" for ratio in compare_joining(batch_size, rows, args.rounds)]
            print(f"| {batch_size} | {rows} | {' | '.join(cells)} |", flush=True)
    print("\n| images | rows beside | for each head, over for each sample and head |\n|---|---|---|")
    for batch_size in args.batch_sizes:
        for rows in args.rows_beside:
            print(f"| {batch_size} | {rows} | {compare_reading(batch_size, rows, args.rounds):.2f} |", flush=True)
    print("\n| visual prompts | drawing masks | norm | projections |\n|---|---|---|---|")
    for prompts in (10, 50, 100):
        cells = [f"{share:.0%}" for share in share_dropout(prompts, args.rounds)]
        print(f"| {prompts} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
