"""Attention over packed groups without a mask, and attention rows read where attention is computed.

    [ prompt | c1 c1 c1 | c2 c2 | c3 c3 c3 c3 ]

Prompt tokens attend causally to the prompt. Completion tokens attend to the whole prompt and, causally, to their own
completion: two products that share one softmax. No S x S mask exists, and nothing is computed between completions.
Fused kernels return the log-sum-exp of each product, so the two are merged without copying a key: the CPU's flash
kernel, CUDA's in half precision from sm80 on, and CUDA's memory-efficient one elsewhere. Where none of them works, each
completion gets a copy of its prompt's keys, one layer at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

PROBED_ATTENTION = "sayo_probed_sdpa"
ROW_CHUNK_ELEMENTS = 2**24  # float32 attention weights computed at a time: 64 MB, however long the prompt


@dataclass
class PackedGroup:
    """One group in a packed row: a prompt of `prompt_length` tokens, then completions of `lengths` tokens.

    Its grid is (G, C): one completion per row, padded to the longest, C; empty completions have no row.
    """

    prompt_length: int
    lengths: Sequence[int]
    device: torch.device = torch.device("cpu")

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def real(self) -> Tensor:
        """(G, C) boolean, False at padding."""
        lengths = torch.tensor([length for length in self.lengths if length], device=self.device)
        return torch.arange(max(self.lengths), device=self.device) < lengths[:, None]

    @cached_property
    def index(self) -> Tensor:
        """(G, C): which completion token is at each place of the grid; the completion's first at padding."""
        lengths = self.real.sum(1)  # (G,)
        first = lengths.cumsum(0) - lengths
        return (first[:, None] + torch.arange(self.real.shape[1], device=self.device)).where(self.real, first[:, None])

    @cached_property
    def places(self) -> Tensor:
        """(T,): the place of each completion token in the flattened grid."""
        return self.real.flatten().nonzero().flatten()

    def to_grid(self, tokens: Tensor) -> Tensor:
        """(1, H, T, ...) of completion tokens to (G, H, C, ...)."""
        return tokens[0][:, self.index].transpose(0, 1)

    def from_grid(self, grid: Tensor) -> Tensor:
        """(G, H, C, ...) to (1, H, T, ...)."""
        return grid.transpose(0, 1).flatten(1, 2)[:, self.places][None]


def _spans(groups: Sequence[PackedGroup]) -> Iterable[tuple[PackedGroup, slice, slice]]:
    """Each group with the slices of the row that hold its prompt and its completions."""
    start = 0
    for group in groups:
        middle = start + group.prompt_length
        yield group, slice(start, middle), slice(middle, middle + group.num_tokens)
        start = middle + group.num_tokens


class CpuFlash:
    """A fused kernel that returns the log-sum-exp of its scores, which the public function keeps to itself.

    forward(query, key, value, causal, scaling) gives the output, its log-sum-exp (B, H, S) in float32, and the `state`
    that backward takes. backward(gradient, query, key, value, output, sums, state, causal, scaling) gives the gradients
    of query, key and value. There may be fewer key heads than query heads.
    """

    @staticmethod
    def forward(query, key, value, causal, scaling):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return *flash(query, key, value, 0.0, causal, scale=scaling), ()

    @staticmethod
    def backward(gradient, query, key, value, output, sums, state, causal, scaling):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return flash(gradient, query, key, value, output, sums, 0.0, causal, scale=scaling)


class CudaFlash:
    """CUDA's flash kernel: half precision, sm80 and later."""

    @staticmethod
    def forward(query, key, value, causal, scaling):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        output, sums, *_, seed, offset, _ = flash(query, key, value, 0.0, causal, scale=scaling)
        return output, sums, (seed, offset)

    @staticmethod
    def backward(gradient, query, key, value, output, sums, state, causal, scaling):
        flash, sizes = torch.ops.aten._scaled_dot_product_flash_attention_backward, (query.shape[2], key.shape[2])
        whole = (gradient, query, key, value, output, sums.contiguous(), None, None, *sizes)
        return flash(*whole, 0.0, causal, *state, scale=scaling)


