"""The one shared module: one forward over a group, log-probs, entropies and attention of its tokens.

A group is one sequence. GRPO samples G completions of one prompt, and a prompt with a picture is far longer than a
completion, so a group is never a padded batch of G copies, but the prompt once and every completion behind it, under
a tree mask. Small modules hold the parts: loading.py (a policy from a folder or the Hub), families.py (all that
differs between model families), prompts.py (an example becomes a Prompt), packing.py (where each token sits),
attention.py (packed attention, and reading its rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from attention import PROBED_ATTENTION, AttentionProbe, PackedGroup, SamplingCache, attention_on_prompt
from families import PolicyError
from loading import load_policy, load_processor
from packing import LAYOUTS, Layout, Tokens, dense_mask, layer_types, model_layout
from prompts import Prompt, base_model, encode_prompt, image_features, model_device, region_coverage

__all__ = [
    "Prompt",
    "attention_maps",
    "encode_prompt",
    "forward_hidden",
    "group_logprobs",
    "load_policy",
    "load_processor",
    "region_coverage",
    "row_logprobs",
    "token_statistics",
]

LOGIT_CHUNK_ELEMENTS = 2**24  # float32 logits that exist at a time: 64 MB, which malloc gives back at once


@contextmanager
def evaluating(model: nn.Module):
    """Eval mode inside the block (no dropout, a cache that works), the former mode behind it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The number format of the weights that are not quantized, and of the products."""
    return base_model(model).get_input_embeddings().weight.dtype


def autocast(model: nn.Module) -> AbstractContextManager:
    """Products in the model's own number format inside the block; nothing changes for a float32 model.

    A half-precision model has float32 LoRA weights. lora.py casts those of plain layers itself; any other kind (DoRA)
    would make float32 copies of its inputs, keep them for the backward pass and multiply in float32.
    """
    dtype = compute_dtype(model)
    return torch.autocast(model_device(model).type, dtype, enabled=dtype != torch.float32)


def forward_hidden(model: nn.Module, batch: Tokens, cache: Cache | SamplingCache | None = None) -> Tensor:
    """One forward of the model without its head: the last hidden states (B, S, D).

    Args:
        batch: tokens, positions and who sees whom; its prompts' pictures stand in its input_ids (none when it has no
            prompts, as in later sampling steps).
        cache: holds the keys so far and takes the new ones; a SamplingCache with packed rows.
    """
    inner, options, mask = base_model(model).model, {}, batch.attention_mask
    if batch.groups is not None and attention_name(model) != PROBED_ATTENTION:
        # Eager attention adds its mask to the scores: a boolean one would add 0 and 1, silently.
        dtype = compute_dtype(model)
        mask = torch.where(dense_mask(batch.groups), 0.0, torch.finfo(dtype).min).to(dtype)
    elif batch.groups is not None:
        options["packed_groups"] = batch.groups
    if isinstance(cache, SamplingCache):
        options["sampling_cache"], cache = cache, None
    if options:
        # transformers hands a mask of four dimensions through as it is. This one holds nothing: the function that
        # computes attention has its own arguments, and takes them along when gradient checkpointing calls it again.
        mask = torch.empty(1, 1, 0, 0, device=batch.input_ids.device)
    with autocast(model):
        encoded = {"image": image_features(model, batch.prompts)} if batch.prompts else None
        return inner(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids if len(batch.position_ids) == 3 else batch.position_ids[0],
            attention_mask=mask,
            mm_encoder_outputs=encoded,
            cache=cache,
            use_cache=cache is not None,
            **options,
        ).last_hidden_state


def attention_name(model: nn.Module) -> str:
    return base_model(model).config.get_text_config()._attn_implementation


# --- log-probs and entropies ------------------------------------------------------------------------------------


def _chunk_logprobs(head: nn.Module, hidden: Tensor, ids: Tensor, temperature: float, with_entropy: bool):
    logits = head(hidden).float()  # (rows, V)
    if temperature != 1:
        logits = logits / temperature
    log_normalizer = logits.logsumexp(-1)  # (rows,)
    logps = logits.gather(-1, ids[:, None])[:, 0] - log_normalizer
    if not with_entropy:
        return logps, None
    with torch.no_grad():
        probabilities = (logits - log_normalizer[:, None]).exp_()
        return logps, log_normalizer - probabilities.mul_(logits).sum(-1)


def row_logprobs(head: nn.Module, hidden: Tensor, ids: Tensor, temperature: float, with_entropy: bool = False):
    """Log-probs of `ids` (T,) and entropies in nats, both float32 (T,), from hidden rows (T, D).

    Rows go through the head in chunks that are computed again in the backward pass, so that the (T, V) logits (1 GB
    at 1,760 rows of a 152k vocabulary, several times over in a softmax) never exist whole.
    """
    step = max(1, LOGIT_CHUNK_ELEMENTS // head.weight.shape[0])
    parts = []
    for start in range(0, len(ids), step):
        inputs = (head, hidden[start : start + step], ids[start : start + step], temperature, with_entropy)
        recompute = torch.is_grad_enabled() and hidden.requires_grad
        parts.append(
            checkpoint(_chunk_logprobs, *inputs, use_reentrant=False) if recompute else _chunk_logprobs(*inputs)
        )
    if not parts:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty if with_entropy else None
    logps = torch.cat([logp for logp, _ in parts])
    return logps, torch.cat([entropy for _, entropy in parts]) if with_entropy else None


def group_logprobs(
    model: nn.Module,
    prompt: Prompt,
    completions: Sequence[Tensor],
    *,
    layout: str | None = None,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Log-probabilities of every completion token under the model, differentiable.

    Args:
        completions: G id tensors of shape (n_i,).
        layout: "packed" or "padded"; the numbers are the same. By default packed where the model can be.
        temperature: logits are divided by it, as in sampling.

    Returns:
        G float32 tensors (n_i,), on the model's device.

    Raises:
        ValueError: the layout's name is not one of the two, or "packed" for a model with linear attention.
    """
    batch = LAYOUTS[model_layout(model, layout)](model, [prompt], [completions])
    hidden = forward_hidden(model, batch)
    rows = hidden.flatten(0, 1)[batch.predict_rows]  # (T, D)
    logps, _ = row_logprobs(base_model(model).get_output_embeddings(), rows, batch.completion_ids, temperature)
    return list(logps.split(batch.lengths))


