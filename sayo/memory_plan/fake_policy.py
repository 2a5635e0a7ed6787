"""A policy of fake tensors for footprint.py: shape, dtype and storage of every weight, but no memory.

The real class is built on the meta device from its config alone, with the 4-bit layers and adapter of load_policy.
"""

import copy
import math
import re

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForImageTextToText

from sayo.model import loading
from sayo.model.attention import use_probed_attention
from sayo.model.families import LANGUAGE_MODULE
from sayo.model.prompts import base_model

WEIGHTS = ("language model", "vision tower weights", "embeddings", "head", "adapter")


def shallow(config, depth: int):
    """The model's config with so many decoder layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return config


def depths(config) -> list[int]:
    """How many layers to trace: two depths that define a straight line, or all layers where they differ."""
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    first = max(2, len(getattr(vision, "deepstack_visual_indexes", None) or []))
    alike = len(set(getattr(text, "layer_types", None) or [])) < 2
    return [first, first + 1] if alike and text.num_hidden_layers > first + 1 else [text.num_hidden_layers]


def fake_policy(config, settings) -> nn.Module:
    """The policy that load_policy makes of a model's config and a train_rl.Config, of fake tensors."""
    dtype = loading.choose_dtype(settings.dtype, config, torch.device("cpu"))
    with torch.device("meta"):
        policy = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
        use_probed_attention(policy)
        packed = _with_4bit_layers(policy, dtype) if settings.load_in_4bit else []
        policy.requires_grad_(False)
        policy.is_loaded_in_4bit = settings.load_in_4bit  # peft asks
        lora = settings.lora_rank, settings.lora_alpha, settings.lora_targets
        policy = loading.with_adapter(policy, None, *lora, settings.load_in_4bit)
    for layer in packed:
        count = layer.in_features * layer.out_features
        layer.weight = nn.Parameter(torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device="meta"), False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy.to_empty(device="cpu")
        base_model(policy).tie_weights()  # to_empty makes two of one
        for layer in packed:
            layer.weight.quant_state = _quantization_state(layer, dtype)
    return policy.eval()


def _with_4bit_layers(policy: nn.Module, compute_dtype: torch.dtype) -> list[nn.Module]:
    """Put bitsandbytes' layers where load_policy has them, and return them."""
    from bitsandbytes.nn import Linear4bit  # prints about its optional kernels: not when a script is imported
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    settings = loading.four_bits(compute_dtype)
    replace_with_bnb_linear(policy, settings.llm_int8_skip_modules, settings)
    packed = [module for module in policy.modules() if isinstance(module, Linear4bit)]
    for layer in packed:
        layer.support_avx512bf16_for_cpu = False
    return packed


def _quantization_state(layer: nn.Module, dtype: torch.dtype):
    """NF4 with double quantisation: 8-bit scales of 64 weights each, and float32 scales of 256 scales each."""
    from bitsandbytes.functional import QuantState

    blocks = math.ceil(layer.in_features * layer.out_features / 64)
    nested = QuantState(torch.empty(math.ceil(blocks / 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    scales, shape = torch.empty(blocks, dtype=torch.uint8), torch.Size((layer.out_features, layer.in_features))
    options = {"code": torch.empty(16), "quant_type": "nf4", "offset": torch.empty(()), "state2": nested}
    return QuantState(scales, shape=shape, blocksize=64, dtype=dtype, **options)


def weights_by_part(policy: nn.Module) -> dict[str, list[Tensor]]:
    """Every weight and buffer by part, with the statistics of quantised ones."""
    base, parts = base_model(policy), {name: [] for name in WEIGHTS}
    embeddings, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        part = "language model" if re.search(LANGUAGE_MODULE, name) else "vision tower weights"
        part = "adapter" if "lora_" in name else part
        part = "embeddings" if tensor is embeddings else "head" if tensor is head else part
        parts[part].append(tensor)
        if state := getattr(tensor, "quant_state", None):
            parts[part] += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return parts
