"""Attention rows, read where attention is computed: a function in transformers' AttentionInterface."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PROBED_ATTENTION = "sayo_probed_sdpa"
ROW_CHUNK_ELEMENTS = 2**24  # float32 attention weights that exist at a time: 64 MB, however long the prompt


class AttentionProbe:
    """Reads attention rows where attention is computed, while it is open (`with AttentionProbe(...) as probe:`).

    Nothing of size S x S is kept: each row's softmax, averaged over heads, is reduced at once by `key_weights`.

    Args:
        layers: indices of decoder layers.
        rows: (T,) indices into the flattened (B, S) batch of queries to read.
        key_weights: (B, K, W); a row's result is its attention times these weights, summed over keys.

    After the forward `results[layer]` is (T, W) float32.
    """

    current: AttentionProbe | None = None

    def __init__(self, layers: Iterable[int], rows: Tensor, key_weights: Tensor):
        self.layers, self.rows, self.key_weights = set(layers), rows, key_weights
        self.results: dict[int, Tensor] = {}

    def __enter__(self) -> AttentionProbe:
        AttentionProbe.current = self
        return self

    def __exit__(self, *_) -> None:
        AttentionProbe.current = None

    @torch.no_grad()
    def read(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        """query (B, H, S, d), key (B, H_kv, K, d), mask boolean (B or 1, 1, S, K) or None for plain causal."""
        num_heads, length, num_keys = query.shape[1], query.shape[2], key.shape[2]
        result = torch.empty(len(self.rows), self.key_weights.shape[-1], device=query.device)
        step = max(1, ROW_CHUNK_ELEMENTS // (num_heads * num_keys))
        batch_of, position_of = self.rows // length, self.rows % length
        for batch in range(len(query)):
            chosen = (batch_of == batch).nonzero().flatten()
            keys = key[batch].float()[:, None]  # (H_kv, 1, K, d)
            for part in chosen.split(step):
                at = position_of[part]
                queries = query[batch][:, at].float().view(len(keys), -1, len(at), query.shape[-1])
                scores = queries @ keys.transpose(-1, -2) * scaling  # (H_kv, H / H_kv, rows, K)
                if mask is None:
                    allowed = torch.arange(num_keys, device=at.device) <= at[:, None] + num_keys - length
                else:
                    allowed = mask[batch if len(mask) > 1 else 0, 0, at]
                weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).mean((0, 1))  # (rows, K)
                result[part] = weights @ self.key_weights[batch]
        self.results[layer] = result


def _probed_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' own sdpa attention; while a probe is open it also reads the rows the probe asks for."""
    probe = AttentionProbe.current
    if probe is not None and module.layer_idx in probe.layers:
        probe.read(module.layer_idx, query, key, attention_mask, scaling or query.shape[-1] ** -0.5)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(PROBED_ATTENTION, _probed_attention)
AttentionMaskInterface.register(PROBED_ATTENTION, sdpa_mask)