# --- attention --------------------------------------------------------------------------------------------------


@dataclass
class TokenStatistics:
    """What one forward says about a group's G completions: lists of G float32 tensors (n_i,)."""

    logps: list[Tensor]
    entropies: list[Tensor]  # nats, of the distribution that the token was drawn from
    target_attention: list[Tensor]  # mean over heads, layers and covered image tokens
    image_attention: list[Tensor]  # mean over heads, layers and all image tokens
    maps: Tensor | None = None  # (G, N) of map_layer: mean over heads and tokens, differentiable

    def detached(self) -> TokenStatistics:
        return replace(self, logps=[logp.detach() for logp in self.logps], maps=None)


def resolve_layers(model: nn.Module, layers: Sequence[int]) -> list[int]:
    """Numbers of decoder layers, counted from 0; negative ones count from the end, over layers of softmax attention.

    Raises:
        PolicyError: there is no such layer, or it has linear attention and so no attention rows.
    """
    types = layer_types(model)
    attending = [layer for layer, kind in enumerate(types) if kind != "linear_attention"]
    found = [attending[layer] if -len(attending) <= layer < 0 else layer for layer in layers]
    if not layers or any(layer not in attending for layer in found):
        all_of_them = f"0 to {len(types) - 1}" if len(attending) == len(types) else ", ".join(map(str, attending))
        raise PolicyError(
            f"attention_layers={list(layers)}: this model has attention rows in its layers {all_of_them} (or "
            f"{-len(attending)} to -1, from the end), give at least one"
        )
    return sorted(set(found))


