"""The inner model: a small causal transformer over characters, and its losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel as bl

Params = dict[str, Tensor]


class Transformer(nn.Module):
    """Characters ``[b, c]`` to logits of the next ones ``[b, c, characters]``, each from those before it."""

    def __init__(self, characters: int, width: int, heads: int, layers: int, context: int):
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.place = nn.Parameter(0.02 * torch.randn(context, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        logits: Tensor = self.head(self.blocks(x, mask=self.mask, is_causal=True))
        return logits


def logits_of(module: nn.Module, params: Params, windows: Tensor) -> Tensor:
    """Logits of all but the first character of windows ``[..., c + 1]``: ``[..., c, characters]``."""
    found: Tensor = bl.nn.functional_call(module, params, (windows[..., :-1].flatten(0, -2),))
    return found.unflatten(0, windows.shape[:-1])


def losses_of(logits: Tensor, windows: Tensor) -> Tensor:
    """The mean cross-entropy of the characters of each window, in nats, ``[...]``."""
    return cross_entropy(logits.movedim(-1, 1), windows[..., 1:], reduction="none").mean(-1)
