"""The training mixture of SAYO (arXiv 2602.08241) in one command: 16,000 rows of GQA, 4,000 of ReFocus_Data, shuffled.

    python -m data.prepare.mixture --gqa_questions gqa/train_balanced_questions.json \\
        --gqa_scene_graphs gqa/train_sceneGraphs.json --gqa_images gqa/images --out data/paper_mixture
    accelerate launch train_rl.py --config configs/paper.yaml --data data/paper_mixture/train.jsonl ...

OUT/gqa and OUT/refocus are what data/prepare/gqa.py and data/prepare/refocus.py write (see there for what they read and
where to get it); OUT/train.jsonl holds the rows of both in one random order, ids as "gqa:..." and "refocus:...". The
paper does not publish its selection of rows; this one depends on --seed alone.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from data.prepare.folder import FolderConfig, claim_folder, format_report, prepare, random_order, write_json
from data.prepare.gqa import GqaConfig
from data.prepare.refocus import RefocusConfig
from sayo.examples.pictures import DataError
from sayo.examples.rows import Lines
from sayo.settings import option, run_command

PARTS = ("gqa", "refocus")
OWN_FILES = ("report.json", "train.jsonl", "train.jsonl.unfinished", *PARTS, "settings.json")


@dataclass
class MixtureConfig(FolderConfig):
    """Prepare the mixture that SAYO was trained on: rows of GQA and ReFocus_Data in one random order.

    Example: python -m data.prepare.mixture --gqa_questions gqa/train_balanced_questions.json --gqa_scene_graphs
    gqa/train_sceneGraphs.json --gqa_images gqa/images --out data/paper_mixture. OUT/report.json counts dropped rows.
    """

    source, needed = "mixture", ("out", "refocus", "refocus_split")
    paths = ("gqa_questions", "gqa_scene_graphs", "gqa_images", "refocus")

    gqa_questions: str | None = option(None, "JSON of questions, such as train_balanced_questions.json (required).")
    gqa_scene_graphs: str | None = option(None, "JSON of scene graphs, such as train_sceneGraphs.json (required).")
    gqa_images: str | None = option(None, "Folder of the pictures, <imageId>.jpg (required).")
    gqa_rows: int = option(16_000, "Rows of GQA.", at_least=1)
    copy_images: bool = option(False, "Copy the pictures of GQA to OUT/gqa/images instead of referring to them.")
    refocus: str = option("ReFocus/ReFocus_Data", "Hub dataset, or a folder that holds its files.")
    refocus_split: str = option("train", "Split of it.")
    refocus_revision: str | None = option(None, "Branch, tag or commit of the Hub dataset.")
    refocus_rows: int = option(4_000, "Rows of ReFocus_Data.", at_least=1)

    def problems(self) -> list[str]:
        found = super().problems()
        of_files = [text for text in part_configs(self)[0].problems() if text.startswith(GqaConfig.paths)]
        return found + [f"gqa_{text}".replace("--", "--gqa_") for text in of_files]


def part_configs(config: MixtureConfig) -> tuple[GqaConfig, RefocusConfig]:
    """The settings of the two parts."""
    common = {name: getattr(config, name) for name in ("seed", "tolerance", "num_processes")}
    files = {name: getattr(config, f"gqa_{name}") for name in ("questions", "scene_graphs", "images")}
    table = {"data": config.refocus, "split": config.refocus_split, "revision": config.refocus_revision}
    out = Path(config.out or ".").expanduser()
    gqa = GqaConfig(str(out / "gqa"), limit=config.gqa_rows, copy_images=config.copy_images, **files, **common)
    return gqa, RefocusConfig(str(out / "refocus"), limit=config.refocus_rows, **table, **common)


def merge(out: Path, seed: int) -> int:
    """Write the rows of the parts to OUT/train.jsonl in a random order; only their positions are held in memory."""
    parts = [(part, Lines(out / part / "train.jsonl")) for part in PARTS]
    places = [(part, lines, index) for part, lines in parts for index in range(len(lines))]
    with open(out / "train.jsonl.unfinished", "w", encoding="utf-8") as merged:
        for place in random_order(len(places), seed):
            part, lines, index = places[place]
            row = json.loads(lines[index])
            row |= {"id": f"{part}:{row['id']}", "image": Path(os.path.normpath(Path(part, row["image"]))).as_posix()}
            merged.write(json.dumps(row, ensure_ascii=False) + "\n")
    (out / "train.jsonl.unfinished").replace(out / "train.jsonl")
    return len(places)


def main(config: MixtureConfig) -> dict:
    """Write OUT and return the report. Raises ConfigError and DataError as folder.prepare does."""
    out = config.folder
    claim_folder(config, OWN_FILES)
    if (out / "report.json").exists():
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        print(*(format_report(part) for part in report["parts"].values()), sep="\n")
    else:
        gqa, refocus = part_configs(config)
        rows = refocus.open_rows()  # first, so that a Hub out of reach shows before the work on GQA
        parts = {"gqa": prepare(gqa), "refocus": prepare(refocus, rows)}
        try:
            report = {"source": config.source, "rows": merge(out, config.seed), "parts": parts}
            write_json(out / "report.json", report)
        except OSError as error:
            raise DataError(f"{error}; run the same command again to resume") from error
    print(f"mixture of {report['rows']:,} rows -> {out / 'train.jsonl'}")
    return report


if __name__ == "__main__":
    run_command(MixtureConfig, main)
