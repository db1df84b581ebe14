"""A model that is of no library."""

from __future__ import annotations

from torch import nn


class Bare(nn.Module):
    """A model from outside transformers, whose attention calls PyTorch's function."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(BareBlock() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class BareBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(8), BareAttention()

    def forward(self, x):
        return x + self.attn(self.ln_1(x))


class BareAttention(nn.Module):
    num_heads = 2

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
