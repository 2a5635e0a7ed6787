"""Attention of packed groups without a mask, and attention rows, read where attention is computed.

    [ prompt | c1 c1 c1 | c2 c2 | c3 c3 c3 c3 ]

A prompt's tokens attend to the prompt, causally. A completion's tokens attend to the prompt, all of it, and to their
own completion, causally: two products, whose softmax is one. So no mask of S x S exists, and what completions do not
see of each other is never computed. On a CPU no key is copied; on other devices, whose kernels keep the sum of a
softmax to themselves, every completion has a copy of its prompt's keys, a layer at a time. A function in transformers'
AttentionInterface does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PROBED_ATTENTION = "sayo_probed_sdpa"
ROW_CHUNK_ELEMENTS = 2**24  # float32 attention weights that exist at a time: 64 MB, however long the prompt
# These two return and take the logarithm of the softmax's sum, which the public function keeps to itself.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass
class PackedGroup:
    """One group in a packed row: a prompt of `prompt_length` tokens, then completions of `lengths` tokens.

    A grid is (G, C): every completion a row, C the longest. `index` says which completion token stands at a place of
    the grid (where there is none, the completion's first), `places` where in the flat grid each token stands.
    """

    prompt_length: int
    lengths: Sequence[int]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def real(self) -> Tensor:
        """(G, C) boolean: where a token stands."""
        lengths = torch.tensor([length for length in self.lengths if length], device=self.device)
        return torch.arange(max(self.lengths), device=self.device) < lengths[:, None]

    @cached_property
    def index(self) -> Tensor:
        lengths = self.real.sum(1)  # (G,)
        first = lengths.cumsum(0) - lengths
        return (first[:, None] + torch.arange(self.real.shape[1], device=self.device)).where(self.real, first[:, None])

    @cached_property
    def places(self) -> Tensor:
        return self.real.flatten().nonzero().flatten()  # (T,)

    def to_grid(self, tokens: Tensor) -> Tensor:
        """(1, H, T, ...) of completion tokens to (G, H, C, ...)."""
        return tokens[0][:, self.index].transpose(0, 1)

    def from_grid(self, grid: Tensor) -> Tensor:
        """(G, H, C, ...) to (1, H, T, ...)."""
        return grid.transpose(0, 1).flatten(1, 2)[:, self.places][None]


def _spans(groups: Sequence[PackedGroup]) -> Iterable[tuple[PackedGroup, slice, slice]]:
    """Every group with the places of its prompt and of its completions in the row."""
    start = 0
    for group in groups:
        middle = start + group.prompt_length
        yield group, slice(start, middle), slice(middle, middle + group.num_tokens)
        start = middle + group.num_tokens


class _PackedAttention(torch.autograd.Function):
    """packed_attention with the CPU's flash kernel.

    The two parts of a completion come with the logarithm of their sums of exponentials, which is how they are weighed.
    In the backward pass, the kernel that is given the whole softmax's output and sum instead of a part's makes that
    part's share of the gradients. All is written where it belongs in the row: nothing is joined, filled or added up.
    """

    @staticmethod
    def forward(ctx, query, key, value, groups, scaling):
        heads, output = (query, key, value), torch.empty_like(query)
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)  # (1, H, S)
        for group, prompt, own in _spans(groups):
            prompts = [part[:, :, prompt] for part in heads]
            output[:, :, prompt], sums[:, :, prompt] = _flash(*prompts, 0.0, True, scale=scaling)
            if not group.num_tokens:
                continue
            on_prompt, prompt_sum = _flash(query[:, :, own], *prompts[1:], 0.0, False, scale=scaling)
            grid = [group.to_grid(part[:, :, own]).contiguous() for part in heads]
            on_own, own_sum = (group.from_grid(part) for part in _flash(*grid, 0.0, True, scale=scaling))
            whole_sum = torch.logaddexp(prompt_sum, own_sum)  # (1, H, T)
            shares = [(part - whole_sum).exp()[..., None] for part in (prompt_sum, own_sum)]
            output[:, :, own] = on_prompt * shares[0] + on_own * shares[1]
            sums[:, :, own] = whole_sum
        ctx.save_for_backward(*heads, output, sums)
        ctx.groups, ctx.scaling = groups, scaling
        return output

    @staticmethod
    def backward(ctx, gradient):
        *heads, output, sums = ctx.saved_tensors
        found = [torch.empty_like(part) for part in heads]
        for group, prompt, own in _spans(ctx.groups):
            prompts = [part[:, :, prompt] for part in heads]
            whole = [gradient, *heads, output, sums]
            parts = [part[:, :, prompt] for part in whole]
            of_prompt = _flash_backward(*parts, 0.0, True, scale=ctx.scaling)
            if group.num_tokens:
                parts = [part[:, :, own] for part in whole]
                # Of the completions' queries and the prompt's keys and values.
                of_both = _flash_backward(*parts[:2], *prompts[1:], *parts[4:], 0.0, False, scale=ctx.scaling)
                grid = [group.to_grid(part).contiguous() for part in parts]
                grid[0] = grid[0] * group.real[:, None, :, None]  # places without a token get and give no gradient
                of_own = [group.from_grid(part) for part in _flash_backward(*grid, 0.0, True, scale=ctx.scaling)]
                of_own[0] = of_own[0] + of_both[0]
                of_prompt = of_prompt[0], of_prompt[1] + of_both[1], of_prompt[2] + of_both[2]
                for target, part in zip(found, of_own, strict=True):
                    target[:, :, own] = part
            for target, part in zip(found, of_prompt, strict=True):
                target[:, :, prompt] = part
        return *found, None, None


def _attention_with_copies(query, key, value, groups, scaling):
    """The same with public functions alone: every completion has a copy of its prompt's keys."""
    repeats, outputs = query.shape[1] // key.shape[1], []
    # Not every kernel takes fewer heads of keys than of queries, and the one that is left makes an S x S matrix.
    heads = query, key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    for group, prompt, own in _spans(groups):
        prompts = [part[:, :, prompt] for part in heads]
        outputs.append(scaled_dot_product_attention(*prompts, is_causal=True, scale=scaling))
        if not group.num_tokens:
            continue
        queries, *grids = (group.to_grid(part[:, :, own]) for part in heads)  # (G, H, C, d)
        copies = (part.expand(len(queries), -1, -1, -1) for part in prompts[1:])
        keys, values = (torch.cat(parts, dim=2) for parts in zip(copies, grids, strict=True))  # (G, H, P + C, d)
        mask = causal_lower_right(queries.shape[2], keys.shape[2])
        found = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
        outputs.append(group.from_grid(found))
    return torch.cat(outputs, dim=2)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[PackedGroup], scaling: float
) -> Tensor:
    """Attention in a packed row, differentiable. The dense form of the same is packing.dense_mask.

    Args:
        query: (1, H, S, d). key, value: (1, H_kv, S, d). groups: in their order in the row.

    Returns:
        (1, H, S, d).
    """
    # The kernel that says the logarithm of its sum is the CPU's; elsewhere public functions do the same.
    function = _PackedAttention.apply if query.device.type == "cpu" else _attention_with_copies
    return function(query, key, value, groups, scaling)


