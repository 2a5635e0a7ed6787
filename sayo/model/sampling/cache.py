"""Keys and values while groups are sampled, and how many groups share a cache.

A step has the same number of operations for any number of groups, fixed shapes and fixed addresses, so that a card can
replay it as one CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sayo.model.forward import compute_dtype
from sayo.model.prompts import base_model, model_device

CPU_SAMPLING_TOKENS = 8192


class SamplingCache:
    """Keys and values while B groups of G rows are sampled: a prompt's once, padded to the longest; a completion's own.

    The prefill fills it through store_prompts. From then on one token of every row is fed at a time, into buffers that
    stay where they are.
    """

    def __init__(self, prompt_lengths: Sequence[int], num_generations: int, max_new_tokens: int):
        self.lengths, self.max_new_tokens = list(prompt_lengths), max_new_tokens
        self.grid = len(self.lengths), num_generations  # B, G
        self.prompts: dict[int, list[Tensor]] = {}  # by layer, keys and values (B, H_kv, P, d)
        self.completions: dict[int, list[Tensor]] = {}  # by layer, (B, H_kv, G, max_new_tokens, d)
        self.prompt_mask = self.own_mask = self.position = None
        self.window = 0

    def store_prompts(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep a prefill's keys and values, (1, H_kv, sum of P, d) each."""
        (groups, rows), num_kv, width = self.grid, key.shape[1], key.shape[3]
        parts = [part[0].transpose(0, 1).split(self.lengths) for part in (key, value)]  # B of (P, H_kv, d)
        self.prompts[layer] = [pad_sequence(part, True).transpose(1, 2).contiguous() for part in parts]
        own = (groups, num_kv, rows, self.max_new_tokens, width)
        self.completions[layer] = [key.new_zeros(own), key.new_zeros(own)]
        if self.prompt_mask is None:
            lengths = torch.tensor(self.lengths, device=key.device).repeat_interleave(num_kv)
            padding = torch.arange(max(self.lengths), device=key.device) >= lengths[:, None, None]
            self.prompt_mask = key.new_zeros(padding.shape).masked_fill_(padding, float("-inf"))  # (B * H_kv, 1, P)

    def begin_token(self, position: Tensor, window: int) -> None:
        """Before each token: its place (1,) in its completion, and how much of the buffers is attended to."""
        self.position, self.window = position, window
        later = torch.arange(window, device=position.device) > position
        self.own_mask = torch.zeros_like(later, dtype=self.prompt_mask.dtype).masked_fill_(later, float("-inf"))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One token of each of the m = B * G rows: query (m, H, d), key and value (m, H_kv, d) to (m, H, d)."""
        (groups, rows), (_, heads, width), num_kv = self.grid, query.shape, key.shape[1]
        for buffer, part in zip(self.completions[layer], (key, value), strict=True):
            buffer.index_copy_(3, self.position, part.view(groups, rows, num_kv, 1, width).transpose(1, 2))
        keys, values = (part.flatten(0, 2)[:, : self.window] for part in self.completions[layer])  # (B H_kv G, t, d)
        prompt_keys, prompt_values = (part.flatten(0, 1) for part in self.prompts[layer])  # (B H_kv, P, d)
        repeats, num_prompt = heads // num_kv, prompt_keys.shape[1]
        queries = query.view(groups, rows, num_kv, repeats, width).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        beta = int(min(self.lengths) < num_prompt)  # without padding there is nothing to mask
        on_prompt = torch.baddbmm(self.prompt_mask, queries, prompt_keys.mT, beta=beta, alpha=scaling)
        on_own = torch.baddbmm(self.own_mask, queries.reshape(-1, repeats, width), keys.mT, alpha=scaling)
        scores = torch.cat([on_prompt, on_own.view(len(on_prompt), -1, self.window)], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)  # (B H_kv, G H / H_kv, P + t)
        output = torch.bmm(weights[..., :num_prompt], prompt_values)  # (B H_kv, G H / H_kv, d)
        own = weights[..., num_prompt:].unflatten(1, (rows, repeats)).flatten(0, 1)  # (B H_kv G, H / H_kv, t)
        output = output.view(-1, repeats, width).baddbmm_(own, values)
        return output.view(groups, num_kv, rows, repeats, width).transpose(1, 2).reshape(-1, heads, width)

    def keep(self, groups: Tensor, rows: Tensor) -> None:
        """Keep these groups (B',), and of each these rows (B', G')."""
        num_kv = len(self.prompt_mask) // self.grid[0]
        self.prompt_mask = self.prompt_mask.unflatten(0, (-1, num_kv))[groups].flatten(0, 1)
        self.lengths, self.grid = [self.lengths[group] for group in groups.tolist()], tuple(rows.shape)
        for layer, parts in self.completions.items():
            self.completions[layer] = [part[groups[:, None], :, rows].transpose(1, 2).contiguous() for part in parts]
            if len(groups) < len(self.prompts[layer][0]):
                self.prompts[layer] = [part[groups] for part in self.prompts[layer]]


def groups_that_fit(
    text_config,
    free: int,
    prompt_tokens: int,
    num_generations: int,
    max_new_tokens: int,
    dtype: torch.dtype,
    in_4bit: bool,
) -> int:
    """How many groups share a cache on a card with so many free bytes: a power of two, so that it seldom changes.

    Half of the memory is for keys and values, the prefill's activations and logits. bitsandbytes multiplies 4-bit
    weights without unpacking them up to about 64 rows on a T4, and fewer on larger cards.
    """
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    kept = 2 * text_config.num_hidden_layers * text_config.num_key_value_heads * head_dim
    activations = 8 * text_config.hidden_size + 3 * text_config.intermediate_size
    of_prompt = prompt_tokens * (kept + activations) * dtype.itemsize
    of_row = max_new_tokens * kept * dtype.itemsize + 10 * 4 * text_config.vocab_size
    groups = min(free // 2 // (of_prompt + num_generations * of_row), (64 if in_4bit else 512) // num_generations)
    return 2 ** int(math.log2(max(1, groups)))


def default_sampling_tokens(model, prompt_tokens: int, num_generations: int, max_new_tokens: int) -> int:
    """Tokens of the groups that share a cache: 8192 on a CPU, on a card what its free memory holds."""
    device = model_device(model)
    if device.type != "cuda":
        return CPU_SAMPLING_TOKENS
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    base, sizes = base_model(model), (prompt_tokens, num_generations, max_new_tokens)
    free, in_4bit = torch.cuda.mem_get_info(device)[0] + unused, bool(getattr(base, "is_loaded_in_4bit", False))
    groups = groups_that_fit(base.config.get_text_config(), free, *sizes, compute_dtype(model), in_4bit)
    return groups * (prompt_tokens + num_generations * max_new_tokens)
