"""Greedy accuracy, format, length and Target Attention Score of a policy, beside its base model.

Every number comes with its 95 % bootstrap interval. With --adapter both the base (the adapter switched off) and the
adapter answer the same questions, and the paired difference has its interval too: that is the one to look at.

    python evaluate.py --data scenes:heldout --limit 512
    python evaluate.py --data scenes:heldout --limit 512 --adapter runs/sayo/adapter --json result.json
    python evaluate.py --model Qwen/Qwen3-VL-4B-Instruct --adapter runs/qwen4b/adapter --benchmarks all \\
        --max_new_tokens 512 --output_dir evaluations/qwen4b

Benchmarks (sayo/examples/benchmarks.py) come from the Hub or from --benchmark_root. An output folder keeps every answer
as it comes, so that the same command continues after a stop and repeats nothing:

    OUTPUT_DIR/vstar/base.jsonl           a row for each example; base.settings.json: the settings that it comes from
    OUTPUT_DIR/vstar/adapter.jsonl        the same of the adapter
    OUTPUT_DIR/results.json, table.txt    summaries
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from reward import RewardConfig, extract_answer, score_group, scored_tokens
from rollout import Group, group_generator, sample_groups
from sayo.examples.benchmarks import BENCHMARKS, PAPER_NINE, load_benchmark, local_copies, published
from sayo.examples.load import DataError, load_examples
from sayo.model.forward import check_layers
from sayo.model.loading import load_policy, switched_to
from sayo.model.prompts import check_prompts
from sayo.run.config import EXAMPLES_AT_A_TIME, PolicyConfig
from sayo.run.files import step_of, stored_json, write_whole
from sayo.run.processes import read_by_main, sync_forwards
from sayo.run.provenance import digest, ensure_same_examples, ensure_same_settings, example_names, loaded_from
from sayo.settings import ConfigError, option, read_jsonl, run_command
from sayo.show import tables
from sayo.show.tables import METRICS, compare_policies, format_table, nan_to_none, none_to_nan

# What an answer does not depend on; everything else binds the rows of an output folder.
MAY_CHANGE = ("attention_weight", "format_weight", "accuracy_weight", "limit", "bad_rows", "sampling_tokens", "seed")
MAY_CHANGE += ("benchmarks", "benchmark_root", "output_dir", "json", "allowed_folders")
OF_DATA = ("data", "split", "box_format", "fields")  # benchmarks have their own


@dataclass
class EvaluateConfig(RewardConfig, PolicyConfig):
    """Evaluate a model, and its adapter if there is one, with greedy decoding."""

    data: str = option("scenes:heldout", "Examples: .jsonl, .parquet, a datasets folder, a Hub id, or scenes:heldout.")
    benchmarks: list[str] | None = option(None, f"Benchmarks: all (the paper's nine), or {', '.join(BENCHMARKS)}.")
    benchmark_root: list[str] | None = option(None, "Local copies: folders that hold them, or name=path; else the Hub.")
    benchmark_revisions: list[str] | None = option(None, "Revisions of Hub benchmarks, as name=revision: vstar=COMMIT.")
    output_dir: str | None = option(None, "Folder of answers, resumed there; of benchmarks: evaluations/MODEL.")
    max_new_tokens: int = option(64, "Maximum completion length in tokens; the paper's benchmarks: 2048.", at_least=1)
    num_samples: int = option(1, "Completions per example; above 1 sampled at temperature, for pass@k.", at_least=1)
    top_p: float = option(0.9, "Nucleus sampling, where num_samples is above 1.", above=0, at_most=1)
    json: str | None = option(None, "JSON file for the summary and every completion.")

    def problems(self) -> list[str]:
        found = super().problems()
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
    save: Callable[[dict], None] | None = None,
) -> list[dict]:
    """One row per example: id, text, the answer in it, the right one, and a number for each of METRICS.

    Args:
        config: anything with the fields of RewardConfig and PolicyConfig, and max_new_tokens.
        done: rows of other examples, which count in the progress bar and its running accuracy alone.
        save: is given each new row as it comes.

    Returns:
        Rows in the order of the examples. `tas` is NaN for an example without boxes; `length` is in tokens, EOS left
        out. With num_samples above 1, numbers are means over the samples, `texts` and `right` hold each.
    """
    rows, right = [], sum(row["accuracy"] for row in done)
    counts = {"initial": len(done), "total": len(done) + len(examples)}
    progress = tqdm(answered(model, processor, examples, config), description, unit="example", **counts)
    for group, scores in progress:
        row = {name: float(scores[name].nanmean()) for name in ("accuracy", "format", "tas", "tas_selected")}
        row |= {"length": group.lengths[0], "truncated": float(group.truncated[0])}
        if (count := len(group.texts)) > 1:
            row |= {"length": sum(group.lengths) / count, "truncated": sum(group.truncated) / count}
            row |= {"texts": group.texts, "right": scores["accuracy"].tolist()}
        row |= {"id": group.example.get("id"), "kind": group.example.get("kind"), "text": group.texts[0]}
        row |= {"said": extract_answer(group.texts[0]), "answer": group.example["answer"]}
        rows.append(row)
        right += row["accuracy"]
        progress.set_postfix(accuracy=f"{right / (len(done) + len(rows)):.3f}", refresh=False)
        if save:
            save(row)
    return rows


def answered(model, processor, examples: Sequence[dict], config) -> Iterator[tuple[Group, dict[str, Tensor]]]:
    """The completions of every example, a group, with its scores: one greedy one, or num_samples sampled ones."""
    options = {name: getattr(config, name) for name in ("max_new_tokens", "system_prompt", "sampling_tokens")}
    options |= {"num_generations": getattr(config, "num_samples", 1), "temperature": 0}
    if is_sampled := options["num_generations"] > 1:
        options |= {"temperature": config.temperature, "top_p": config.top_p}
    for start in range(0, len(examples), EXAMPLES_AT_A_TIME):
        batch = [examples[index] for index in range(start, min(start + EXAMPLES_AT_A_TIME, len(examples)))]
        if is_sampled:
            options["generators"] = [group_generator(config.seed, "evaluate", example.get("id")) for example in batch]
        for group in sample_groups(model, processor, batch, **options):
            yield group, score_group(model, group, config)


def evaluate_shared(model, processor, examples, config, accelerator, description: str) -> list[dict]:
    """evaluate_policy with the examples shared out over the processes; rows in the order of the examples."""
    share = range(accelerator.process_index, len(examples), accelerator.num_processes)
    rows = evaluate_policy(model, processor, Subset(examples, share), config, description=description)
    sync_forwards(model)
    return [row for _, row in sorted(gather_object(list(zip(share, rows, strict=True))), key=lambda pair: pair[0])]


@dataclass
class Answer:
    """What a policy said about an example and all that was measured about it; n tokens, the closing EOS left out."""

    completion: Tensor  # (n,) ids
    tokens: list[str]  # n texts, which join to all that was said
    entropies: Tensor  # (n,) nats
    target_attention: Tensor  # (n,) mean over heads, layers and covered image tokens
    image_attention: Tensor  # (n,) mean over heads, layers and all image tokens
    scored: list[int]  # the tokens that the attention reward looks at
    scores: dict[str, float]  # the rewards and TAS of reward.score_group
    text: str
    truncated: bool
    coverage: Tensor  # (N,) of the example's image tokens


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; together they are the text of all.

    Where a character is several tokens, the last of them has it and the others have nothing.
    """
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        unfinished = text.endswith("\ufffd") and end < len(ids)
        texts.append("" if unfinished else text[len(done) :])
        done = done if unfinished else text
    return texts


