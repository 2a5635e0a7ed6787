"""One forward over a group: log-probs, entropies and attention of its tokens, without the full logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sayo.model.attention import PROBED_ATTENTION, AttentionProbe, PackedGroup, attention_on_prompt
from sayo.model.families import PolicyError
from sayo.model.packing import LAYOUTS, Layout, Tokens, dense_mask, layer_types, model_layout
from sayo.model.prompts import Prompt, base_model, image_features, model_device

LOGIT_CHUNK_ELEMENTS = 2**24  # float32 logits computed at a time: 64 MB, which malloc returns at once


@contextmanager
def evaluating(model: nn.Module):
    """Eval mode inside the block (no dropout, a cache that works), the former mode after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def set_checkpointing(policy: nn.Module, on: bool) -> None:
    """Recompute activations in the backward pass (non-reentrant), or not. transformers needs training mode for it."""
    if on:
        base_model(policy).activation_checkpointing_enable({"use_reentrant": False})
    else:
        base_model(policy).activation_checkpointing_disable()
    policy.train(on)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of unquantized weights and of matrix products."""
    return base_model(model).get_input_embeddings().weight.dtype


def autocast(model: nn.Module) -> AbstractContextManager:
    """Matrix products in the model's dtype inside the block; no effect on a float32 model.

    LoRA weights are float32 in half-precision models, too. lora.py casts those of plain layers; other kinds (DoRA)
    would otherwise multiply in float32, and keep float32 copies of their inputs for the backward pass.
    """
    dtype = compute_dtype(model)
    return torch.autocast(model_device(model).type, dtype, enabled=dtype != torch.float32)


def forward_hidden(model: nn.Module, batch: Tokens, cache=None) -> Tensor:
    """One forward of the model without its head: the last hidden states (B, S, D).

    The batch's input_ids hold the image tokens of its prompts; later sampling steps have no prompts. The cache of the
    keys so far takes the new ones: a SamplingCache for packed rows, else one of transformers'.
    """
    inner, options, mask = base_model(model).model, {}, batch.attention_mask
    if batch.groups is not None and attention_name(model) != PROBED_ATTENTION:
        # Eager attention adds the mask to the scores; a boolean one would silently add 0 and 1.
        dtype = compute_dtype(model)
        mask = torch.where(dense_mask(batch.groups), 0.0, torch.finfo(dtype).min).to(dtype)
    elif batch.groups is not None:
        options["packed_groups"] = batch.groups
    if hasattr(cache, "store_prompts"):
        options["sampling_cache"], cache = cache, None
    if options:
        # transformers passes a 4-D mask through unchanged. This one is empty: _probed_attention has its own arguments,
        # which reach it again when gradient checkpointing recomputes.
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

    Chunks of rows go through the head and are recomputed in the backward pass: the (T, V) logits, 1 GB at 1,760 rows
    of a 152k vocabulary and several times that in a softmax, never exist whole.
    """
    step, score = max(1, LOGIT_CHUNK_ELEMENTS // head.weight.shape[0]), _chunk_logprobs
    if torch.is_grad_enabled() and hidden.requires_grad:
        score = partial(checkpoint, _chunk_logprobs, use_reentrant=False)
    parts = [
        score(head, hidden[start : start + step], ids[start : start + step], temperature, with_entropy)
        for start in range(0, max(1, len(ids)), step)
    ]
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def group_logprobs(
    model: nn.Module,
    prompt: Prompt,
    completions: Sequence[Tensor],
    *,
    layout: str | None = None,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Log-probs of every completion token, differentiable: G float32 tensors (n_i,) on the model's device.

    Args:
        completions: G id tensors of shape (n_i,).
        layout: "packed" or "padded", with equal results; None takes packed where the model supports it.
        temperature: logits are divided by it, as in sampling.

    Raises:
        PolicyError: an unknown layout, or "packed" for a model with linear attention.
    """
    batch = LAYOUTS[model_layout(model, layout)](model, [prompt], [completions])
    rows = forward_hidden(model, batch).flatten(0, 1)[batch.predict_rows]  # (T, D)
    logps, _ = row_logprobs(base_model(model).get_output_embeddings(), rows, batch.completion_ids, temperature)
    return list(logps.split(batch.lengths))


@dataclass
class TokenStatistics:
    """What one forward gives for a group's G completions: lists of G float32 tensors (n_i,)."""

    logps: list[Tensor]
    entropies: list[Tensor]  # nats, of the distribution that each token was sampled from
    target_attention: list[Tensor]  # mean over heads, layers and covered image tokens
    image_attention: list[Tensor]  # mean over heads, layers and all image tokens
    maps: Tensor | None = None  # (G, N) of map_layer: mean over heads and tokens, differentiable

    def detached(self) -> TokenStatistics:
        return replace(self, logps=[logp.detach() for logp in self.logps], maps=None)


def resolve_layers(model: nn.Module, layers: Sequence[int]) -> list[int]:
    """Sorted indices of decoder layers; negative ones count softmax-attention layers from the end.

    Raises PolicyError for a layer that is missing or has linear attention, and so no attention rows.
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


def check_layers(model: nn.Module, layers: Sequence[int]) -> None:
    """Raise resolve_layers' PolicyError before any long work starts."""
    resolve_layers(model, layers)


def _probed_forward(
    model: nn.Module, batch: Layout, layers: Sequence[int], query: str, kept_layer: int | None = None
) -> tuple[Tensor, Tensor, tuple | None]:
    """Hidden states (B, S, D), attention rows (L, T, W) reduced by batch.key_weights, and AttentionProbe.kept."""
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
    average = torch.nn.functional.pad(average, (1, 0))  # (G, 1 + T): no weight for the prompt's last token
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

    The log-probs are differentiable where gradients are on, so that one forward serves the rewards and the update.

    Args:
        completions: G id tensors of shape (n_i,).
        layers: decoder layers to average over; negative ones count from the end (SAYO: the last).
        query: the attention row of a token is that of the token itself ("token", as in SAYO) or of the position that
            predicted it ("predictor").
        map_layer: index of a decoder layer to return `maps` of; packed layout only.

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
    model: nn.Module, prompt: Prompt, completion: Tensor, *, layers=(-1,), query: str = "token", per_layer: bool = False
) -> Tensor:
    """Attention of each token of a completion on each image token, mean over heads and layers: (n, N) float32.

    With per_layer, one map per layer in ascending order: (L, n, N). Args and Raises: as token_statistics, whose target
    and image attention are weighted means of these rows.
    """
    batch = LAYOUTS[model_layout(model)](model, [prompt], [[completion]])
    one_hot = torch.zeros(1, batch.input_ids.shape[1], len(prompt.image_token_index))  # (1, S, N)
    one_hot[0, prompt.image_token_index, torch.arange(len(prompt.image_token_index))] = 1
    batch.key_weights = one_hot.to(batch.key_weights)
    maps = _probed_forward(model, batch, layers, query)[1]  # (L, n, N)
    return maps if per_layer else maps.mean(0)
