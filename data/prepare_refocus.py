"""ReFocus_Data -> OUT/train.jsonl, pictures in OUT/images: questions about charts, with the areas to focus on.

    python -m data.prepare_refocus --out data/refocus --limit 4000 --seed 0        # downloads it from the Hub
    python -m data.prepare_refocus --data /path/to/ReFocus_Data --out data/refocus # a local copy of the Hub's files
    accelerate launch train_rl.py --data data/refocus/train.jsonl ...

Columns read (https://huggingface.co/datasets/ReFocus/ReFocus_Data, arXiv 2501.05452; 14,344 rows in the train split):
id, question, answer, image (embedded picture) and focus_areas_bbox {x1: [...], y1: [...], x2: [...], y2: [...]} in
pixels, one number per area and side. They are as the released script of SAYO (arXiv 2602.08241) and another project
read them; the dataset's own page could not be seen. Every area counts; the released script of SAYO takes the first.

Rows without an area are dropped and counted.
"""

from dataclasses import dataclass

from config import option, run_command
from data.prepare import PrepareConfig, prepare, required
from data.prepare_rows import Dropped, Picture, text
from data.prepare_sources import TableRows, open_table

SOURCE = "refocus"
COLUMNS = ("id", "question", "answer", "focus_areas_bbox")
SIDES = ("x1", "y1", "x2", "y2")


@dataclass
class RefocusConfig(PrepareConfig):
    """Prepare ReFocus_Data: questions about charts, with the areas to focus on.

    Example: python -m data.prepare_refocus --out data/refocus --limit 4000. Then train with --data
    data/refocus/train.jsonl. OUT/report.json counts what was dropped and why.
    """

    paths = ("data",)

    data: str = option("ReFocus/ReFocus_Data", "Hub dataset, or a folder that holds its files.")
    split: str = option("train", "Split of it.")
    revision: str | None = option(None, "Branch, tag or commit of the Hub dataset.")

    def problems(self) -> list[str]:
        return super().problems() + required(self, "data", "split")


def convert(row: dict, picture: Picture) -> dict:
    """The example of a row. `datasets` gives the areas as a dict of lists or, for a list of structs, as dicts."""
    areas = row["focus_areas_bbox"] or {}
    try:
        if isinstance(areas, list):
            areas = {side: [area[side] for area in areas] for side in SIDES}
        boxes = [list(box) for box in zip(*(areas.get(side) or [] for side in SIDES), strict=True)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Dropped("focus areas of another form", areas) from error
    if not boxes:
        raise Dropped("no focus area")
    return {"question": text(row["question"], "question"), "answer": text(row["answer"], "answer"), "boxes": boxes}


def open_rows(config: RefocusConfig) -> TableRows:
    dataset = open_table(config.data, config.split, config.revision, COLUMNS, "image")
    return TableRows(dataset, "image", "id")


def main(config: RefocusConfig) -> dict:
    """Write OUT and return the report."""
    return prepare(config, SOURCE, lambda: open_rows(config), convert, store=True)


if __name__ == "__main__":
    run_command(RefocusConfig, main)