@torch.no_grad()
def answer_examples(model, processor, examples: Sequence[dict], config, description: str = "answers") -> list[Answer]:
    """The greedy completion of every example, scored as in training; config as in evaluate_policy."""
    answers, found = [], answered(model, processor, examples, config)
    for group, values in tqdm(found, description, total=len(examples), unit="example"):
        length, statistics = group.lengths[0], group.statistics
        completion, entropies = group.completions[0][:length], statistics.entropies[0][:length].cpu()
        answer = Answer(
            completion=completion,
            tokens=token_texts(processor.tokenizer, completion.tolist()),
            entropies=entropies,
            target_attention=statistics.target_attention[0][:length].cpu(),
            image_attention=statistics.image_attention[0][:length].cpu(),
            scored=scored_tokens(completion, entropies, config).tolist() if length else [],
            scores={name: float(value[0]) for name, value in values.items()},
            text=group.texts[0],
            truncated=group.truncated[0],
            coverage=group.prompt.coverage,
        )
        answers.append(answer)
    return answers


def answers_by_policy(model, processor, examples: Sequence[dict], config) -> dict[str, list[Answer]]:
    """Answers by policy: those of the base, and of the adapter if there is one."""
    answers = {}
    for name in ("base", "adapter")[: 1 + bool(config.adapter)]:
        with switched_to(model, name, config):
            answers[name] = answer_examples(model, processor, examples, config, name)
    return answers


