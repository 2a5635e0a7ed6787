"""Where every token of a group sits in one forward: packed (one sequence) or padded (one completion per row).

    [ prompt (with image tokens) | c1 c1 c1 | c2 c2 | c3 c3 c3 c3 | ... ]

Packed, a completion token sees its prompt and the earlier tokens of its own completion, and positions restart after
the prompt for each completion. Several groups may follow each other in the same sequence. The padded layout is the
ordinary form: the oracle of the tests, and the way for models whose state cannot be tree-masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attention import PackedGroup
from families import PolicyError
from prompts import Prompt, base_model, model_device, prompt_positions


@dataclass
class Tokens:
    """What one forward takes: (B, S) tokens, their positions, and who may see whom."""

    input_ids: Tensor  # (B, S)
    position_ids: Tensor  # (axes, B, S)
    attention_mask: Tensor | None = None  # (B, S) padding mask; None in a packed row and where nothing is padded
    groups: list[PackedGroup] | None = None  # who sees whom in a packed row
    prompts: Sequence[Prompt] = ()  # in the order in which their pictures appear


@dataclass(kw_only=True)
class Layout(Tokens):
    """Where every token of one or several groups sits in the (B, S) batch of one forward; T completion tokens in all.

    Rows are indices into the flattened batch, completion by completion.
    """

    key_weights: Tensor  # (B, S, 2): weights whose sums over keys are the means over target and over image tokens
    token_rows: Tensor  # (T,) where a completion token is the input
    predict_rows: Tensor  # (T,) where it is predicted
    completion_ids: Tensor  # (T,)
    lengths: list[int]  # tokens of each completion


def tree_mask(owner: Tensor, parent: Tensor, key_owner: Tensor) -> Tensor:
    """Who may see whom in a packed sequence, as a mask; attention.packed_attention does the same without one.

    Args:
        owner: (Q,) number of the segment that a query belongs to; prompts and completions are segments.
        parent: (Q,) number of the segment that its segment hangs on (a completion on its prompt, a prompt on itself).
        key_owner: (K,) the segments of all keys, of which the queries are the last Q.

    Returns:
        (Q, K) boolean, True where a query may attend to a key: the earlier ones of its own segment and of its parent.
    """
    related = (owner[:, None] == key_owner) | (parent[:, None] == key_owner)
    return related.tril(len(key_owner) - len(owner))


def dense_mask(groups: Sequence[PackedGroup]) -> Tensor:
    """(1, 1, S, S) boolean tree mask of a packed row: for eager attention, and the oracle of packed_attention."""
    owner, parent, segment = [], [], 0
    for group in groups:
        prompt = segment
        for length in (group.prompt_length, *group.lengths):
            owner.append(torch.full((length,), segment))
            parent.append(torch.full((length,), prompt))
            segment += 1
    owner, parent = (torch.cat(parts).to(groups[0].device) for parts in (owner, parent))  # (S,)
    return tree_mask(owner, parent, owner)[None, None]


def _key_weights(prompt: Prompt) -> Tensor:
    """(P, 2): column 0 averages over the covered image tokens (by coverage), column 1 over all that are counted."""
    weights = torch.zeros(len(prompt.input_ids), 2)
    covered = prompt.coverage.sum()
    if covered > 0:
        weights[prompt.image_token_index, 0] = prompt.coverage / covered
    counted = torch.ones_like(prompt.coverage) if prompt.counted is None else prompt.counted.float()  # (N,)
    weights[prompt.image_token_index, 1] = counted / counted.sum().clamp(min=1)
    return weights


def packed_layout(model: nn.Module, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]]) -> Layout:
    """Lay groups end to end in one row: each prompt once, then its completions; no padding.

    Args:
        prompts: one per group.
        completions: per group a list of (n_i,) id tensors.
    """
    ids, positions, weights, token_rows, predict_rows, offset = [], [], [], [], [], 0
    for prompt, group in zip(prompts, completions, strict=True):
        prompt_position = prompt_positions(model, prompt)  # (axes, P)
        length = len(prompt.input_ids)
        ids.append(prompt.input_ids.cpu())
        positions.append(prompt_position)
        weights.append(_key_weights(prompt))
        last_of_prompt, offset = offset + length - 1, offset + length
        for completion in group:
            rows = torch.arange(offset, offset + len(completion))
            ids.append(completion.cpu())
            restart = prompt_position.max() + 1
            positions.append((restart + torch.arange(len(completion))).expand(len(prompt_position), -1))
            weights.append(torch.zeros(len(completion), 2))
            token_rows.append(rows)
            predict_rows.append(torch.cat([torch.tensor([last_of_prompt]), rows[:-1]])[: len(rows)])
            offset += len(completion)
    flat = [completion.cpu() for group in completions for completion in group]
    nothing = [torch.zeros(0, dtype=torch.long)]  # prompts alone (a prefill) are a layout too
    device = model_device(model)
    groups = [
        PackedGroup(len(prompt.input_ids), [len(completion) for completion in group], device)
        for prompt, group in zip(prompts, completions, strict=True)
    ]
    return Layout(
        input_ids=torch.cat(ids)[None].to(device),
        position_ids=torch.cat(positions, dim=1)[:, None].to(device),  # (axes, 1, S)
        key_weights=torch.cat(weights)[None].to(device),
        prompts=list(prompts),
        token_rows=torch.cat(token_rows + nothing).to(device),
        predict_rows=torch.cat(predict_rows + nothing).to(device),
        completion_ids=torch.cat(flat + nothing).to(device),
        lengths=[len(completion) for completion in flat],
        groups=groups,
    )


def padded_layout(model: nn.Module, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]]) -> Layout:
    """One row per completion, the prompt repeated in each, padding on the right: the plain form, and the oracle."""
    pairs = [
        (prompt, completion.cpu()) for prompt, group in zip(prompts, completions, strict=True) for completion in group
    ]
    width = max(len(prompt.input_ids) + len(completion) for prompt, completion in pairs)
    axes = len(prompt_positions(model, prompts[0]))
    input_ids = torch.zeros(len(pairs), width, dtype=torch.long)
    position_ids = torch.zeros(axes, len(pairs), width, dtype=torch.long)
    attention_mask = torch.zeros(len(pairs), width, dtype=torch.long)
    key_weights = torch.zeros(len(pairs), width, 2)
    token_rows, predict_rows = [], []
    for row, (prompt, completion) in enumerate(pairs):
        start, end = len(prompt.input_ids), len(prompt.input_ids) + len(completion)
        prompt_position = prompt_positions(model, prompt)
        input_ids[row, :end] = torch.cat([prompt.input_ids.cpu(), completion])
        position_ids[:, row, :start] = prompt_position
        position_ids[:, row, start:end] = prompt_position.max() + 1 + torch.arange(len(completion))
        attention_mask[row, :end] = 1
        key_weights[row, :start] = _key_weights(prompt)
        token_rows.append(row * width + torch.arange(start, end))
        predict_rows.append(row * width + torch.arange(start - 1, end - 1))
    device = model_device(model)
    return Layout(
        input_ids=input_ids.to(device),
        position_ids=position_ids.to(device),
        attention_mask=attention_mask.to(device),
        key_weights=key_weights.to(device),
        prompts=[prompt for prompt, _ in pairs],
        token_rows=torch.cat(token_rows).to(device),
        predict_rows=torch.cat(predict_rows).to(device),
        completion_ids=torch.cat([completion for _, completion in pairs]).to(device),
        lengths=[len(completion) for _, completion in pairs],
    )


LAYOUTS = {"packed": packed_layout, "padded": padded_layout}


def layer_types(model: nn.Module) -> list[str]:
    """The kind of every decoder layer: "full_attention", "linear_attention", ..."""
    config = base_model(model).config.get_text_config()
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def model_layout(model: nn.Module, layout: str | None = None) -> str:
    """The layout to use: the one asked for, or by default "packed" where every layer can be tree-masked.

    Linear attention carries a state from token to token, and a sliding window counts tokens that are not there in a
    packed sequence: such models take the padded layout.

    Raises:
        PolicyError (a ValueError): no such layout, or "packed" for such a model.
    """
    if layout is not None and layout not in LAYOUTS:
        raise PolicyError(f"layout={layout!r}: valid are {', '.join(map(repr, LAYOUTS))}")
    special = sorted(set(layer_types(model)) - {"full_attention"})
    if layout == "packed" and special:
        raise PolicyError(f"layout='packed': a model with {', '.join(special)} cannot be tree-masked, give 'padded'")
    return layout or ("padded" if special else "packed")


def split_by_tokens(sizes: Sequence[int], sampling_tokens: int) -> list[slice]:
    """Consecutive runs of groups that share one cache in sampling; a group that is larger gets one of its own.

    Example: sizes (30, 30, 50, 90) at 80 tokens give the slices 0:2, 2:3, 3:4.
    """
    slices, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > sampling_tokens:
            slices.append(slice(start, index))
            start, total = index, 0
        total += size
    return [*slices, slice(start, len(sizes))] if sizes else []
