"""The training mixture of SAYO (arXiv 2602.08241) in one command: 16,000 rows of GQA, 4,000 of ReFocus_Data, shuffled.

    python -m data.prepare_mixture --gqa_questions gqa/train_balanced_questions.json \\
        --gqa_scene_graphs gqa/train_sceneGraphs.json --gqa_images gqa/images --out data/paper_mixture
    accelerate launch train_rl.py --config configs/paper.yaml --data data/paper_mixture/train.jsonl ...

OUT/gqa and OUT/refocus are what data/prepare_gqa.py and data/prepare_refocus.py write (see there for what they read and
where to get it); OUT/train.jsonl holds the rows of both in one random order, ids as "gqa:..." and "refocus:...". The
paper does not publish its selection of rows; this one depends on --seed alone.
"""

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from config import at_least, option, run_command
from data import prepare_gqa, prepare_refocus
from data.pictures import DataError
from data.prepare import FolderConfig, claim_folder, format_report, prepare, random_order, required, write_json
from data.prepare_gqa import GqaConfig
from data.prepare_refocus import RefocusConfig

PARTS = ("gqa", "refocus")
OWN_FILES = ("report.json", "train.jsonl", "train.jsonl.unfinished", *PARTS, "settings.json")


@dataclass
class MixtureConfig(FolderConfig):
    """Prepare the mixture that SAYO was trained on: rows of GQA and ReFocus_Data in one random order.

    Example: python -m data.prepare_mixture --gqa_questions gqa/train_balanced_questions.json --gqa_scene_graphs
    gqa/train_sceneGraphs.json --gqa_images gqa/images --out data/paper_mixture. Then train with --data
    data/paper_mixture/train.jsonl. OUT/report.json counts what was dropped and why.
    """

    paths = ("gqa_questions", "gqa_scene_graphs", "gqa_images", "refocus")

    gqa_questions: str | None = option(None, "JSON of questions, such as train_balanced_questions.json (required).")
    gqa_scene_graphs: str | None = option(None, "JSON of scene graphs, such as train_sceneGraphs.json (required).")
    gqa_images: str | None = option(None, "Folder of the pictures, <imageId>.jpg (required).")
    gqa_rows: int = option(16_000, "Rows of GQA.")
    copy_images: bool = option(False, "Copy the pictures of GQA to OUT/gqa/images instead of referring to them.")
    refocus: str = option("ReFocus/ReFocus_Data", "Hub dataset, or a folder that holds its files.")
    refocus_split: str = option("train", "Split of it.")
    refocus_revision: str | None = option(None, "Branch, tag or commit of the Hub dataset.")
    refocus_rows: int = option(4_000, "Rows of ReFocus_Data.")

    def problems(self) -> list[str]:
        found = super().problems() + at_least(self, 1, "gqa_rows", "refocus_rows")
        found += required(self, "refocus", "refocus_split")
        said = {*FolderConfig.problems(self), *FolderConfig.problems(gqa_config(self))}
        of_gqa = [problem for problem in gqa_config(self).problems() if problem not in said]
        return found + [f"gqa_{problem}".replace("--", "--gqa_") for problem in of_gqa if "limit" not in problem[:6]]


def common(config: MixtureConfig, part: str, limit: int) -> dict:
    """The fields that every part has."""
    names = ("seed", "tolerance", "num_processes")
    return {name: getattr(config, name) for name in names} | {
        "out": str(Path(config.out or ".").expanduser() / part),
        "limit": limit,
    }


def gqa_config(config: MixtureConfig) -> GqaConfig:
    return GqaConfig(
        questions=config.gqa_questions,
        scene_graphs=config.gqa_scene_graphs,
        images=config.gqa_images,
        copy_images=config.copy_images,
        **common(config, "gqa", config.gqa_rows),
    )


def refocus_config(config: MixtureConfig) -> RefocusConfig:
    return RefocusConfig(
        data=config.refocus,
        split=config.refocus_split,
        revision=config.refocus_revision,
        **common(config, "refocus", config.refocus_rows),
    )


def merge(out: Path, seed: int) -> int:
    """Write the rows of the parts to OUT/train.jsonl in a random order; only their positions are held in memory."""
    with ExitStack() as stack:
        files = {part: stack.enter_context(open(out / part / "train.jsonl", "rb")) for part in PARTS}
        places = []
        for part, file in files.items():
            start = 0
            for line in file:
                places.append((part, start))
                start += len(line)
        merged = stack.enter_context(open(out / "train.jsonl.unfinished", "w", encoding="utf-8"))
        for index in random_order(len(places), seed):
            part, start = places[index]
            files[part].seek(start)
            row = json.loads(files[part].readline())
            row |= {"id": f"{part}:{row['id']}", "image": Path(os.path.normpath(Path(part, row["image"]))).as_posix()}
            merged.write(json.dumps(row, ensure_ascii=False) + "\n")
    (out / "train.jsonl.unfinished").replace(out / "train.jsonl")
    return len(places)


def main(config: MixtureConfig) -> dict:
    """Write OUT and return the report. Raises ConfigError and DataError as data/prepare.py does."""
    out = Path(config.out).expanduser()
    claim_folder(out, {"source": "mixture"} | config.settings(), config.overwrite, OWN_FILES)
    if (out / "report.json").exists():
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        print(*(format_report(part) for part in report["parts"].values()), sep="\n")
    else:
        refocus = refocus_config(config)
        # Opened before GQA is worked on: whether the Hub can be reached is not to be learned after minutes.
        refocus_rows = prepare_refocus.open_rows(refocus)
        parts = {"gqa": prepare_gqa.main(gqa_config(config))}
        parts["refocus"] = prepare(
            refocus, prepare_refocus.SOURCE, lambda: refocus_rows, prepare_refocus.convert, store=True
        )
        try:
            report = {"source": "mixture", "rows": merge(out, config.seed), "parts": parts}
            write_json(out / "report.json", report)
        except OSError as error:
            raise DataError(f"{error}; run the same command again to go on") from error
    print(f"mixture of {report['rows']:,} rows -> {out / 'train.jsonl'}")
    return report


if __name__ == "__main__":
    run_command(MixtureConfig, main)
