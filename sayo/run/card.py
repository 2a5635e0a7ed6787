"""The model card that a run writes beside its adapter: base model, data, settings, and what the run measured.

card.md beside this file is its template, in Jinja. Names of data and folders are those of strangers: they are shown as
code, in which Markdown and HTML mean nothing.
"""

import json
import re
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path

import regex

from sayo.model.loading import portable_name
from sayo.run.files import write_whole
from sayo.settings import read_jsonl
from sayo.show.tables import METRICS, markdown

PLACES = ("model", "adapter", "data", "eval_data")  # settings that may be paths
ALWAYS_SHOWN = """model revision load_in_4bit dtype data num_generations max_new_tokens temperature top_p
attention_weight format_weight accuracy_weight top_fraction attention_layers max_steps groups_per_step loss_type beta
optimizer learning_rate lora_rank lora_alpha lora_targets seed""".split()
NEVER_SHOWN = ("output_dir", "regions_folder", "allowed_folders", "resume", "report_to")
NEVER_SHOWN += ("system_prompt",)  # has its own place
# What is seen as nothing, or breaks a line; regex is installed by transformers.
UNSEEN = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Cc}\u2028\u2029\ufff9-\ufffb]")


def write_model_card(output_dir: Path, config, columns: dict, num_evaluated: int, num_examples: int) -> None:
    """Write adapter/README.md of a run's folder. Folders of this machine appear by their last name alone.

    Args:
        config: the run's train_rl.Config.
        columns: of the evaluation's table ("before", "after" and "difference", or "after" alone); {} without one.
        num_evaluated: examples of the evaluations. num_examples: of the training data.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData  # slow: not when a script is imported

    hub_model, title, results = _on_hub(config.model), visible(Path(output_dir).resolve().name), None
    if columns:
        about = {"task_type": "visual-question-answering"}
        about |= dict.fromkeys(("dataset_type", "dataset_name"), visible(place(config.evaluated_data)))
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
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md")),
        title=title if re.fullmatch(r"\w[\w .-]*", title) else code(title),
        base=f"[{name}](https://huggingface.co/{name})" if hub_model else code(name),
        with_attention=config.attention_weight > 0,
        arguments=python_text(name) + (f", revision={ascii(config.revision)}" if config.revision else ""),
        system_prompt="\n".join(f"    {visible(line)}" for line in config.system_prompt.split("\n")).rstrip(),
        load_in_4bit=config.load_in_4bit,
        measured=_table(columns),
        paired="difference" in columns,
        eval_data=code(place(config.evaluated_data)) if columns else None,
        num_evaluated=num_evaluated,
        num_examples=f"{num_examples:,}",
        data=code(place(config.data)),
        steps=_about_steps(output_dir, config),
        settings="\n".join(f"| `{entry}` | {code(str(value), True)} |" for entry, value in _settings(config).items()),
        versions=", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft")),
    )
    write_whole(Path(output_dir) / "adapter" / "README.md", str(card) + "\n")


def visible(text: str) -> str:
    """A line of text in which every character that is seen as nothing, or breaks the line, is written out."""
    return UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def code(text: str, in_table: bool = False) -> str:
    """A text as code in a line of Markdown, or in a cell of a table, where nothing of it is markup."""
    text = visible(text).replace("|", "\\|" if in_table else "|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    apart = " " if not text or ({text[0], text[-1]} & {"`", " "} and text.strip()) else ""  # Markdown drops one each
    return f"{ticks}{apart}{text}{apart}{ticks}"


def python_text(text: str) -> str:
    """A literal of Python that can be read."""
    return json.dumps(text) if text.isascii() and text.isprintable() else ascii(text)


def place(value: str) -> str:
    """A model or data set as a card may name it: Hub ids, scenes and folders of this repository as they are, of any
    other path the last part."""
    known = _on_hub(value) or value.partition(":")[0] == "scenes"
    name = value if known else portable_name(value)
    return name if known or (not Path(name).is_absolute() and ".." not in Path(name).parts) else Path(name).name


def _on_hub(value: str) -> bool:
    here = Path(value).exists() or (Path(__file__).parents[2] / value).exists()
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value) is not None and not here


def _settings(config) -> dict:
    """Names and values of the settings that are always shown, and of all that are not at their default."""
    shown = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        default = entry.default if entry.default is not MISSING else entry.default_factory()
        if entry.name not in NEVER_SHOWN and (entry.name in ALWAYS_SHOWN or value != default):
            shown[entry.name] = place(value) if entry.name in PLACES and value else value
    return shown


def _about_steps(output_dir: Path, config) -> str:
    rows = [row for _, row in read_jsonl(Path(output_dir) / "metrics.jsonl")]
    skipped = int(sum(row["skipped_updates"] for row in rows))
    text = f"{len(rows)} steps of {config.groups_per_step} questions with {config.num_generations} completions each"
    return text + (f"; {skipped} updates were skipped, because their gradients were not finite." if skipped else ".")


def _table(columns: dict) -> str:
    """The evaluations before and after as Markdown, empty without any."""
    shown = "{:.3f} [{:.3f}, {:.3f}]".format
    rows = [[metric, *(shown(*part[metric]) for part in columns.values())] for metric in METRICS if columns]
    return markdown(["", *columns], rows) if columns else ""