def _probed_forward(
    model: nn.Module, batch: Layout, layers: Sequence[int], query: str, kept_layer: int | None = None
) -> tuple[Tensor, Tensor, tuple | None]:
    """(B, S, D) hidden states, (L, T, W) attention of completion tokens on the columns of batch.key_weights, kept."""
    if query not in ("token", "predictor"):
        raise ValueError(f'attention_query={query!r}: valid are "token" and "predictor"')
    if attention_name(model) != PROBED_ATTENTION:
        raise ValueError('attention rows are read in the "sdpa" path: load the policy with attn="sdpa"')
    layers = resolve_layers(model, layers)
    rows = batch.token_rows if query == "token" else batch.predict_rows
    with AttentionProbe(layers, rows, batch.key_weights, kept_layer) as probe:
        hidden = forward_hidden(model, batch)
    return hidden, torch.stack([probe.results[layer] for layer in layers]), probe.kept


def _completion_maps(model: nn.Module, prompt: Prompt, kept: tuple) -> Tensor:
    """(G, N): attention of a packed group's completions on the image tokens, mean over heads and over tokens."""
    group: PackedGroup = kept[2]
    lengths = torch.tensor(group.lengths, device=group.device)
    owner = torch.arange(len(lengths), device=group.device).repeat_interleave(lengths)  # (T,)
    average = (owner == torch.arange(len(lengths), device=group.device)[:, None]) / lengths.clamp(min=1)[:, None]
    average = torch.nn.functional.pad(average, (1, 0))  # (G, 1 + T); the prompt's last token is nobody's
    image = prompt.image_token_index.to(group.device)
    with torch.autocast(model_device(model).type, enabled=False):
        return attention_on_prompt(*kept, lambda attention: (average @ attention)[:, image])


def token_statistics(
    model: nn.Module,
    prompt: Prompt,
    completions: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    layers: Sequence[int] = (-1,),
    query: str = "token",
    layout: str | None = None,
    map_layer: int | None = None,
) -> TokenStatistics:
    """Log-probs, entropies and attention on target and image of every completion token, in one forward.

    Where gradients are on, the log-probs are differentiable: one forward serves the rewards and the update.

    Args:
        completions: G id tensors of shape (n_i,).
        layers: decoder layers that are averaged; negative numbers count from the end (SAYO: the last).
        query: whose attention row belongs to a token: "token", where it is the input (SAYO), or "predictor", the
            position that predicted it.
        map_layer: also give `maps` of this decoder layer, counted from 0; in the packed layout alone.

    Raises:
        ValueError: no such layer or query, or a model loaded with attn="eager".
    """
    batch = LAYOUTS[model_layout(model, layout)](model, [prompt], [completions])
    hidden, by_layer, kept = _probed_forward(model, batch, layers, query, map_layer)
    attention = by_layer.mean(0)  # (T, 2)
    rows = hidden.flatten(0, 1)[batch.predict_rows]  # (T, D)
    head = base_model(model).get_output_embeddings()
    logps, entropies = row_logprobs(head, rows, batch.completion_ids, temperature, with_entropy=True)
    parts = (logps, entropies, attention[:, 0], attention[:, 1])
    maps = None if map_layer is None else _completion_maps(model, prompt, kept)  # (G, N)
    return TokenStatistics(*(list(part.split(batch.lengths)) for part in parts), maps)


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    prompt: Prompt,
    completion: Tensor,
    *,
    layers: Sequence[int] = (-1,),
    query: str = "token",
    per_layer: bool = False,
) -> Tensor:
    """Attention of every token of one completion on every image token, mean over heads and layers: (n, N) float32.

    With per_layer the layers stay apart, (L, n, N), in rising order of the layers.

    Args and Raises: as token_statistics, whose target and image attention are weighted means of these rows.
    """
    batch = LAYOUTS[model_layout(model)](model, [prompt], [[completion]])
    one_column_each = torch.zeros(1, batch.input_ids.shape[1], len(prompt.image_token_index))  # (1, S, N)
    one_column_each[0, prompt.image_token_index, torch.arange(len(prompt.image_token_index))] = 1
    batch.key_weights = one_column_each.to(batch.key_weights)
    maps = _probed_forward(model, batch, layers, query)[1]  # (L, n, N)
    return maps if per_layer else maps.mean(0)
