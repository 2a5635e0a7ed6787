"""A Llama-like language model for one token of every row, in few operations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sayo.model.forward import compute_dtype
from sayo.model.lora import JoinedLinears
from sayo.model.prompts import base_model
from sayo.model.sampling.cache import SamplingCache


class _Norm:
    """transformers' RMSNorm in fewer operations: weight * x / sqrt(mean of x² + eps), float32 up to the product."""

    def __init__(self, weight: Tensor, eps: float):
        self.weight, self.eps = weight, torch.tensor(eps, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return self.weight * (x * scale).to(x.dtype)


class Decoder:
    """A Llama-like language model for one token of every row, in about two thirds of transformers' operations.

    It holds no weights but joined copies of LoRA's. TreeSampler compares it with transformers' own layers once.
    """

    def __init__(self, model: nn.Module):
        text, dtype = base_model(model).model.get_decoder(), compute_dtype(model)
        self.embed, self.norm, self.layers = text.embed_tokens, _Norm(text.norm.weight, text.norm.variance_epsilon), []
        for layer in text.layers:
            attention, mlp, heads_norm = layer.self_attn, layer.mlp, None
            sizes = [
                projection.out_features // attention.head_dim for projection in (attention.q_proj, attention.k_proj)
            ]
            if hasattr(attention, "q_norm"):
                weights = [attention.q_norm.weight.expand(sizes[0], -1), attention.k_norm.weight.expand(sizes[1], -1)]
                heads_norm = _Norm(torch.cat(weights), attention.q_norm.variance_epsilon)
            norms = [_Norm(norm.weight, norm.variance_epsilon) for norm in _norms(layer)]
            joined = [(attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,)]
            joined += [(mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)]
            linears = [JoinedLinears(dtype, *layers) for layers in joined]
            self.layers.append((attention, sizes, heads_norm, norms, linears, mlp.act_fn))

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether the layers have the parts of Llama's and no others, and nothing hooks into their forward."""
        text, dtype = base_model(model).model.get_decoder(), compute_dtype(model)
        if getattr(getattr(text, "rotary_emb", None), "rope_type", "dynamic") in ("dynamic", "longrope"):
            return False  # its angles depend on the longest row
        return all(_is_plain(layer, dtype) for layer in text.layers) and hasattr(text.norm, "variance_epsilon")

    def angles(self, model: nn.Module, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines (B, T, d) of text positions (axes, B, T), which are alike in all axes."""
        rotary, places = base_model(model).model.get_decoder().rotary_emb, positions.squeeze(0)
        found = rotary(self.norm.weight.new_zeros(1), places)
        cosine, sine = (part[0] if part.dim() == 4 else part for part in found)
        left, right = sine.chunk(2, dim=-1)
        return cosine, torch.cat([-left, right], dim=-1)

    def __call__(self, tokens: Tensor, cosine: Tensor, sine: Tensor, cache: SamplingCache) -> Tensor:
        """Feed a token (m,) to each row, at angles (m, 1, d): the last hidden states (m, D)."""
        hidden = self.embed(tokens)
        for attention, sizes, heads_norm, norms, (inputs, output, gates, down), activation in self.layers:
            *query_key, value = inputs(norms[0](hidden))
            heads = torch.cat(query_key, dim=-1).unflatten(-1, (sum(sizes), -1))  # (m, H + H_kv, d)
            heads = heads if heads_norm is None else heads_norm(heads)
            heads = heads * cosine + heads.roll(heads.shape[-1] // 2, -1) * sine
            query, key = heads.split(sizes, dim=1)
            value = value.unflatten(-1, (sizes[1], -1))
            attended = cache.attend(attention.layer_idx, query, key, value, attention.scaling)  # (m, H, d)
            (hidden,) = output(attended.flatten(1), hidden)
            gate, up = gates(norms[1](hidden))
            (hidden,) = down(activation(gate) * up, hidden)
        return self.norm(hidden)


def _is_plain(layer: nn.Module, dtype: torch.dtype) -> bool:
    parts = {name: {child for child, _ in module.named_children()} for name, module in layer.named_children()}
    attention, norms = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"input_layernorm", "post_attention_layernorm"}
    if parts.keys() != {"self_attn", "mlp", *norms} or parts["mlp"] != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    if parts["self_attn"] - {"rotary_emb"} not in (attention, attention | {"q_norm", "k_norm"}):
        return False
    projections = [module for name, module in layer.named_modules() if name.endswith("_proj")]
    is_known = hasattr(layer.self_attn, "head_dim") and all(hasattr(module, "out_features") for module in projections)
    is_known &= all(hasattr(norm, "variance_epsilon") and norm.weight.dtype == dtype for norm in _norms(layer))
    return is_known and not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())


def _norms(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    return layer.input_layernorm, layer.post_attention_layernorm