class BeforeAfter:
    """The evaluations before and after a training run, each done once however often the run is resumed.

    Args:
        run: the opened run folder, which holds their files. examples: None for no evaluation.
    """

    def __init__(self, run, model, processor, examples, config, accelerator):
        self.run, self.examples, self.config, self.accelerator = run, examples, config, accelerator
        self._evaluate = partial(evaluate_shared, model, processor, examples, config, accelerator)
        stored = read_by_main(self._stored, accelerator.is_main_process)
        self._before, self._after = stored if examples else (None, None)
        lost = "resume: evaluation_before.json is missing or damaged: the end has nothing to be compared with"
        self.notes = [lost] if examples and self._before is None and run.checkpoint else []

    def _stored(self) -> tuple[list[dict] | None, list[dict] | None]:
        """Rows that a former start of the run wrote; None for an evaluation that is still to be done."""
        run, max_steps = self.run, self.config.max_steps
        if not run.former and not run.checkpoint:
            return None, None
        before, after = (stored_json(run.folder / name) for name in ("evaluation_before.json", "evaluation.json"))
        is_at_the_end = run.checkpoint is not None and step_of(run.checkpoint) == max_steps
        if not is_at_the_end or not isinstance(after, dict) or after.get("step") != max_steps:
            after = {}
        rows = before, after["rows"].get("after") if isinstance(after.get("rows"), dict) else None
        return tuple(none_to_nan(part) if isinstance(part, list) and all(map(_is_row, part)) else None for part in rows)

    def _write(self, name: str, value) -> None:
        text = json.dumps(nan_to_none(value))
        self.run.write_with_retries(name, lambda: write_whole(self.run.folder / name, text))

    def before(self) -> None:
        """Evaluate the policy that a new run starts from, and print the table."""
        if not self.examples or self._before is not None or self.run.checkpoint:
            return
        self._before = self._evaluate(f"before, {self.config.evaluated_data}")
        if self.accelerator.is_main_process:
            self._write("evaluation_before.json", self._before)
            print(format_table({"before": compare_policies(self._before)["base"]}))

    def after(self) -> dict:
        """Evaluate the trained policy; the columns of the table that is printed, {} without an evaluation."""
        if not self.examples:
            return {}
        if self._after is None:
            self._after = self._evaluate(f"after, {self.config.evaluated_data}")
        columns = tables.before_and_after(self._before, self._after)
        if self.accelerator.is_main_process:
            result = {"step": self.config.max_steps, "summary": columns, "rows": {"after": self._after}}
            self._write("evaluation.json", result)
            print(table_of(self.config.evaluated_data, len(self._after), columns))
        return columns


def load_held_out(config):
    """The examples that a training run evaluates before and after, or None."""
    if config.evaluated_data == "none":
        return None
    box_format = config.box_format if config.eval_box_format == "same" else config.eval_box_format
    options = {"split": config.eval_split, "limit": config.eval_limit, "box_format": box_format}
    options = config.data_arguments() | options | {"fields": config.evaluated_fields}
    try:
        return load_examples(config.evaluated_data, **options, require_boxes=False)
    except DataError as error:  # in the names of the flags that these data have
        raise DataError(re.sub("--(box_format|fields)", r"--eval_\1", str(error))) from error