class CudaEfficient:
    """CUDA's memory-efficient kernel: any card, float32 too, but as many key heads as query heads."""

    @staticmethod
    def forward(query, key, value, causal, scaling):
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        output, sums, *state = efficient(query, key, value, None, True, 0.0, causal, scale=scaling)
        return output, sums[:, :, : query.shape[2]], state  # it pads them to a multiple of 32

    @staticmethod
    def backward(gradient, query, key, value, output, sums, state, causal, scaling):
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention_backward
        sums = torch.nn.functional.pad(sums, (0, -sums.shape[2] % 32), value=float("inf")).contiguous()
        whole, wanted = (gradient, query, key, value, None, output, sums, *state), [True, True, True, False]
        return efficient(*whole, 0.0, wanted, causal, scale=scaling)[:3]


class RepeatedHeads:
    """A kernel whose key heads are repeated first, and their gradients summed."""

    def __init__(self, kernel):
        self.kernel = kernel

    def forward(self, query, key, value, causal, scaling):
        repeats = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        return self.kernel.forward(query, key, value, causal, scaling)

    def backward(self, gradient, query, key, value, *others):
        repeats = query.shape[1] // key.shape[1]
        repeated = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        of_query, *of_heads = self.kernel.backward(gradient, query, *repeated, *others)
        return of_query, *(part.unflatten(1, (-1, repeats)).sum(2) for part in of_heads)


class _PackedAttention(torch.autograd.Function):
    """packed_attention with a fused kernel.

    A completion's two parts are weighted by their log-sum-exp. In the backward pass, the kernel gets the output and
    log-sum-exp of the whole softmax, and so returns each part's share of the gradients.
    """

    @staticmethod
    def forward(ctx, query, key, value, groups, scaling, kernel):
        heads, output = (query, key, value), torch.empty_like(query)
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)  # (1, H, S)
        for group, prompt, own in _spans(groups):
            prompts = [part[:, :, prompt] for part in heads]
            output[:, :, prompt], sums[:, :, prompt], ctx.state = kernel.forward(*prompts, True, scaling)
            if not group.num_tokens:
                continue
            on_prompt, prompt_sum, _ = kernel.forward(query[:, :, own], *prompts[1:], False, scaling)
            grid = [group.to_grid(part[:, :, own]).contiguous() for part in heads]
            on_own, own_sum = (group.from_grid(part) for part in kernel.forward(*grid, True, scaling)[:2])
            whole_sum = torch.logaddexp(prompt_sum, own_sum)  # (1, H, T)
            shares = [(part - whole_sum).exp()[..., None] for part in (prompt_sum, own_sum)]
            output[:, :, own] = on_prompt * shares[0] + on_own * shares[1]
            sums[:, :, own] = whole_sum
        ctx.save_for_backward(*heads, output, sums)
        ctx.groups, ctx.scaling, ctx.kernel = groups, scaling, kernel
        return output

    @staticmethod
    def backward(ctx, gradient):
        *heads, output, sums = ctx.saved_tensors
        found, backward = [torch.empty_like(part) for part in heads], ctx.kernel.backward
        for group, prompt, own in _spans(ctx.groups):
            prompts = [part[:, :, prompt] for part in heads]
            whole = [gradient, *heads, output, sums]
            parts = [part[:, :, prompt] for part in whole]
            of_prompt = backward(*parts, ctx.state, True, ctx.scaling)
            if group.num_tokens:
                parts = [part[:, :, own] for part in whole]
                # Completion queries on prompt keys and values.
                of_both = backward(*parts[:2], *prompts[1:], *parts[4:], ctx.state, False, ctx.scaling)
                grid = [group.to_grid(part).contiguous() for part in parts]
                grid[0] = grid[0] * group.real[:, None, :, None]  # padding has no gradient
                of_own = [group.from_grid(part) for part in backward(*grid, ctx.state, True, ctx.scaling)]
                of_own[0] = of_own[0] + of_both[0]
                of_prompt = of_prompt[0], of_prompt[1] + of_both[1], of_prompt[2] + of_both[2]
                for target, part in zip(found, of_own, strict=True):
                    target[:, :, own] = part
            for target, part in zip(found, of_prompt, strict=True):
                target[:, :, prompt] = part
        return *found, None, None, None


