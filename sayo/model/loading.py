"""Load a policy and its processor: number format, 4-bit weights, the probed attention function, the LoRA adapter."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from sayo.model.attention import use_probed_attention
from sayo.model.families import FAMILIES, LANGUAGE_MODULE, PolicyError, pictures_of, unsupported
from sayo.model.lora import add_in_place
from sayo.model.prompts import base_model

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def load_policy(
    model: str,
    *,
    load_in_4bit: bool = False,
    lora_rank: int = 16,
    adapter: str | None = None,
    attn: str = "sdpa",
    dtype: str = "auto",
    device: str | torch.device | None = None,
    load_on: str | torch.device | None = None,
    lora_alpha: int = 32,
    lora_targets: str = "language",
    max_pixels: int | None = None,
    revision: str | None = None,
):
    """Load a multimodal LLM: (model, processor), the model in eval mode and without dropout in either mode.

    Args:
        model: a local folder or a Hub id, e.g. "data/tiny_policy" or "Qwen/Qwen3-VL-4B-Instruct".
        load_in_4bit: NF4 with double quantization for the language model; vision tower, embeddings and head keep
            their dtype.
        lora_rank: rank of the LoRA adapter; 0 gives the plain model.
        adapter: folder or Hub id of a PEFT adapter (see adapter_folder), trainable unless lora_rank is 0.
        attn: "sdpa" (with the attention probe) or "eager" (for comparison; has no attention rewards).
        dtype: "float32", "bfloat16", "float16" or "auto" (see choose_dtype). LoRA weights are always float32.
        device: by default the first GPU, else the CPU.
        load_on: where to put the weights instead; dtype="auto" still follows `device`. For models that are sharded
            later and do not fit on one GPU.
        lora_targets: "language" for the linear layers of the language model, "all-linear" for vision as well.
        max_pixels: pictures with more pixels are shrunk to this many before they become tokens.
        revision: branch, tag or commit of a Hub model.

    Raises:
        PolicyError (a ValueError): no such model, an unsupported family, or an argument out of its range.
    """
    from transformers import AutoModelForImageTextToText

    if lora_rank < 0:
        raise PolicyError(f"lora_rank={lora_rank}: give 1 or more, or 0 for the plain model")
    given = ("attn", attn, ("sdpa", "eager")), ("lora_targets", lora_targets, ("language", "all-linear"))
    for name, value, valid in (*given, ("dtype", dtype, ("auto", "float32", "bfloat16", "float16"))):
        if value not in valid:
            raise PolicyError(f"{name}={value!r}: valid are {', '.join(valid)}")
    adapter = adapter and adapter_folder(adapter)
    config, processor = load_processor(model, revision=revision, max_pixels=max_pixels)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    weights_dtype = choose_dtype(dtype, config, device)
    quantization = four_bits(weights_dtype) if load_in_4bit else None
    safely = {"use_safetensors": True, "trust_remote_code": False, "revision": revision}
    options = {"dtype": weights_dtype, "attn_implementation": attn, "quantization_config": quantization}
    options["device_map"] = {"": torch.device(load_on or device)}
    try:
        policy = AutoModelForImageTextToText.from_pretrained(model, **safely, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise PolicyError(
            f"model={model!r} cannot be loaded: it must hold weights, as safetensors. Pickles can run code and are not "
            "read: where you trust pytorch_model.bin, convert it by from_pretrained and save_pretrained. transformers "
            f"says: {str(error)[:300]}"
        ) from error
    if attn == "sdpa":
        use_probed_attention(policy)
    if adapter is not None or lora_rank > 0:
        policy = with_adapter(policy, adapter, lora_rank, lora_alpha, lora_targets, load_in_4bit)
        for entry in policy.peft_config.values():  # written to adapter_config.json
            entry.base_model_name_or_path, entry.revision = portable_name(model), revision
    for module in policy.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In eval mode bitsandbytes would repack weights for newer CPUs; its backward pass is silently wrong then.
            module.support_avx512bf16_for_cpu = False
        # An adapter may bring dropout, but the policy that is updated must be the one that sampled.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0
    return policy.eval(), processor


def load_processor(model: str, *, revision: str | None = None, max_pixels: int | None = None) -> tuple:
    """(config, processor) of a model, without its weights. Args and Raises: as load_policy."""
    from transformers import AutoConfig, AutoProcessor
    from transformers.utils.import_utils import is_torchvision_greater_or_equal

    try:
        # Without trust_remote_code=False, transformers would ask on the terminal whether to run a checkpoint's code.
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"model={model!r} cannot be loaded: give a folder that holds config.json or the id of a model on the Hub "
            f"(with a network, or already downloaded), of InternVL one whose name ends in -HF. transformers says: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if config.model_type not in FAMILIES:
        raise unsupported(f"model={model!r} is of type {config.model_type!r}")
    if config.model_type == "smolvlm" and not is_torchvision_greater_or_equal("0.27"):
        # transformers would resize with Pillow, in 8 bits: too coarse to locate a token.
        raise PolicyError(
            f"model={model!r} is of type 'smolvlm', which needs torchvision 0.27 or newer: pip install -U torch "
            "torchvision, or give a model of another family"
        )
    try:
        processor = AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:  # ImportError: SmolVLM's processor needs num2words
        raise PolicyError(
            f"model={model!r} cannot be loaded: it must hold a tokenizer and a processor. transformers says: "
            f"{str(error)[:300]}"
        ) from error
    if max_pixels is not None:
        pictures_of(processor).set_max_pixels(processor, max_pixels)
    return config, processor


def four_bits(compute_dtype: torch.dtype):
    """transformers' settings: NF4 with double quantization for the language model's layers and no others."""
    from transformers import BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute_dtype}
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[f"(?!.*{LANGUAGE_MODULE}).*"], **nf4)


def with_adapter(policy, adapter, lora_rank, lora_alpha, lora_targets, load_in_4bit):
    """The policy with a stored or a new LoRA adapter that adds in place. Raises PolicyError as load_policy."""
    if not load_in_4bit:
        # Importing peft imports bitsandbytes, which warns that its optional CPU kernels are missing.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import LoraConfig, PeftModel, get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        if adapter is not None:
            policy.requires_grad_(False)
            warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
            try:
                return add_in_place(PeftModel.from_pretrained(policy, adapter, is_trainable=lora_rank > 0))
            except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, UserWarning) as error:
                raise PolicyError(
                    f"adapter={adapter!r} cannot be put on this model: give the adapter/ folder of a run with the same "
                    f"model. peft says: {str(error)[:300]}"
                ) from error
        if lora_targets == "language":
            layers = [name for name, module in base_model(policy).named_modules() if isinstance(module, nn.Linear)]
            names = sorted({name.rpartition(".")[2] for name in layers if re.search(LANGUAGE_MODULE, name)})
            lora_targets = rf".*{LANGUAGE_MODULE}.*\.({'|'.join(names)})"
        lora = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=lora_targets, task_type="CAUSAL_LM")
        return add_in_place(get_peft_model(policy, lora))


def choose_dtype(dtype: str, config, device: torch.device) -> torch.dtype:
    """The dtype asked for or, by "auto", the checkpoint's own.

    A GPU without bfloat16 (T4, V100) gets float16 instead, with a message. A checkpoint without a dtype gets the GPU's
    half precision, or float32 on the CPU.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    stored = config.dtype or config.get_text_config().dtype
    if device.type != "cuda":
        return stored or torch.float32
    # By default torch also counts emulated bfloat16, which a T4 has and which is many times slower.
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if stored in (None, torch.bfloat16) and not has_bfloat16:
        print("dtype: this GPU has no bfloat16, float16 is used instead", file=sys.stderr)
        return torch.float16
    return stored or torch.bfloat16