def table_of(data: str, count: int, columns: dict, how: str = "greedy") -> str:
    return f"{count} examples of {data}, {how}; mean [95 % bootstrap interval]\n{format_table(columns)}"


def _is_row(value) -> bool:
    return isinstance(value, dict) and {"id", *METRICS} <= value.keys()


# --- an evaluation that is continued ------------------------------------------------------------------------------


def settings_of(config: EvaluateConfig, policy: str) -> dict:
    """What the rows of a policy ("base" or "adapter") depend on: fields, and the files of a local model and adapter."""
    left_out = {*MAY_CHANGE, *(OF_DATA if config.benchmarks else ()), *(("adapter",) if policy == "base" else ())}
    left_out = left_out - {"seed"} if config.num_samples > 1 else left_out | {"top_p"}
    settings = {name: value for name, value in asdict(config).items() if name not in left_out}
    for name in ("model", "adapter"):
        folder = Path(config.policy_arguments(0)[name] or "")
        if name in settings and settings[name] and folder.is_dir():
            settings[f"files of {name}"] = digest(folder)
    return settings


def stored_rows(path: Path, settings: dict, questions: dict[str, str]) -> dict[str, dict]:
    """{id: row} of the examples that a former run answered; ConfigError for other settings or changed questions."""
    ensure_same_settings(path, settings, asdict(EvaluateConfig()))
    if not path.exists():
        return {}
    lines = [(line, row) for line, row in read_jsonl(path, skip_damage=True) if _is_row(row) and "asked" in row]
    write_whole(path, "".join(line + "\n" for line, _ in lines))
    rows = {row["id"]: row for row in none_to_nan([row for _, row in lines]) if row["id"] in questions}
    ensure_same_examples(path, {identifier: row["asked"] for identifier, row in rows.items()}, questions)
    return rows


def evaluate_missing(model, processor, examples, config, path: Path, done: dict, title: str) -> list[dict]:
    """Rows of all examples in their order: those done, and the others, each appended to path as it comes."""
    questions = example_names(examples)
    done = {identifier: done[identifier] for identifier in questions if identifier in done}
    missing = [index for index, identifier in enumerate(questions) if identifier not in done]
    with path.open("a", encoding="utf-8") as file:

        def save(row: dict) -> None:
            row["asked"] = questions[row["id"]]
            file.write(json.dumps(nan_to_none(row), ensure_ascii=False) + "\n")
            file.flush()

        options = {"description": title, "done": list(done.values()), "save": save}
        rows = evaluate_policy(model, processor, Subset(examples, missing), config, **options)
    done |= {row["id"]: row for row in rows}
    return [done[identifier] for identifier in questions]


# --- command line -------------------------------------------------------------------------------------------------


def load_tasks(config: EvaluateConfig) -> dict:
    """Examples by the name of their benchmark, or {"data": ...}."""
    names = config.benchmark_names()
    if not names:
        return {"data": load_examples(config.data, **config.data_arguments(), require_boxes=False)}
    copies, _ = local_copies(names, config.benchmark_root or [])
    revisions = dict(entry.split("=", 1) for entry in config.benchmark_revisions or ())
    options = {"limit": config.limit, "bad_rows": config.bad_rows, "allowed_folders": config.allowed_folders}
    return {key: load_benchmark(key, copy=copies.get(key), revision=revisions.get(key), **options) for key in names}