def _attention_with_copies(query, key, value, groups, scaling):
    """packed_attention with public functions alone: each completion has a copy of its prompt's keys."""
    from torch.nn.attention.bias import causal_lower_right  # imports torch._dynamo, which takes seconds

    repeats, outputs = query.shape[1] // key.shape[1], []
    # Not every fused kernel takes fewer key heads than query heads; the fallback would build an S x S matrix.
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


def packed_attention(query: Tensor, key: Tensor, value: Tensor, groups: list[PackedGroup], scaling: float) -> Tensor:
    """Attention in a packed row, differentiable: query (1, H, S, d), key and value (1, H_kv, S, d) to (1, H, S, d).

    `groups` are in the order of the row. packing.dense_mask is the mask that gives the same result.
    """
    kernel = kernel_for(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3])
    if kernel is None:
        return _attention_with_copies(query, key, value, groups, scaling)
    return _PackedAttention.apply(query, key, value, groups, scaling, kernel)


@cache
def kernel_for(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int):
    """The fused kernel for this device, number format and shape, or None where each completion needs copies.

    On a card, a small group is computed with the kernel and with copies, once; where they differ, or the kernel is
    missing, a line on stderr says so.
    """
    if device.type == "cpu":
        return CpuFlash
    if device.type != "cuda" or torch.version.hip or width % 8:
        return None
    is_flash = dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0) and width <= 256
    kernel = CudaFlash if is_flash else RepeatedHeads(CudaEfficient) if heads != kv_heads else CudaEfficient
    try:
        difference = difference_to_copies(kernel, device, dtype, heads, kv_heads, width)
        problem = "" if difference < (1e-4 if dtype == torch.float32 else 0.03) else f"{difference:.2g} off"
    except torch.OutOfMemoryError:
        raise  # which says nothing about the kernel
    except (RuntimeError, TypeError, ValueError) as error:
        problem = str(error)
    if problem:
        name = "flash" if is_flash else "memory-efficient"
        print(f"attention: CUDA's {name} kernel is not used, keys are copied instead: {problem}", file=sys.stderr)
    return None if problem else kernel


def difference_to_copies(kernel, device, dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> float:
    """Relative difference (the largest of output and gradients) of a small group with this kernel and with copies."""
    groups, generator, results = [PackedGroup(37, (5, 0, 18), device)], torch.Generator().manual_seed(0), []
    shapes = [(1, count, 60, width) for count in (heads, kv_heads, kv_heads, heads)]
    query, key, value, weights = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for function, *others in ((_attention_with_copies,), (_PackedAttention.apply, kernel)):
            parts = [part.clone().requires_grad_() for part in (query, key, value)]
            output = function(*parts, groups, width**-0.5, *others)
            results.append([output.detach(), *torch.autograd.grad((output * weights).sum(), parts)])
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(*reversed(results), strict=True))


