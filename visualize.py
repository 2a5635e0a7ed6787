"""See a run: a report to explore, where a policy looks before and after training, the paper's analyses, and curves.

python visualize.py --adapter runs/sayo/adapter --data scenes:heldout --limit 50 --out report.html
python visualize.py --adapter runs/sayo/adapter --data scenes:heldout --index 0 1 2 --out look.png
python visualize.py --adapter runs/sayo/adapter --data scenes:heldout --plots analysis
python visualize.py --evaluations 4b.json 8b.json --plots analysis
python visualize.py --metrics runs/a/metrics.jsonl runs/b/metrics.jsonl --plots analysis
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from evaluate import answers_by_policy
from reward import RewardConfig, score_group, scored_tokens
from rollout import sample_group
from sayo.examples.load import load_examples
from sayo.model.forward import check_layers
from sayo.model.loading import switched_to
from sayo.model.prompts import check_prompts, example_images, token_cells
from sayo.run.config import PolicyConfig
from sayo.settings import ConfigError, option, run_command, writable
from sayo.show.heat import paint_tokens, plot_attention
from sayo.show.plots import both, plot_curves, plot_entropy, plot_generation, plot_tas_accuracy, read_evaluations
from sayo.show.report import collect, page
from vlm import attention_maps, load_policy

REPORT_LIMIT, PLOTS_LIMIT = 50, 200  # examples by default


def look(model, processor, example: dict, config: RewardConfig, system_prompt: str | None = None):
    """Where the greedy completion's uncertain tokens look: (heat (rows, columns) over the first picture, text, TAS)."""
    options = {"max_new_tokens": 128, "temperature": 0, "system_prompt": system_prompt}
    group = sample_group(model, processor, example, num_generations=1, **options)
    tas = float(score_group(model, group, config)["tas_selected"][0])
    completion, length, picture = group.completions[0], group.lengths[0], example_images(example)[0]
    cells = token_cells(processor, picture)
    values = torch.zeros(len(cells))
    if length:  # a completion that ends at once looks nowhere
        chosen = scored_tokens(completion[:length], group.statistics.entropies[0][:length], config)
        layers = {"layers": config.attention_layers, "query": config.attention_query}
        maps = attention_maps(model, group.prompt, completion, **layers)
        values = maps[chosen].mean(0)[: len(cells)].cpu()
    return paint_tokens(values, cells, picture.size), group.texts[0], tas


@dataclass
class VisualizeConfig(RewardConfig, PolicyConfig):
    """See a run: a report to explore (--out x.html), a picture of where a policy looks, curves, or plots (--plots).

    With --adapter, the base model (the adapter switched off) stands beside it. --plots FOLDER writes the plots of
    --metrics, of --evaluations or, with neither, of the policy's answers, as PNG and SVG.
    """

    data: str = option("scenes:heldout", "Examples: .jsonl, .parquet, a datasets folder, a Hub id, or scenes:heldout.")
    limit: int | None = option(None, f"The first examples; by default {REPORT_LIMIT} (report), {PLOTS_LIMIT} (plots).")
    metrics: list[str] | None = option(None, "metrics.jsonl of one or more runs, to draw their curves.")
    evaluations: list[str] | None = option(None, "With --plots: files of evaluate.py --json, TAS against accuracy.")
    plots: str | None = option(None, "Folder to write the paper's analyses to, each as PNG and SVG.")
    index: list[int] | None = option(None, "Examples to show, counted from 0; default in a picture: 0 1 2.")
    max_new_tokens: int = option(128, "Maximum completion length in tokens.", at_least=1)
    megabytes: float = option(15.0, "Largest report; decides how many layers it has, how fine maps are.", at_least=1)
    output: str = option("picture.png", "Report (.html) or picture (.png .jpg .pdf .svg) to write.", aliases=("--out",))

    def problems(self) -> list[str]:
        found = super().problems()
        sources = {"metrics": "the metrics.jsonl of a run", "evaluations": "what evaluate.py --json wrote"}
        for name, source in sources.items():
            missing = [path for path in getattr(self, name) or [] if not Path(path).is_file()]
            found += [f"{name}={path!r}: no such file; give {source}" for path in missing]
        if self.evaluations and not self.plots:
            found.append(f"evaluations={self.evaluations}: add --plots FOLDER, where the plots go")
        if self.plots and Path(self.plots).exists() and not Path(self.plots).is_dir():
            found.append(f"plots={self.plots!r}: give the name of a folder")
        suffixes = (".png", ".jpg", ".pdf", ".svg") + (".html",) * (not self.metrics)
        return found + writable(self, "output", suffixes=suffixes)