class SamplingCache:
    """Keys and values while groups are sampled: those of a prompt once, those of a completion in a row of its own.

    The same function of the AttentionInterface fills it and attends to it; the model itself is told of no cache.
    """

    def __init__(self, prompt_lengths: Sequence[int], max_new_tokens: int):
        self.prompt_lengths, self.max_new_tokens = list(prompt_lengths), max_new_tokens
        self.alive: list[int] = []  # completions of each prompt that go on
        self.length = -1  # place of the token that is fed; -1 while the prompts are read
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, (1, H_kv, all prompts, d)
        self.completions: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, (m, H_kv, max_new_tokens, d)

    def begin_token(self, kept: Tensor | None, alive: Sequence[int]) -> None:
        """Before one token of each completion is fed: which rows (m,) are left, None for all; how many by prompt."""
        self.length += 1
        self.alive = list(alive)
        if kept is not None:
            for layer, parts in self.completions.items():
                self.completions[layer] = tuple(part[kept] for part in parts)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query (1, H, m, d), key and value (1, H_kv, m, d) of one token for each completion, to (1, H, m, d)."""
        num_kv, count, width = key.shape[1:]
        if layer not in self.completions:
            shape = (count, num_kv, self.max_new_tokens, width)
            self.completions[layer] = key.new_empty(shape), value.new_empty(shape)
        keys, values = self.completions[layer]
        keys[:, :, self.length], values[:, :, self.length] = key[0].transpose(0, 1), value[0].transpose(0, 1)
        keys, values = (part[:, :, : self.length + 1] for part in (keys, values))  # (m, H_kv, t, d)
        queries = query[0].unflatten(0, (num_kv, -1)).permute(2, 0, 1, 3) * scaling  # (m, H_kv, H / H_kv, d)
        on_own = queries @ keys.mT  # (m, H_kv, H / H_kv, t)
        outputs, start, first = [], 0, 0
        for length, number in zip(self.prompt_lengths, self.alive, strict=True):
            rows, columns = slice(first, first + number), slice(start, start + length)
            start, first = start + length, first + number
            if number == 0:
                continue
            prompt_keys, prompt_values = (part[0, :, columns] for part in self.prompts[layer])  # (H_kv, P, d)
            together = queries[rows].transpose(0, 1).flatten(1, 2)  # (H_kv, rows * H / H_kv, d)
            # The prompt's part is the large one: it stays as its product makes it, and the own part is turned to it.
            scores = torch.cat([together @ prompt_keys.mT, on_own[rows].transpose(0, 1).flatten(1, 2)], dim=-1)
            weights = scores.float().softmax(-1).to(query.dtype)  # (H_kv, rows * H / H_kv, P + t)
            output, own = weights[..., :length] @ prompt_values, weights[..., length:]
            output, own = (part.unflatten(1, (number, -1)).transpose(0, 1) for part in (output, own))
            outputs.append(output + own @ values[rows])  # (rows, H_kv, H / H_kv, d)
        return torch.cat(outputs).flatten(1, 2).transpose(0, 1)[None]  # (1, H, m, d)


class AttentionProbe:
    """Reads attention rows where attention is computed, while it is open (`with AttentionProbe(...) as probe:`).

    Nothing of size S x S is kept: each row's softmax, averaged over heads, is reduced at once by `key_weights`.

    Args:
        layers: indices of decoder layers.
        rows: (T,) indices into the flattened (B, S) batch of queries to read.
        key_weights: (B, K, W); a row's result is its attention times these weights, summed over keys.
        kept_layer: a layer of a packed row whose queries and keys are kept as they are, gradients and all.

    After the forward `results[layer]` is (T, W) float32, and `kept` the arguments of attention_on_prompt.
    """

    current: AttentionProbe | None = None

    def __init__(self, layers: Iterable[int], rows: Tensor, key_weights: Tensor, kept_layer: int | None = None):
        self.layers, self.rows, self.key_weights, self.kept_layer = set(layers), rows, key_weights, kept_layer
        self.results: dict[int, Tensor] = {}
        self.kept: tuple | None = None

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

    @torch.no_grad()
    def read_packed(self, layer: int, query: Tensor, key: Tensor, group: PackedGroup, scaling: float) -> None:
        """The same for the one group of a packed row, whose key weights are zero behind the prompt."""
        weights = self.key_weights[0, : group.prompt_length]  # (P, W)
        total = attention_on_prompt(query, key, group, scaling, lambda attention: attention @ weights)
        self.results[layer] = total[self.rows - (group.prompt_length - 1)]


def attention_on_prompt(
    query: Tensor,
    key: Tensor,
    group: PackedGroup,
    scaling: float,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Mean over heads of reduce(A), A (1 + T, P) float32: attention of a packed row's tokens on its prompt.

    The prompt's last token is the first row, then come the T completion tokens. A head at a time, so that A never
    exists for all of them; differentiable where query or key are.

    Args:
        query: (1, H, S, d). key: (1, H_kv, S, d). group: the only one of the row.
    """
    num_prompt, heads = group.prompt_length, query.shape[1]
    repeats = heads // key.shape[1]
    prompt_key = key[0, :, :num_prompt].float()  # (H_kv, P, d)
    grid = [group.to_grid(part[:, :, num_prompt:].float()) for part in (query, key)]
    causal = torch.ones(grid[0].shape[2], grid[0].shape[2], dtype=torch.bool, device=query.device).tril()

    def of_head(head: int) -> Tensor:
        own = grid[0][:, head] @ grid[1][:, head // repeats].mT * scaling  # (G, C, C)
        own_sum = own.masked_fill(~causal, float("-inf")).logsumexp(-1).flatten()[group.places]  # (T,)
        own_sum = torch.cat([own_sum.new_full((1,), float("-inf")), own_sum])
        on_prompt = query[0, head, num_prompt - 1 :].float() @ prompt_key[head // repeats].mT * scaling  # (1 + T, P)
        # The weight of a prompt key in the whole softmax: its weight in the prompt's part times that part's share.
        whole = torch.logaddexp(on_prompt.logsumexp(-1), own_sum)[:, None]
        if on_prompt.requires_grad:
            return reduce((on_prompt - whole).exp())
        return reduce(on_prompt.sub_(whole).exp_())

    if torch.is_grad_enabled():
        return sum(checkpoint(of_head, head, use_reentrant=False) for head in range(heads)) / heads
    return sum(of_head(head) for head in range(heads)) / heads


def _probed_attention(
    module, query, key, value, attention_mask, scaling=None, packed_groups=None, sampling_cache=None, **kwargs
):
    """transformers' own sdpa attention, or that of packed groups; while a probe is open it also reads its rows.

    packed_groups, sampling_cache: what vlm.forward_hidden hands through the model; `attention_mask` is then empty.
    """
    probe, layer, scaling = AttentionProbe.current, module.layer_idx, scaling or query.shape[-1] ** -0.5
    wanted = probe is not None and layer in probe.layers
    if packed_groups is None and sampling_cache is None:
        if wanted:
            with torch.autocast(query.device.type, enabled=False):  # rows are float32, whatever the model is
                probe.read(layer, query, key, attention_mask, scaling)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if packed_groups is None:
        output = sampling_cache.attend(layer, query, key, value, scaling)
    else:
        if sampling_cache is not None:
            sampling_cache.prompts[layer] = key.contiguous(), value.contiguous()  # read at every step
        if wanted:
            (group,) = packed_groups
            with torch.autocast(query.device.type, enabled=False):
                probe.read_packed(layer, query, key, group, scaling)
        if probe is not None and layer == probe.kept_layer:
            probe.kept = query, key, packed_groups[0], scaling
        output = packed_attention(query, key, value, packed_groups, scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(PROBED_ATTENTION, _probed_attention)
AttentionMaskInterface.register(PROBED_ATTENTION, sdpa_mask)
