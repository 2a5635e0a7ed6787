"""Where each token of a group goes in one forward: packed (one sequence) or padded (one completion per row).

    [ prompt (with image tokens) | c1 c1 c1 | c2 c2 | c3 c3 c3 c3 | ... ]

Packed, a completion token sees its prompt and the earlier tokens of its own completion, and positions restart after the
prompt for each completion. Several groups may share the sequence. The padded layout is the reference in tests, and the
one for models whose state cannot be tree-masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sayo.model.attention import PackedGroup
from sayo.model.families import PolicyError
from sayo.model.prompts import Prompt, base_model, model_device, prompt_positions


@dataclass
class Tokens:
    """The input of one forward: (B, S) tokens, their positions, and which may attend to which."""

    input_ids: Tensor  # (B, S)
    position_ids: Tensor  # (axes, B, S)
    attention_mask: Tensor | None = None  # (B, S) padding mask; None in a packed row and where nothing is padded
    groups: list[PackedGroup] | None = None  # of a packed row
    prompts: Sequence[Prompt] = ()  # in the order of their pictures in input_ids


@dataclass(kw_only=True)
class Layout(Tokens):
    """Tokens of one or more groups with T completion tokens. Rows are indices into the flattened (B, S) batch."""

    key_weights: Tensor  # (B, S, 2): weights over keys that give the means over target and over image tokens
    token_rows: Tensor  # (T,) where each completion token is the input
    predict_rows: Tensor  # (T,) where each is predicted
    completion_ids: Tensor  # (T,)
    lengths: list[int]  # tokens of each completion


def dense_mask(groups: Sequence[PackedGroup]) -> Tensor:
    """(1, 1, S, S) boolean tree mask of a packed row, for eager attention and tests: packed_attention needs none.

    A token may attend to the earlier tokens of its own segment (a prompt or a completion) and of its prompt.
    """
    lengths, parents = [], []
    for group in groups:
        parents += [len(lengths)] * (1 + len(group.lengths))
        lengths += [group.prompt_length, *group.lengths]
    lengths = torch.tensor(lengths, device=groups[0].device)
    segment = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)  # (S,)
    parent = torch.tensor(parents, device=lengths.device).repeat_interleave(lengths)  # (S,)
    return ((segment[:, None] == segment) | (parent[:, None] == segment)).tril()[None, None]


def _key_weights(prompt: Prompt) -> Tensor:
    """(P, 2): column 0 averages over image tokens weighted by coverage, column 1 over all that are counted."""
    weights = torch.zeros(len(prompt.input_ids), 2)
    covered = prompt.coverage.sum()
    if covered > 0:
        weights[prompt.image_token_index, 0] = prompt.coverage / covered
    counted = torch.ones_like(prompt.coverage) if prompt.counted is None else prompt.counted.float()  # (N,)
    weights[prompt.image_token_index, 1] = counted / counted.sum().clamp(min=1)
    return weights


def _layout_on(device, token_rows: list, predict_rows: list, tensors: dict[str, Tensor], **others) -> Layout:
    """The Layout of these fields, with its tensors on the device."""
    rows = {"token_rows": torch.cat(token_rows), "predict_rows": torch.cat(predict_rows)}
    tensors |= rows | {"completion_ids": tensors["input_ids"].flatten()[rows["token_rows"]]}
    return Layout(**{name: tensor.to(device) for name, tensor in tensors.items()}, **others)


def packed_layout(model: nn.Module, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]]) -> Layout:
    """Groups end to end in one row without padding: each prompt once, then its completions, a list of (n_i,) ids."""
    nothing = torch.zeros(0, dtype=torch.long)  # a prefill has no completions
    ids, positions, weights, groups, token_rows, predict_rows = [], [], [], [], [nothing], [nothing]
    device, offset = model_device(model), 0
    for prompt, group in zip(prompts, completions, strict=True):
        prompt_position = prompt_positions(model, prompt)  # (axes, P)
        groups.append(PackedGroup(len(prompt.input_ids), [len(completion) for completion in group], device))
        ids += [prompt.input_ids.cpu(), *(completion.cpu() for completion in group)]
        weights += [_key_weights(prompt), torch.zeros(groups[-1].num_tokens, 2)]
        positions.append(prompt_position)
        offset += len(prompt.input_ids)
        last_of_prompt = torch.tensor([offset - 1])
        for length in groups[-1].lengths:
            rows = torch.arange(offset, offset + length)
            positions.append((prompt_position.max() + 1 + torch.arange(length)).expand(len(prompt_position), -1))
            token_rows.append(rows)
            predict_rows.append(torch.cat([last_of_prompt, rows])[:length])
            offset += length
    tensors = {"input_ids": torch.cat(ids)[None], "key_weights": torch.cat(weights)[None]}
    tensors["position_ids"] = torch.cat(positions, dim=1)[:, None]  # (axes, 1, S)
    lengths = [length for group in groups for length in group.lengths]
    return _layout_on(device, token_rows, predict_rows, tensors, prompts=list(prompts), lengths=lengths, groups=groups)


def padded_layout(model: nn.Module, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]]) -> Layout:
    """One row per completion, each with its prompt, padded on the right."""
    pairs = [(prompt, completion) for prompt, group in zip(prompts, completions, strict=True) for completion in group]
    width = max(len(prompt.input_ids) + len(completion) for prompt, completion in pairs)
    axes = len(prompt_positions(model, prompts[0]))
    input_ids = torch.zeros(len(pairs), width, dtype=torch.long)
    position_ids = torch.zeros(axes, len(pairs), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    key_weights = torch.zeros(len(pairs), width, 2)
    token_rows, predict_rows = [], []
    for row, (prompt, completion) in enumerate(pairs):
        start, end = len(prompt.input_ids), len(prompt.input_ids) + len(completion)
        prompt_position = prompt_positions(model, prompt)
        input_ids[row, :end] = torch.cat([prompt.input_ids.cpu(), completion.cpu()])
        position_ids[:, row, :start] = prompt_position
        position_ids[:, row, start:end] = prompt_position.max() + 1 + torch.arange(len(completion))
        attention_mask[row, :end] = 1
        key_weights[row, :start] = _key_weights(prompt)
        token_rows.append(row * width + torch.arange(start, end))
        predict_rows.append(row * width + torch.arange(start - 1, end - 1))
    tensors = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
    tensors["key_weights"] = key_weights
    others = {"prompts": [prompt for prompt, _ in pairs], "lengths": [len(completion) for _, completion in pairs]}
    return _layout_on(model_device(model), token_rows, predict_rows, tensors, **others)


LAYOUTS = {"packed": packed_layout, "padded": padded_layout}


def layer_types(model: nn.Module) -> list[str]:
    """The kind of every decoder layer: "full_attention", "linear_attention", ..."""
    config = base_model(model).config.get_text_config()
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def model_layout(model: nn.Module, layout: str | None = None) -> str:
    """The layout to use: the one asked for, or "packed" where every layer can be tree-masked.

    Linear attention carries a state from token to token, and a sliding window would count tokens of other completions:
    such models take the padded layout. Raises PolicyError for an unknown layout, and for "packed" with such a model.
    """
    if layout is not None and layout not in LAYOUTS:
        raise PolicyError(f"layout={layout!r}: valid are {', '.join(map(repr, LAYOUTS))}")
    special = sorted(set(layer_types(model)) - {"full_attention"})
    if layout == "packed" and special:
        raise PolicyError(f"layout='packed': a model with {', '.join(special)} cannot be tree-masked, give 'padded'")
    return layout or ("padded" if special else "packed")


def split_by_tokens(sizes: Sequence[int], sampling_tokens: int) -> list[slice]:
    """Consecutive groups that share one sampling cache; a group larger than sampling_tokens gets its own.

    Example: sizes (30, 30, 50, 90) at 80 tokens give the slices 0:2, 2:3, 3:4.
    """
    slices, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > sampling_tokens:
            slices.append(slice(start, index))
            start, total = index, 0
        total += size
    return [*slices, slice(start, len(sizes))] if sizes else []