def portable_name(model: str) -> str:
    """How an adapter names its base model: as given, or relative to the repository's root when inside it."""
    folder, root = Path(model).resolve(), Path(__file__).resolve().parents[2]
    return folder.relative_to(root).as_posix() if folder.is_dir() and folder.is_relative_to(root) else model


def adapter_off(model):
    """A context in which a model runs without its adapter, if it has one."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def switched_to(model, name: str, config):
    """A context in which the model is the base (name "base") or the adapter."""
    return adapter_off(model) if config.adapter and name == "base" else nullcontext()


def adapter_folder(adapter: str) -> str:
    """The folder of an adapter: the one given, or a download of owner/name or owner/name@revision from the Hub.

    Only ADAPTER_FILES are downloaded, so that PEFT finds no pickle to fall back to. Raises PolicyError where there is
    no adapter, none in safetensors, or one of another kind than LoRA.
    """
    folder = Path(os.path.expanduser(adapter))
    if not os.path.isdir(folder):
        from huggingface_hub import snapshot_download

        name, _, revision = adapter.partition("@")
        try:
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(ADAPTER_FILES)))
        except (OSError, ValueError) as error:  # huggingface_hub's errors derive from these
            raise PolicyError(
                f"adapter={adapter!r:.200} is no folder, nor can it be downloaded: give the adapter/ folder of a run, "
                f"or a Hub id (owner/name, or owner/name@revision). huggingface_hub says: {str(error)[:300]}"
            ) from error
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise PolicyError(
                f"adapter={adapter!r:.200} holds no {name}: give the adapter/ folder of a run. Pickles "
                "(adapter_model.bin) can run code and are not read: convert them with PEFT where you trust them"
            )
    try:
        config = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
        kind, module = config.get("peft_type"), config.get("megatron_config")
    except (ValueError, AttributeError, RecursionError) as error:
        raise PolicyError(f"adapter={adapter!r:.200}: its {ADAPTER_FILES[0]} is not a JSON object: {error}") from error
    if kind != "LORA" or module:  # with a megatron_config, PEFT imports any module that the file names
        raise PolicyError(
            f"adapter={adapter!r:.200}: its {ADAPTER_FILES[0]} has peft_type {kind!r:.60} and megatron_config "
            f"{module!r:.60}; only LORA without the latter is read"
        )
    return str(folder)