def main(config: EvaluateConfig) -> None:
    tasks, folder = load_tasks(config), config.folder()
    results = [folder / name for name in ("results.json", "table.txt")] if folder else []
    if (taken := [str(path) for path in results if path.exists()]) and not any(folder.glob("*/*.settings.json")):
        raise ConfigError(f"{', '.join(taken)}: no evaluation wrote this; give another --output_dir, or move it")
    policies = ("base", "adapter")[: 1 + bool(config.adapter)]
    paths = {(name, policy): folder and folder / name / f"{policy}.jsonl" for name in tasks for policy in policies}
    # Settings are compared, and former answers read, before anything long starts.
    settings = {policy: settings_of(config, policy) for policy in policies} if folder else {}
    questions = {name: example_names(examples) for name, examples in tasks.items()} if folder else {}
    stored = {key: stored_rows(path, settings[key[1]], questions[key[0]]) for key, path in paths.items() if path}
    rows = {}
    if stored and all(len(found) == len(questions[name]) for (name, _), found in stored.items()):
        rows = {key: [found[identifier] for identifier in questions[key[0]]] for key, found in stored.items()}
    else:
        model, processor = load_policy(**config.policy_arguments(lora_rank=0))
        model.requires_grad_(False)  # a frozen vision tower's features are kept from sampling to scoring
        check_layers(model, config.attention_layers)
        for (_, policy), path in paths.items() if folder else ():  # a Hub id, and "auto", may mean another today
            arguments = config.policy_arguments(0) | ({"adapter": None} if policy == "base" else {})
            loaded = settings[policy] | {"loaded": loaded_from(arguments, model)}
            ensure_same_settings(path, loaded, asdict(EvaluateConfig()))
        for examples in tasks.values():
            check_prompts(model, processor, examples, config, config.max_new_tokens)  # may drop some
        for (name, policy), path in paths.items():
            title = f"{name} {policy}" if config.benchmarks else policy
            with switched_to(model, policy, config):
                parts = model, processor, tasks[name], config
                if path:
                    rows[name, policy] = evaluate_missing(*parts, path, stored[name, policy], title)
                else:
                    rows[name, policy] = evaluate_policy(*parts, description=title)
    write_results(config, {name: {policy: rows[name, policy] for policy in policies} for name in tasks})


def write_results(config: EvaluateConfig, rows: dict[str, dict[str, list[dict]]]) -> None:
    """Print the tables, and write them and the summaries where they were asked for."""
    reports = {name: compare_policies(found["base"], found.get("adapter")) for name, found in rows.items()}
    counts = {name: len(found["base"]) for name, found in rows.items()}
    parts = []
    for name, columns in reports.items():
        how = (
            f"{config.num_samples} samples at temperature {config.temperature}" if config.num_samples > 1 else "greedy"
        )
        parts.append(table_of(name if config.benchmarks else config.data, counts[name], columns, how))
        for policy, own in rows[name].items():
            columns[policy] |= tables.pass_at_k(own)
            shown = [
                f"{key} {mean:.3f} [{low:.3f}, {high:.3f}]" for key, (mean, low, high) in tables.pass_at_k(own).items()
            ]
            parts += [f"{policy}: {', '.join(shown)}"] * bool(shown)
        cut = max(columns[policy]["truncated"][0] for policy in rows[name])
        limit = f"max_new_tokens={config.max_new_tokens}"
        parts += [f"{cut:.0%} of the completions were cut off at {limit}: give more"] * (cut > 0.05)
    result = {"model": config.model, "adapter": config.adapter}
    if config.benchmarks:
        paper = {name: figures for name, figures in published(config.model).items() if name in reports}
        parts.append(tables.format_overview(reports, counts, paper))
        if paper:
            parts.append("paper: SAYO, arXiv 2602.08241, by its own script, whose answer check is looser than ours")
        found = {name: {"examples": counts[name], "summary": columns} for name, columns in reports.items()}
        for name, figures in paper.items():
            found[name]["paper"] = dict(zip(("base", "SAYO"), figures, strict=True))
        result["benchmarks"] = found
    else:
        result |= {"data": config.data, "summary": reports["data"]}
    whole = result | {"rows": rows if config.benchmarks else rows["data"]}
    print("\n\n".join(parts) if config.benchmarks else "\n".join(parts))
    if folder := config.folder():
        write_whole(folder / "results.json", json.dumps(nan_to_none(result), indent=1, ensure_ascii=False))
        write_whole(folder / "table.txt", "\n\n".join(parts) + "\n")
        print(f"-> {folder}")
    if config.json:
        Path(config.json).write_text(json.dumps(nan_to_none(whole), indent=1, ensure_ascii=False), encoding="utf-8")
        print(f"-> {config.json}")


if __name__ == "__main__":
    run_command(EvaluateConfig, main)
