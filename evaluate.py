"""Greedy accuracy, format, length and Target Attention Score of a policy, beside its base model.

Every number comes with its 95 % bootstrap interval. With --adapter both the base (the adapter switched off) and the
adapter answer the same questions, and the paired difference has its interval too: that is the one to look at.

    python evaluate.py --data scenes:heldout --limit 512
    python evaluate.py --data scenes:heldout --limit 512 --adapter runs/sayo/adapter --json result.json
    python evaluate.py --model Qwen/Qwen3-VL-4B-Instruct --adapter runs/qwen4b/adapter --benchmarks all \\
        --max_new_tokens 512 --output_dir evaluations/qwen4b

Benchmarks (data/benchmarks.py) come from the Hub or from --benchmark_root. In an output folder every answer is written
down as it comes, so that the same command goes on after a stop and asks nothing twice:

    OUTPUT_DIR/vstar/base.jsonl           a row for each example; base.settings.json: what it was made with
    OUTPUT_DIR/vstar/adapter.jsonl        the same of the adapter
    OUTPUT_DIR/results.json, table.txt    summaries
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from checkpoint import write_whole
from config import PolicyConfig, at_least, option, read_jsonl, run_command
from data.benchmarks import BENCHMARKS, PAPER_NINE, load_benchmark, local_copies, published
from data.examples import load_examples
from fingerprints import digest, example_names, hold_to_examples, hold_to_settings, loaded_from
from processes import wait_for_forwards
from reward import RewardConfig, extract_answer, score_group
from rollout import Group, check_prompts, sample_groups
from tables import (
    METRICS,
    bootstrap_interval,
    compare,
    format_overview,
    format_table,
    report,
    summarize,
    with_nan,
    without_nan,
)
from vlm import load_policy, resolve_layers

__all__ = [
    "METRICS",
    "bootstrap_interval",
    "compare",
    "evaluate_policy",
    "evaluate_shared",
    "format_table",
    "report",
    "summarize",
    "with_nan",
    "without_nan",
]

EXAMPLES_AT_A_TIME = 16  # pixels of so many pictures are in memory together
# What an answer does not depend on; everything else binds the rows of an output folder.
MAY_CHANGE = ("attention_weight", "format_weight", "accuracy_weight", "limit", "bad_rows", "sampling_tokens", "seed")
MAY_CHANGE += ("benchmarks", "benchmark_root", "output_dir", "json", "allowed_folders")
OF_DATA = ("data", "split", "box_format", "fields")  # benchmarks have their own


@dataclass
class EvaluateConfig(RewardConfig, PolicyConfig):
    """Evaluate a model, and its adapter if there is one, with greedy decoding."""

    data: str = option("scenes:heldout", "Examples: .jsonl, .parquet, a datasets folder, a Hub id, or scenes:heldout.")
    benchmarks: list[str] | None = option(
        None, f"Benchmarks instead of data: all (the paper's nine), or some of {', '.join(BENCHMARKS)}."
    )
    benchmark_root: list[str] | None = option(
        None, "Local copies of benchmarks: folders that hold them, or name=path; without it, the Hub."
    )
    benchmark_revisions: list[str] | None = option(
        None, "Branches, tags or commits of the Hub's copies, as name=revision: vstar=COMMIT mmstar=COMMIT."
    )
    output_dir: str | None = option(
        None, "Folder of rows and results; a stopped evaluation goes on there. Benchmarks: evaluations/MODEL."
    )
    max_new_tokens: int = option(
        64, "Longest completion in tokens; the paper's benchmark figures were taken with 2048."
    )
    json: str | None = option(None, "JSON file for the summary and every completion.")

    def problems(self) -> list[str]:
        found = super().problems() + at_least(self, 1, "max_new_tokens")
        if self.json and (not os.path.isdir(Path(self.json).absolute().parent) or os.path.isdir(self.json)):
            found.append(f"json={self.json!r}: give the name of a file in a folder that exists")
        for name in self.benchmarks or ():
            if name != "all" and name not in BENCHMARKS:
                near = difflib.get_close_matches(name.lower(), BENCHMARKS, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"valid: all, {', '.join(BENCHMARKS)}"
                found.append(f"benchmarks={name!r}: {hint}")
        if self.benchmarks and self.data != EvaluateConfig.data:
            found.append(f"data={self.data!r} beside benchmarks={self.benchmarks}: give one of them")
        if self.benchmark_root and self.benchmarks is None:
            found.append("benchmark_root without benchmarks: add --benchmarks all, or leave it out")
        for entry in self.benchmark_revisions or ():
            name, _, revision = entry.partition("=")
            if name not in self.benchmark_names() or not revision:
                found.append(f"benchmark_revisions={entry!r}: give name=revision of a benchmark that is evaluated")
        known = [name for name in self.benchmark_names() if name in BENCHMARKS]
        found += local_copies(known, self.benchmark_root or [])[1]
        if folder := self.folder():
            existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
            if not existing.is_dir() or not os.access(existing, os.W_OK):
                found.append(f"output_dir={str(folder)!r}: {str(existing)!r} is no folder that can be written to")
        return found

    def benchmark_names(self) -> list[str]:
        """The chosen benchmarks, each once; [] where data is evaluated."""
        names = [part for name in self.benchmarks or () for part in (PAPER_NINE if name == "all" else (name,))]
        return list(dict.fromkeys(names))

    def folder(self) -> Path | None:
        """Where rows are kept; None when they are not."""
        if self.output_dir or not self.benchmarks:
            return Path(self.output_dir) if self.output_dir else None
        parts = [re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in (self.model, self.adapter) if part]
        return Path("evaluations") / "+".join(parts)


def evaluate_policy(
    model,
    processor,
    examples: Sequence[dict],
    config,
    *,
    description: str = "evaluate",
    done: Sequence[dict] = (),
    save: Callable[[list[dict]], None] | None = None,
) -> list[dict]:
    """One row per example: id, text, the answer in it, the right one, and a number for each of METRICS.

    Args:
        config: anything with the fields of RewardConfig and PolicyConfig, and max_new_tokens.
        done: rows of other examples, which count in the progress bar and its running accuracy alone.
        save: is given the new rows, as they come.

    Returns:
        Rows in the order of the examples. `tas` is NaN for an example without boxes; `length` is in tokens, EOS left
        out.
    """
    rows, right = [], sum(row["accuracy"] for row in done)
    progress = tqdm(total=len(done) + len(examples), initial=len(done), desc=description, unit="example")
    for group, scores in answered(model, processor, examples, config):
        row = {name: float(scores[name][0]) for name in ("accuracy", "format", "tas", "tas_selected")}
        row["length"] = len(group.completions[0]) - (not group.truncated[0])
        row["truncated"] = float(group.truncated[0])
        row |= {"id": group.example.get("id"), "kind": group.example.get("kind"), "text": group.texts[0]}
        row |= {"said": extract_answer(group.texts[0]), "answer": group.example["answer"]}
        rows.append(row)
        right += row["accuracy"]
        progress.set_postfix(accuracy=f"{right / (len(done) + len(rows)):.3f}", refresh=False)
        progress.update()
        if save:
            save([row])
    progress.close()
    return rows


def answered(model, processor, examples: Sequence[dict], config) -> Iterator[tuple[Group, dict[str, Tensor]]]:
    """The greedy completion of every example, a group of one, with its scores; sampled some at a time."""
    for start in range(0, len(examples), EXAMPLES_AT_A_TIME):
        groups = sample_groups(
            model,
            processor,
            [examples[index] for index in range(start, min(start + EXAMPLES_AT_A_TIME, len(examples)))],
            num_generations=1,
            max_new_tokens=config.max_new_tokens,
            temperature=0,
            system_prompt=config.system_prompt,
            sampling_tokens=config.sampling_tokens,
        )
        for group in groups:
            yield group, score_group(model, group, config)


def evaluate_shared(model, processor, examples, config, accelerator, description: str) -> list[dict]:
    """evaluate_policy with the examples shared out over the processes; rows in the order of the examples."""
    share = range(accelerator.process_index, len(examples), accelerator.num_processes)
    rows = evaluate_policy(model, processor, Subset(examples, share), config, description=description)
    wait_for_forwards(model)
    return [row for _, row in sorted(gather_object(list(zip(share, rows, strict=True))), key=lambda pair: pair[0])]


# --- an evaluation that goes on after a stop ----------------------------------------------------------------------


def settings_of(config: EvaluateConfig, policy: str) -> dict:
    """What the rows of a policy ("base" or "adapter") depend on: fields, and the files of a local model and adapter."""
    left_out = MAY_CHANGE + (OF_DATA if config.benchmarks else ()) + (("adapter",) if policy == "base" else ())
    settings = {name: value for name, value in asdict(config).items() if name not in left_out}
    for name in ("model", "adapter"):
        folder = Path(config.policy_arguments(0)[name] or "")
        if name in settings and settings[name] and folder.is_dir():
            settings[f"files of {name}"] = digest(folder)
    return settings


def stored_rows(path: Path, settings: dict, questions: dict[str, str]) -> dict[str, dict]:
    """{id: row} of the examples that a former run answered; a line that was being written then is dropped.

    Raises:
        ConfigError: that run had other settings, or a question is another one now.
    """
    hold_to_settings(path, settings)
    if not path.exists():
        return {}
    lines = read_jsonl(path)
    write_whole(path, "".join(line + "\n" for line, _ in lines))
    rows = {row["id"]: row for row in with_nan([row for _, row in lines]) if row["id"] in questions}
    hold_to_examples(path, {identifier: row["asked"] for identifier, row in rows.items()}, questions)
    return rows


def evaluate_missing(model, processor, examples, config, path: Path, done: dict, questions: dict, description) -> dict:
    """{id: row} of all examples: those done, and the others asked now, each written to path as it comes."""
    missing = [index for index, identifier in enumerate(questions) if identifier not in done]
    with path.open("a", encoding="utf-8") as file:

        def save(rows: list[dict]) -> None:
            for row in rows:
                row["asked"] = questions[row["id"]]
            file.write("".join(json.dumps(without_nan(row), ensure_ascii=False) + "\n" for row in rows))
            file.flush()

        rows = evaluate_policy(
            model,
            processor,
            Subset(examples, missing),
            config,
            description=description,
            done=list(done.values()),
            save=save,
        )
    return done | {row["id"]: row for row in rows}


# --- command line -------------------------------------------------------------------------------------------------


def main(config: EvaluateConfig) -> None:
    names, folder = config.benchmark_names(), config.folder()
    if names:
        copies, _ = local_copies(names, config.benchmark_root or [])
        options = {"limit": config.limit, "bad_rows": config.bad_rows, "allowed_folders": config.allowed_folders}
        revisions = dict(entry.split("=", 1) for entry in config.benchmark_revisions or ())
        tasks = {
            name: load_benchmark(name, copy=copies.get(name), revision=revisions.get(name), **options) for name in names
        }
    else:
        tasks = {"data": load_examples(config.data, **config.data_arguments(), require_boxes=False)}
    policies = ["base", "adapter"] if config.adapter else ["base"]

    # What was answered before is read, and settings are compared, before anything long starts.
    questions, answered = {}, {}
    settings = {policy: settings_of(config, policy) for policy in policies} if folder else {}
    for name, examples in tasks.items() if folder else ():
        questions[name] = example_names(examples)
        for policy in policies:
            path = folder / name / f"{policy}.jsonl"
            answered[name, policy] = stored_rows(path, settings[policy], questions[name])
    if not folder or any(len(rows) < len(questions[name]) for (name, _), rows in answered.items()):
        model, processor = load_policy(**config.policy_arguments(lora_rank=0))
        model.requires_grad_(False)  # a frozen vision tower's features are kept from sampling to scoring
        resolve_layers(model, config.attention_layers)
        for name, policy in answered if folder else ():  # a Hub id, and "auto", may mean another today
            arguments = config.policy_arguments(0) | ({"adapter": None} if policy == "base" else {})
            loaded = {"loaded": loaded_from(arguments, model)}
            hold_to_settings(folder / name / f"{policy}.jsonl", settings[policy] | loaded)
        for examples in tasks.values():
            check_prompts(model, processor, examples, config, config.max_new_tokens)
        for name, examples in tasks.items():
            for policy in policies:
                with model.disable_adapter() if config.adapter and policy == "base" else nullcontext():
                    title = f"{name} {policy}" if names else policy
                    if not folder:
                        answered[name, policy] = evaluate_policy(model, processor, examples, config, description=title)
                        continue
                    if len(questions[name]) > len(examples):  # prompts that do not fit were dropped
                        questions[name] = example_names(examples)
                    path, done = folder / name / f"{policy}.jsonl", answered[name, policy]
                    done = {identifier: done[identifier] for identifier in questions[name] if identifier in done}
                    answered[name, policy] = evaluate_missing(
                        model, processor, examples, config, path, done, questions[name], title
                    )
    rows = {
        key: found if isinstance(found, list) else [found[identifier] for identifier in questions[key[0]]]
        for key, found in answered.items()
    }
    _tell(config, {name: {policy: rows[name, policy] for policy in policies} for name in tasks})


def _tell(config: EvaluateConfig, rows: dict[str, dict[str, list[dict]]]) -> None:
    """Print the tables, and write them and the summaries where they were asked for."""
    reports = {name: report(found["base"], found.get("adapter")) for name, found in rows.items()}
    counts = {name: len(found["base"]) for name, found in rows.items()}
    parts = []
    for name, columns in reports.items():
        what = name if config.benchmarks else config.data
        parts.append(
            f"{counts[name]} examples of {what}, greedy; mean [95 % bootstrap interval]\n{format_table(columns)}"
        )
        cut = max(columns[policy]["truncated"][0] for policy in rows[name])
        if cut > 0.05:
            parts.append(
                f"{cut:.0%} of the completions were cut off at max_new_tokens={config.max_new_tokens}: give more"
            )
    result = {"model": config.model, "adapter": config.adapter}
    if config.benchmarks:
        paper = {name: figures for name, figures in published(config.model).items() if name in reports}
        parts.append(format_overview(reports, counts, paper))
        if paper:
            parts.append("paper: SAYO, arXiv 2602.08241, by its own script, whose answer check is looser than ours")
        result["benchmarks"] = {
            name: {"examples": counts[name], "summary": columns}
            | ({"paper": dict(zip(("base", "SAYO"), paper[name], strict=True))} if name in paper else {})
            for name, columns in reports.items()
        }
        whole = result | {"rows": rows}
    else:
        result |= {"data": config.data, "summary": reports["data"]}
        whole = result | {"rows": rows["data"]}
    print("\n\n".join(parts) if config.benchmarks else "\n".join(parts))
    if folder := config.folder():
        write_whole(folder / "results.json", json.dumps(without_nan(result), indent=1, ensure_ascii=False))
        write_whole(folder / "table.txt", "\n\n".join(parts) + "\n")
        print(f"-> {folder}")
    if config.json:
        Path(config.json).write_text(json.dumps(without_nan(whole), indent=1, ensure_ascii=False), encoding="utf-8")
        print(f"-> {config.json}")


if __name__ == "__main__":
    run_command(EvaluateConfig, main)