@dataclass
class AttentionProbe:
    """Reads attention rows during the forwards in its `with` block; no S x S matrix is kept."""

    layers: Sequence[int]
    rows: Tensor  # (T,) queries to read, as indices into the flattened (B, S) batch
    key_weights: Tensor  # (B, K, W): a row's result is its attention, mean over heads, times these weights
    kept_layer: int | None = None  # a layer of a packed row whose queries and keys are kept with their gradients
    results: dict[int, Tensor] = field(default_factory=dict)  # after the forward: (T, W) float32 by layer
    kept: tuple | None = None  # after the forward: the arguments of attention_on_prompt
    current: ClassVar[AttentionProbe | None] = None

    def __enter__(self) -> AttentionProbe:
        AttentionProbe.current = self
        return self

    def __exit__(self, *_) -> None:
        AttentionProbe.current = None

    @torch.no_grad()
    def read(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Padded: query (B, H, S, d), key (B, H_kv, K, d), mask boolean (B or 1, 1, S, K), None for causal."""
        heads, length, num_keys = query.shape[1], query.shape[2], key.shape[2]
        result = torch.empty(len(self.rows), self.key_weights.shape[-1], device=query.device)
        batch_of, position_of = self.rows // length, self.rows % length
        for batch in range(len(query)):
            keys = key[batch].float()  # (H_kv, K, d)
            for part in (batch_of == batch).nonzero().flatten().split(max(1, ROW_CHUNK_ELEMENTS // num_keys)):
                at = position_of[part]
                if mask is None:
                    hidden = torch.arange(num_keys, device=at.device) > at[:, None] + num_keys - length
                else:
                    hidden = ~mask[batch if len(mask) > 1 else 0, 0, at]

                def of_head(head: int, batch=batch, keys=keys, at=at, hidden=hidden) -> Tensor:
                    scores = query[batch, head, at].float() @ keys[head * len(keys) // heads].mT * scaling
                    return scores.masked_fill_(hidden, float("-inf")).softmax(-1) @ self.key_weights[batch]

                result[part] = mean_over_heads(of_head, heads)
        self.results[layer] = result

    @torch.no_grad()
    def read_packed(self, layer: int, query: Tensor, key: Tensor, group: PackedGroup, scaling: float) -> None:
        """Packed: one group, whose key weights are zero after the prompt."""
        weights = self.key_weights[0, : group.prompt_length]  # (P, W)
        total = attention_on_prompt(query, key, group, scaling, lambda attention: attention @ weights)
        self.results[layer] = total[self.rows - (group.prompt_length - 1)]


def mean_over_heads(of_head: Callable[[int], Tensor], heads: int) -> Tensor:
    """The mean over a layer's heads, in both layouts, for rewards, losses and pictures alike.

    `of_head` returns one head's reduced attention, so that the maps of all heads never exist together. Where gradients
    are on, it is recomputed in the backward pass.
    """
    if torch.is_grad_enabled():
        return sum(checkpoint(of_head, head, use_reentrant=False) for head in range(heads)) / heads
    return sum(of_head(head) for head in range(heads)) / heads


def attention_on_prompt(
    query: Tensor, key: Tensor, group: PackedGroup, scaling: float, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """Mean over heads of reduce(A), where A (1 + T, P) float32 is attention on the prompt; differentiable.

    The first row of A is the prompt's last token, the others are the T completion tokens. query is (1, H, S, d), key
    (1, H_kv, S, d), and the group the only one of the row.
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
        # exp(score - log-sum-exp over all keys, the prompt's and the completion's own).
        whole = torch.logaddexp(on_prompt.logsumexp(-1), own_sum)[:, None]
        if on_prompt.requires_grad:
            return reduce((on_prompt - whole).exp())
        return reduce(on_prompt.sub_(whole).exp_())

    return mean_over_heads(of_head, heads)


def _probed_attention(
    module, query, key, value, attention_mask, scaling=None, packed_groups=None, sampling_cache=None, **kwargs
):
    """transformers' own sdpa attention, or that of packed groups; reads the rows of an open probe.

    packed_groups and sampling_cache come from forward.forward_hidden, through the model; the mask is then empty.
    """
    probe, layer, scaling = AttentionProbe.current, module.layer_idx, scaling or query.shape[-1] ** -0.5
    if probe is not None and layer in probe.layers:
        with torch.autocast(query.device.type, enabled=False):  # rows are float32 at every model dtype
            if packed_groups is None:
                probe.read(layer, query, key, attention_mask, scaling)
            else:
                (group,) = packed_groups
                probe.read_packed(layer, query, key, group, scaling)
    if packed_groups is not None:
        if sampling_cache is not None:
            sampling_cache.store_prompts(layer, key, value)
        if probe is not None and layer == probe.kept_layer:
            probe.kept = query, key, packed_groups[0], scaling
        output = packed_attention(query, key, value, packed_groups, scaling)
    elif sampling_cache is not None:
        token = (part[0].transpose(0, 1) for part in (query, key, value))  # each (m, heads, d)
        return sampling_cache.attend(layer, *token, scaling)[None], None
    else:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output.transpose(1, 2).contiguous(), None


def use_probed_attention(policy: nn.Module) -> None:
    """Make the language model of a transformers model attend through _probed_attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PROBED_ATTENTION, _probed_attention)
    AttentionMaskInterface.register(PROBED_ATTENTION, sdpa_mask)
    policy.set_attn_implementation({"text_config": PROBED_ATTENTION})
