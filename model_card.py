"""The model card that a run writes beside its adapter: base model, data, settings, and what the run measured."""

import re
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path

from checkpoint import write_whole
from config import read_jsonl
from evaluate import METRICS
from loading import portable_name

PLACES = ("model", "adapter", "data", "eval_data")  # settings that may be paths
ALWAYS_SHOWN = (
    *(
        "model",
        "revision",
        "load_in_4bit",
        "dtype",
        "data",
        "num_generations",
        "max_new_tokens",
        "temperature",
        "top_p",
    ),
    *("attention_weight", "format_weight", "accuracy_weight", "top_fraction", "attention_layers", "max_steps"),
    *("groups_per_step", "loss_type", "beta", "optimizer", "learning_rate", "lora_rank", "lora_alpha", "lora_targets"),
    "seed",
)
NEVER_SHOWN = ("output_dir", "regions_folder", "resume", "report_to", "system_prompt")  # the last has its own place

CARD = """# {title}

A LoRA adapter for {base}, {trained}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained({arguments}, dtype="auto")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
processor = AutoProcessor.from_pretrained({arguments})
```

{prompt}
{quantized}
## Measured

{measured}

## Data

{num_examples} examples of `{data}`. {steps}

## Settings

What is not listed had its default.

| setting | value |
|---|---|
{settings}

Made with {versions}.
"""

WITH_ATTENTION = """trained with GRPO and an attention reward ([SAYO, arXiv
2602.08241](https://arxiv.org/abs/2602.08241)): the tokens of an answer that the model is least certain of are rewarded
for looking at the part of the picture that the question is about."""
WITHOUT_ATTENTION = "trained with GRPO, without the attention reward of SAYO (`attention_weight` was 0)."


def write_model_card(
    output_dir: Path, config, columns: dict, eval_data: str | None, num_evaluated: int, num_examples: int
) -> None:
    """Write adapter/README.md of a run's folder. Folders of this machine appear by their last name alone.

    Args:
        config: the run's train_rl.Config.
        columns: what evaluate.report gives for the run ("before", "after" and "difference", or "after" alone); empty
            when it made no evaluation.
        eval_data: what was evaluated, with num_evaluated examples. num_examples: of the training data.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData  # slow: not when a script is imported

    hub_model, title = _on_hub(config.model), Path(output_dir).resolve().name
    results = None
    if columns:
        about = {"task_type": "visual-question-answering", "dataset_type": place(eval_data)}
        about["dataset_name"] = place(eval_data)
        means = {name: round(columns["after"][name][0], 4) for name in ("accuracy", "tas")}
        results = [EvalResult(metric_type=name, metric_value=mean, **about) for name, mean in means.items()]
    data = ModelCardData(
        base_model=config.model if hub_model else None,
        base_model_relation="adapter" if hub_model else None,
        library_name="peft",
        pipeline_tag="image-text-to-text",
        datasets=config.data if _on_hub(config.data) else None,
        tags=["lora", "grpo", "sayo", "visual-attention", "arxiv:2602.08241"],
        model_name=title if results else None,
        eval_results=results,
    )
    name = config.model if hub_model else place(config.model)
    revision = f", revision={config.revision!r}" if config.revision else ""
    text = CARD.format(
        title=title,
        base=f"[{name}](https://huggingface.co/{name})" if hub_model else f"`{name}`",
        trained=WITH_ATTENTION if config.attention_weight else WITHOUT_ATTENTION,
        arguments=f'"{name}"{revision}',
        prompt=_about_prompt(config.system_prompt),
        quantized=_about_quantization(config.load_in_4bit),
        measured=_results(columns, eval_data, num_evaluated),
        num_examples=f"{num_examples:,}",
        data=place(config.data),
        steps=_about_steps(output_dir, config),
        settings="\n".join(f"| `{entry}` | `{value}` |" for entry, value in _settings(config).items()),
        versions=", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft")),
    )
    write_whole(Path(output_dir) / "adapter" / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")))


def place(value: str) -> str:
    """A model or data set as a card may name it: Hub ids, scenes and folders of this repository as they are, of any
    other path the last part."""
    known = _on_hub(value) or value.partition(":")[0] == "scenes"
    name = value if known else portable_name(value)
    return name if known or (not Path(name).is_absolute() and ".." not in Path(name).parts) else Path(name).name


def _on_hub(value: str) -> bool:
    here = Path(value).exists() or (Path(__file__).parent / value).exists()
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value) is not None and not here


def _settings(config) -> dict:
    """Names and values of what is worth saying: the important ones, and all that are not at their default."""
    shown = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        default = entry.default if entry.default is not MISSING else entry.default_factory()
        if entry.name not in NEVER_SHOWN and (entry.name in ALWAYS_SHOWN or value != default):
            shown[entry.name] = place(value) if entry.name in PLACES and value else value
    return shown


def _about_prompt(system_prompt: str) -> str:
    if not system_prompt:
        return "It was trained without a system turn."
    quoted = "\n".join(f"> {line}" for line in system_prompt.splitlines())
    return f"It was trained with this system turn, and wants it:\n\n{quoted}"


def _about_quantization(load_in_4bit: bool) -> str:
    if not load_in_4bit:
        return ""
    return (
        "\nThe language model was in 4 bits (NF4, double quantisation) while the adapter was trained. On "
        "full-precision weights,\nwhere it can be merged, what it says differs a little.\n"
    )


def _about_steps(output_dir: Path, config) -> str:
    rows = [row for _, row in read_jsonl(Path(output_dir) / "metrics.jsonl")]
    skipped = int(sum(row["skipped_updates"] for row in rows))
    text = f"{len(rows)} steps of {config.groups_per_step} questions with {config.num_generations} completions each"
    return (
        f"{text}; {skipped} updates were skipped, because their gradients were not finite." if skipped else f"{text}."
    )


def _results(columns: dict, eval_data: str | None, num_evaluated: int) -> str:
    """The evaluations before and after as a table, or a sentence that there were none."""
    if not columns:
        return "The run that made this adapter made no evaluation; nothing is known about what it changed."
    rows = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for metric in METRICS:
        cells = [
            f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in (part[metric] for part in columns.values())
        ]
        rows.append(f"| {metric} | {' | '.join(cells)} |")
    paired = " The difference is between answers to the same question." if "difference" in columns else ""
    return (
        f"{num_evaluated} examples of `{place(eval_data)}`, greedy; mean [95 % bootstrap interval].{paired}\n`tas` is "
        "the Target Attention Score (0.5 is no preference for the region), `tas_selected` that of the uncertain\n"
        "tokens.\n\n"
    ) + "\n".join(rows)
