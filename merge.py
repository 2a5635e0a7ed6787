"""Merge an adapter into its base model: one plain model folder, which needs neither PEFT nor this repository.

    python merge.py --adapter runs/sayo/adapter --output merged/sayo
    python merge.py --model Qwen/Qwen3-VL-8B-Instruct --adapter runs/qwen8b/adapter --output merged/qwen8b

The sum W + BA is written in full precision (the checkpoint's own format), also when the adapter was trained on 4-bit
weights. Rounding the sum to 4 bits again would change what the model says: a LoRA update is far smaller than the steps
between 16 values, so most of it would be lost. Whoever wants 4 bits quantizes the merged folder when loading it.
"""

import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from config import DTYPES, EMBEDDED_POLICY, ConfigError, option, run_command
from loading import load_policy, load_processor, portable_name


@dataclass
class MergeConfig:
    """Merge an adapter into the full-precision weights of its base model."""

    adapter: str = option("runs/sayo/adapter", "Folder or Hub id of the adapter.")
    model: str | None = option(None, "Its base model, a folder or Hub id; by default the one that the adapter names.")
    revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    output: str = option("merged", "Folder to write; there must be none yet.")
    dtype: str = option("auto", "Number format of the merged weights; auto takes the checkpoint's own.", DTYPES)
    load_in_4bit: bool = option(False, "Not possible: the sum would be rounded to 4 bits again.")

    def problems(self) -> list[str]:
        found = []
        if self.dtype not in DTYPES:
            found.append(f"dtype={self.dtype!r}: valid are {', '.join(DTYPES)}")
        if self.load_in_4bit:
            found.append(
                "load_in_4bit: leave it out; merging happens into full-precision weights, because rounding the sum to "
                "4 bits again changes what the model says. Quantize the merged folder when you load it"
            )
        if Path(self.output).exists():
            found.append(f"output={self.output!r} exists: give another name, nothing is overwritten")
        return found


def merge(config: MergeConfig) -> Path:
    """Write the merged model and its processor to config.output, aside first and then renamed.

    Raises:
        ConfigError: no such adapter, one whose weights are not finite, or a base that is stored in quantized form.
        PolicyError: the base cannot be loaded, or the adapter does not fit it.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it has no part in this
    from peft import PeftConfig

    try:
        named = PeftConfig.from_pretrained(config.adapter)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"adapter={config.adapter!r}: give the adapter/ folder of a run, or a Hub id; {str(error)[:200]}"
        ) from error
    model, revision = config.model or named.base_model_name_or_path, config.revision
    if model is None:
        raise ConfigError(f"adapter={config.adapter!r} names no base model: give it with --model")
    if config.model is None:
        revision = revision or named.revision
    elif portable_name(config.model) != named.base_model_name_or_path:
        print(f"model={config.model!r}: the adapter was made for {named.base_model_name_or_path!r}", file=sys.stderr)
    model = EMBEDDED_POLICY if Path(model) == Path("data/tiny_policy") else model
    quantized = getattr(load_processor(model, revision=revision)[0], "quantization_config", None)
    if quantized is not None:
        raise ConfigError(
            f"model={model!r} is stored in quantized form; merging happens into full-precision weights, because "
            "rounding the sum again changes what the model says: give the checkpoint that it was made from"
        )
    policy, processor = load_policy(
        model, revision=revision, adapter=config.adapter, lora_rank=0, dtype=config.dtype, attn="eager", device="cpu"
    )
    if not all(weight.isfinite().all() for name, weight in policy.named_parameters() if "lora_" in name):
        raise ConfigError(f"adapter={config.adapter!r} holds weights that are not finite: take an earlier checkpoint's")
    final = Path(config.output)
    aside = final.with_name(final.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    with torch.no_grad():
        policy.merge_and_unload().save_pretrained(aside)
    processor.save_pretrained(aside)
    aside.rename(final)
    return final


def main(config: MergeConfig) -> None:
    print(f"merged model and processor -> {merge(config)}")


if __name__ == "__main__":
    run_command(MergeConfig, main)
