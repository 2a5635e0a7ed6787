"""Load a policy with its processor: 4-bit, LoRA, the probed attention function, and the ids that may be sampled."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.utils.import_utils import is_torchvision_greater_or_equal

from attention import PROBED_ATTENTION
from families import FAMILIES, LANGUAGE_MODULE, PolicyError, pictures_of, unsupported
from lora import adapter_folder, add_in_place
from prompts import base_model


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
    """Load a multimodal LLM with its processor, ready to sample, score and train.

    Args:
        model: a local folder or a Hub id, e.g. "data/tiny_policy" or "Qwen/Qwen3-VL-4B-Instruct".
        load_in_4bit: NF4 with double quantisation for the language model; vision tower, embeddings and head stay.
        lora_rank: rank of the LoRA adapter; 0 gives the plain model.
        adapter: folder or Hub id of a PEFT adapter to go on from (trainable) or, with lora_rank 0, only to use; see
            lora.adapter_folder.
        attn: "sdpa" (with the attention probe) or "eager" (for comparison; attention rewards need "sdpa").
        dtype: "float32", "bfloat16", "float16", or "auto" (the checkpoint's own, see choose_dtype). LoRA weights are
            float32 in any case.
        device: default is the first GPU if there is one, else the CPU.
        load_on: where the weights are put, if not on `device`, for which dtype="auto" chooses: a model that is to be
            shared out over several GPUs does not fit on one.
        lora_targets: "language" for the linear layers of the language model, "all-linear" for vision as well.
        max_pixels: pictures with more pixels are shrunk to this many before they become tokens.
        revision: branch, tag or commit of a Hub model.

    Returns:
        (model, processor), the model in eval mode; dropout is out in training mode, too.

    Raises:
        PolicyError (a ValueError): no such model, a family that is not supported, or an argument out of its range.
    """
    if lora_rank < 0:
        raise PolicyError(f"lora_rank={lora_rank}: give 1 or more, or 0 for the plain model")
    if attn not in ("sdpa", "eager"):
        raise PolicyError(f'attn={attn!r}: valid are "sdpa" and "eager"')
    if lora_targets not in ("language", "all-linear"):
        raise PolicyError(f'lora_targets={lora_targets!r}: valid are "language" and "all-linear"')
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise PolicyError(f'dtype={dtype!r}: valid are "auto", "float32", "bfloat16" and "float16"')
    adapter = adapter and adapter_folder(adapter)
    config, processor = load_processor(model, revision=revision, max_pixels=max_pixels)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    number_format = choose_dtype(dtype, config, device)
    quantization = None
    if load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=number_format,
            llm_int8_skip_modules=[f"(?!.*{LANGUAGE_MODULE}).*"],  # vision tower, projector and head keep their format
        )
    try:
        policy = AutoModelForImageTextToText.from_pretrained(
            model,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=number_format,
            attn_implementation=attn,
            quantization_config=quantization,
            device_map={"": torch.device(load_on or device)},
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise PolicyError(
            f"model={model!r} cannot be loaded: it must hold weights, as safetensors. Pickles can run code and are not "
            f"read: where you trust pytorch_model.bin, convert it by from_pretrained and save_pretrained. transformers "
            f"says: {str(error)[:300]}"
        ) from error
    for module in policy.modules():
        # In eval mode bitsandbytes packs the weights for newer CPUs, and from then on its backward is silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if attn == "sdpa":
        policy.set_attn_implementation({"text_config": PROBED_ATTENTION})
    if adapter is not None or lora_rank > 0:
        policy = _with_adapter(policy, adapter, lora_rank, lora_alpha, lora_targets, load_in_4bit)
        add_in_place(policy)
        for entry in policy.peft_config.values():  # what adapter_config.json will say
            entry.base_model_name_or_path, entry.revision = portable_name(model), revision
    for module in policy.modules():  # what is updated must be what sampled; an adapter may bring dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0
    return policy.eval(), processor


def load_processor(model: str, *, revision: str | None = None, max_pixels: int | None = None) -> tuple:
    """(config, processor) of a model, without its weights. Args and Raises: as load_policy."""
    try:
        # Said outright, or transformers would ask on the terminal whether to run a checkpoint's own code.
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
        # transformers then resizes with Pillow, in 8 bits: too coarse to tell where a token comes from.
        raise PolicyError(
            f"model={model!r} is of type 'smolvlm', which needs torchvision 0.27 or newer: pip install -U torch "
            "torchvision, or give a model of another family"
        )
    try:
        processor = AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:  # ImportError: SmolVLM's processor wants num2words
        raise PolicyError(
            f"model={model!r} cannot be loaded: it must hold a tokenizer and a processor. transformers says: "
            f"{str(error)[:300]}"
        ) from error
    if max_pixels is not None:
        pictures_of(processor).set_max_pixels(processor, max_pixels)
    return config, processor


def _with_adapter(policy, adapter, lora_rank, lora_alpha, lora_targets, load_in_4bit):
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
                return PeftModel.from_pretrained(policy, adapter, is_trainable=lora_rank > 0)
            except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, UserWarning) as error:
                raise PolicyError(
                    f"adapter={adapter!r} cannot be put on this model: give the adapter/ folder of a run with the same "
                    f"model. peft says: {str(error)[:300]}"
                ) from error
        if lora_targets == "language":
            lora_targets = rf".*{LANGUAGE_MODULE}.*\.(" + "|".join(sorted(_language_linears(policy))) + ")"
        lora = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=lora_targets, task_type="CAUSAL_LM")
        return get_peft_model(policy, lora)


def choose_dtype(dtype: str, config, device: torch.device) -> torch.dtype:
    """The number format of weights and arithmetic: the one that is asked for or, by "auto", the checkpoint's own.

    A card without bfloat16 (T4, V100) gets float16 instead of the checkpoint's bfloat16, and says so. A checkpoint
    that names no format gets the card's half precision on a GPU, float32 on the CPU.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    stored = config.dtype or config.get_text_config().dtype
    if device.type != "cuda":
        return stored or torch.float32
    # By default torch also counts emulated bfloat16, which a T4 has and which is many times slower than float16.
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if stored in (None, torch.bfloat16) and not has_bfloat16:
        print("dtype: this GPU has no bfloat16, float16 is used instead", file=sys.stderr)
        return torch.float16
    return stored or torch.bfloat16


def portable_name(model: str) -> str:
    """How an adapter names its base model: as it was given, but a folder of this repository from its root."""
    folder, root = Path(model).resolve(), Path(__file__).resolve().parent
    return folder.relative_to(root).as_posix() if folder.is_dir() and folder.is_relative_to(root) else model


def _language_linears(model: nn.Module) -> set[str]:
    return {
        name.rsplit(".", 1)[-1]
        for name, module in base_model(model).named_modules()
        if re.search(LANGUAGE_MODULE, name) and isinstance(module, nn.Linear)
    }


def eos_token_ids(model: nn.Module, processor) -> set[int]:
    """Ids that end a completion: those of the generation config and the tokenizer's own."""
    configured = base_model(model).generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    return (ids | {processor.tokenizer.eos_token_id}) - {None}


def suppressed_token_ids(model: nn.Module, processor) -> Tensor:
    """Ids that must never be sampled: picture and video placeholders, their delimiters (a sampled image token breaks
    the next forward), and rows of the head that belong to no token. Shape (K,)."""
    base, tokenizer = base_model(model), processor.tokenizer
    vision = re.compile(r"image|img|vision|video|<row_", re.IGNORECASE)
    special = {token for token in tokenizer.all_special_tokens if vision.search(token)}
    special |= {
        str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and vision.search(str(token))
    }
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {getattr(base.config, name, None) for name in names} - {None}
    ids |= set(tokenizer.convert_tokens_to_ids(sorted(special)))
    ids |= set(range(len(tokenizer), base.get_output_embeddings().weight.shape[0]))
    return torch.tensor(sorted(ids - eos_token_ids(model, processor)), dtype=torch.long)