def load(config: VisualizeConfig, default_limit: int | None):
    """(model, processor, the examples that are asked for)."""
    arguments = config.data_arguments()
    if config.index is None:
        arguments["limit"] = config.limit or default_limit
    data = examples = load_examples(config.data, **arguments, require_boxes=False)
    if config.index is not None:
        if not all(0 <= index < len(data) for index in config.index):
            raise ConfigError(f"index={config.index}: {config.data} has the examples 0 to {len(data) - 1}")
        examples = [data[index] for index in config.index]
    model, processor = load_policy(**config.policy_arguments(lora_rank=0))
    model.requires_grad_(False)  # a frozen vision tower's features are kept from sampling to scoring
    check_layers(model, config.attention_layers)
    if config.index is None:  # those by index are few, and checked when they are encoded
        check_prompts(model, processor, data, config, config.max_new_tokens)
    return model, processor, examples


def write_report(config: VisualizeConfig) -> None:
    model, processor, examples = load(config, REPORT_LIMIT)
    answers = answers_by_policy(model, processor, examples, config)
    room = int(config.megabytes * 1e6) - len(page({}))
    text = page(collect(model, processor, examples, answers, config, room))
    Path(config.output).write_text(text, encoding="utf-8", newline="\n")
    if len(text) > config.megabytes * 1e6:
        size = f"{len(text) / 1e6:.1f} MB, more than megabytes={config.megabytes:g}, even with the coarsest maps"
        print(f"{config.output} has {size} of one layer: lower --limit or --max_new_tokens", file=sys.stderr)


def write_plots(config: VisualizeConfig) -> None:
    folder = Path(config.plots)
    folder.mkdir(parents=True, exist_ok=True)
    if config.metrics:
        plot_curves(config.metrics, both(folder / "curves"))
    if config.evaluations:
        plot_tas_accuracy(read_evaluations(config.evaluations), both(folder / "tas_accuracy"))
    if config.metrics or config.evaluations:
        return
    model, processor, examples = load(config, PLOTS_LIMIT)
    answers = answers_by_policy(model, processor, examples, config)
    rows = {name: [answer.scores for answer in own] for name, own in answers.items()}
    plot_tas_accuracy({Path(config.model).name: rows}, both(folder / "tas_accuracy"))
    plot_generation(answers, both(folder / "attention_over_generation"))
    plot_entropy(answers, both(folder / "attention_against_entropy"))


def write_picture(config: VisualizeConfig) -> None:
    config.index = [0, 1, 2] if config.index is None else config.index
    model, processor, examples = load(config, None)
    columns = {}
    for name in ("base", "adapter")[: 1 + bool(config.adapter)]:
        with switched_to(model, name, config), torch.no_grad():
            columns[name] = [look(model, processor, example, config, config.system_prompt) for example in examples]
    plot_attention(examples, columns, Path(config.output))


def main(config: VisualizeConfig) -> None:
    if config.plots:
        write_plots(config)
    else:
        output = Path(config.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        if config.metrics:
            plot_curves(config.metrics, output)
        else:
            (write_report if output.suffix.lower() == ".html" else write_picture)(config)
    print(f"-> {config.plots or config.output}")


if __name__ == "__main__":
    run_command(VisualizeConfig, main)
