"""LoRA's part of a linear layer, added to the layer's own result in place: PEFT's layers, with leaner arithmetic.

PEFT computes result + B(A(x)) * scaling as two modules, a product with a number and a sum: three tensors of the
result's size, and in half precision a copy of x for every layer that reads it. Here the second product adds to the
result while it is made, and the backward pass needs x as the layer itself has it. The adapter, its files and its
numbers (up to rounding) are PEFT's.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from families import PolicyError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapter_folder(adapter: str) -> str:
    """The folder of an adapter: the one given, or what the Hub has of owner/name or owner/name@revision.

    Of the Hub only ADAPTER_FILES are downloaded, so that PEFT, which would go on to a pickle, finds none.

    Raises:
        PolicyError (a ValueError): there is none, its weights are no safetensors, or it is of another kind than LoRA.
    """
    folder = Path(os.path.expanduser(adapter))
    if not os.path.isdir(folder):
        from huggingface_hub import snapshot_download

        name, _, revision = adapter.partition("@")
        try:
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(ADAPTER_FILES)))
        except (OSError, ValueError) as error:  # those of the Hub are these
            raise PolicyError(
                f"adapter={adapter!r:.200} is no folder, nor can it be downloaded: give the adapter/ folder of a run, "
                f"or a Hub id (owner/name, or owner/name@revision). huggingface_hub says: {str(error)[:300]}"
            ) from error
    if not (folder / ADAPTER_FILES[0]).is_file():
        raise PolicyError(f"adapter={adapter!r:.200} holds no {ADAPTER_FILES[0]}: give the adapter/ folder of a run")
    if not (folder / ADAPTER_FILES[1]).is_file():
        raise PolicyError(
            f"adapter={adapter!r:.200} holds no {ADAPTER_FILES[1]}: give one with weights as safetensors. Pickles "
            "(adapter_model.bin) are not read, since they can run code: convert them with PEFT where you trust them"
        )
    try:
        config = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
        kind, module = config.get("peft_type"), config.get("megatron_config")
    except (ValueError, AttributeError, RecursionError) as error:
        raise PolicyError(f"adapter={adapter!r:.200}: its {ADAPTER_FILES[0]} is not a JSON object: {error}") from error
    if kind != "LORA" or module:  # with a megatron_config PEFT imports any module that the file names
        raise PolicyError(
            f"adapter={adapter!r:.200}: its {ADAPTER_FILES[0]} has peft_type {kind!r:.60} and megatron_config "
            f"{module!r:.60}; only LORA without the latter is read"
        )
    return str(folder)


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
        """The base layer's weight (out, in) with the adapter's part, as a new tensor; rounded once."""
        return (orig_weight + module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module, active_adapter, orig_weight) -> None:
        """The same in place."""
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module, active_adapter, orig_weight) -> Tensor:
        """The weight without the adapter's part again, as a new tensor."""
        return (orig_weight - module.get_delta_weight(active_adapter)).to(orig_weight.dtype)


def add_in_place(policy: nn.Module) -> None:
    """Let every plain LoRA linear layer of a PEFT model, quantized or not, add its part in place."""
    from peft.tuners.lora.layer import LoraLayer

    for module in policy.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            if not module.lora_variant and not any(module.lora_bias.values()):  # DoRA and its like stay as they are
                module.lora_variant = dict.fromkeys(module.lora_A, AddedLora)
                module.cast_input_dtype_enabled = False  # no float32 copy of x: the weights follow x instead
