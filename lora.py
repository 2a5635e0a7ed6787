"""LoRA's part of a linear layer, added to the layer's own result in place: PEFT's layers, with leaner arithmetic.

PEFT computes result + B(A(x)) * scaling as two modules, a product with a number and a sum: three tensors of the
result's size, and in half precision a copy of x for every layer that reads it. Here the second product adds to the
result while it is made, and the backward pass needs x as the layer itself has it. The adapter, its files and its
numbers (up to rounding) are PEFT's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _AddLowRank(torch.autograd.Function):
    """result += scaling * x Aᵀ Bᵀ for result (..., out), x (..., in), A (r, in), B (out, r)."""

    @staticmethod
    def forward(ctx, result, x, down, up, scaling):
        rows = x.flatten(0, -2)  # (S, in)
        low = rows @ down.to(x.dtype).T  # (S, r)
        result.view(-1, result.shape[-1]).addmm_(low, up.to(x.dtype).T, alpha=scaling)
        ctx.mark_dirty(result)
        ctx.save_for_backward(rows, down, up, low)
        ctx.scaling, ctx.shape = scaling, x.shape
        return result

    @staticmethod
    def backward(ctx, gradient):
        rows, down, up, low = ctx.saved_tensors
        of_rows = gradient.flatten(0, -2)  # (S, out)
        of_low = (of_rows @ up.to(of_rows.dtype)).mul_(ctx.scaling)  # (S, r)
        of_x = (of_low @ down.to(of_low.dtype)).view(ctx.shape) if ctx.needs_input_grad[1] else None
        of_down = (of_low.T @ rows).to(down.dtype)
        of_up = (of_rows.T @ low).to(up.dtype).mul_(ctx.scaling)
        return gradient, of_x, of_down, of_up, None


class AddedLora:
    """What PEFT calls for an adapter with a variant of its own (peft.tuners.lora.layer.LoraVariant)."""

    @staticmethod
    def forward(module, active_adapter, x, result, **_) -> Tensor:
        """result (..., out) of the base layer and x (..., in), to their sum with the adapter's part, in `result`."""
        x = module.lora_dropout[active_adapter](x).to(result.dtype)
        down, up = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        scaling = module.scaling[active_adapter]
        if torch.is_grad_enabled():
            return _AddLowRank.apply(result, x, down, up, scaling)
        low = x.flatten(0, -2) @ down.to(x.dtype).T  # (S, r)
        result.view(-1, result.shape[-1]).addmm_(low, up.to(x.dtype).T, alpha=scaling)
        return result

    @staticmethod
    def merge_safe(module, active_adapter, orig_weight) -> Tensor:
        return (orig_weight + module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module, active_adapter, orig_weight) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module, active_adapter, orig_weight) -> Tensor:
        return (orig_weight - module.get_delta_weight(active_adapter)).to(orig_weight.dtype)


def add_in_place(policy: nn.Module) -> None:
    """Let every plain LoRA linear layer of a PEFT model, quantized or not, add its part in place."""
    from peft.tuners.lora.layer import LoraLayer

    for module in policy.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            if not module.lora_variant and not any(module.lora_bias.values()):  # DoRA and its like stay as they are
                module.lora_variant = dict.fromkeys(module.lora_A, AddedLora)
                module.cast_input_dtype_enabled = False  # no float32 copy of x: the weights follow x instead
