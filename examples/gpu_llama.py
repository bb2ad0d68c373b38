"""A Llama in plain torch with a static cache, for timing one step of decoding on a GPU without transformers.

Random weights: what a step computes, and how long it takes, does not depend on them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Sizes(NamedTuple):
    """Sizes of a model; the default ones are those of Llama 3.2 1B."""

    hidden: int = 2048
    inner: int = 8192
    heads: int = 32
    key_heads: int = 8
    layers: int = 16
    vocabulary: int = 128256
    positions: int = 512


class Layer(nn.Module):
    """One layer, for one token at a time."""

    def __init__(self, sizes: Sizes, linear: Callable[[int, int], nn.Module], device: str) -> None:
        super().__init__()
        self.width = sizes.hidden // sizes.heads
        keys = self.width * sizes.key_heads
        self.q, self.o = linear(sizes.hidden, sizes.hidden), linear(sizes.hidden, sizes.hidden)
        self.k, self.v = linear(keys, sizes.hidden), linear(keys, sizes.hidden)
        self.gate, self.up = linear(sizes.inner, sizes.hidden), linear(sizes.inner, sizes.hidden)
        self.down = linear(sizes.hidden, sizes.inner)
        self.norms = nn.ModuleList(
            nn.RMSNorm(sizes.hidden, device=device, dtype=torch.bfloat16) for _ in range(2)
        )
        shape = (1, sizes.key_heads, sizes.positions, self.width)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=torch.bfloat16))

    def forward(self, x: Tensor, place: Tensor, mask: Tensor) -> Tensor:
        """One token `[1, 1, hidden]` at a place `[1]`; mask `[1, 1, 1, positions]`."""
        inputs = self.norms[0](x)
        q, k, v = (linear(inputs).view(1, -1, 1, self.width) for linear in (self.q, self.k, self.v))
        self.keys.index_copy_(2, place, k)
        self.values.index_copy_(2, place, v)
        seen = nn.functional.scaled_dot_product_attention(
            q, self.keys, self.values, attn_mask=mask, enable_gqa=True
        )
        x = x + self.o(seen.reshape(1, 1, -1))
        inputs = self.norms[1](x)
        return x + self.down(nn.functional.silu(self.gate(inputs)) * self.up(inputs))


class Llama(nn.Module):
    """The model; `linear(out, in)` makes its layers, `head` its last one."""

    def __init__(self, sizes: Sizes, linear: Callable[[int, int], nn.Module], device: str) -> None:
        super().__init__()
        self.positions = sizes.positions
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden, device=device, dtype=torch.bfloat16)
        self.layers = nn.ModuleList(Layer(sizes, linear, device) for _ in range(sizes.layers))
        self.head = linear(sizes.vocabulary, sizes.hidden)

    def forward(self, token: Tensor, place: Tensor) -> Tensor:
        """The next token `[1]` after a token `[1]` at a place `[1]`."""
        mask = (torch.arange(self.positions, device=place.device) <= place)[None, None, None]
        x = self.embedding(token).view(1, 1, -1)
        for layer in self.layers:
            x = layer(x, place, mask)
        return self.head(x).argmax(-1).view(1)
