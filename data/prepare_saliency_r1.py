"""saliency-r1-8k -> OUT/train.jsonl, pictures in OUT/images: mixed questions with one region each.

    python -m data.prepare_saliency_r1 --out data/saliency_r1                      # downloads it from the Hub
    python -m data.prepare_saliency_r1 --data /path/to/saliency-r1-8k --out data/saliency_r1
    accelerate launch train_rl.py --data data/saliency_r1/train.jsonl ...

Columns read (https://huggingface.co/datasets/peterant330/saliency-r1-8k, one split `train` of 8,080 rows): problem,
solution, image (embedded picture) and bbox, text such as "[0.094, 0.312, 0.44, 0.795]": x1, y1, x2, y2 as fractions of
the picture's width and height. The names are as several projects that train on it read them. The dataset's own page
could not be seen, so they are flags, and a look at some regions is advised: `python visualize.py --data ...`.

Boxes that stick out by up to --tolerance of a side are clipped, rows with others are dropped and counted. The id of an
example is the number of its row, from 0: that the column `question_id` is unique is not known.
"""

import json
from dataclasses import dataclass
from functools import partial

from config import option, run_command
from data.prepare import PrepareConfig, prepare, required
from data.prepare_rows import Dropped, Picture, text
from data.prepare_sources import TableRows, open_table
from data.regions import is_number
from reward import extract_answer

SOURCE = "saliency_r1"


@dataclass
class SaliencyConfig(PrepareConfig):
    """Prepare saliency-r1-8k: mixed questions with one region each.

    Example: python -m data.prepare_saliency_r1 --out data/saliency_r1. Then train with --data
    data/saliency_r1/train.jsonl. OUT/report.json counts what was dropped and why.
    """

    paths = ("data",)

    data: str = option("peterant330/saliency-r1-8k", "Hub dataset, or a folder that holds its files.")
    split: str = option("train", "Split of it.")
    revision: str | None = option(None, "Branch, tag or commit of the Hub dataset.")
    question_column: str = option("problem", "Column of the questions.")
    answer_column: str = option("solution", "Column of the answers.")
    box_column: str = option("bbox", "Column of the boxes: four fractions, as a list or as text.")
    image_column: str = option("image", "Column of the pictures.")

    def problems(self) -> list[str]:
        columns = ("question_column", "answer_column", "box_column", "image_column")
        return super().problems() + required(self, "data", "split", *columns)


def convert(
    row: dict, picture: Picture, question: str = "problem", answer: str = "solution", box: str = "bbox"
) -> dict:
    """The example of a row whose columns have the given names."""
    sides = row[box]
    if isinstance(sides, str):
        try:
            sides = json.loads(sides or "null")
        except (ValueError, RecursionError) as error:
            raise Dropped("box is not four numbers", sides) from error
    if sides in ([], None):
        raise Dropped("no box")
    if not isinstance(sides, list) or len(sides) != 4 or not all(map(is_number, sides)):
        raise Dropped("box is not four numbers", sides)
    pixels = [side * length for side, length in zip(sides, (picture.width, picture.height) * 2, strict=True)]
    said = text(row[answer], "answer")
    # Datasets for GRPO often keep answers as a policy should write them.
    said = extract_answer(said) or said
    return {"question": text(row[question], "question"), "answer": said, "boxes": [pixels]}


def open_rows(config: SaliencyConfig) -> TableRows:
    columns = (config.question_column, config.answer_column, config.box_column)
    dataset = open_table(config.data, config.split, config.revision, columns, config.image_column)
    return TableRows(dataset, config.image_column)


def main(config: SaliencyConfig) -> dict:
    """Write OUT and return the report."""
    columns = {"question": config.question_column, "answer": config.answer_column, "box": config.box_column}
    return prepare(config, SOURCE, lambda: open_rows(config), partial(convert, **columns), store=True)


if __name__ == "__main__":
    run_command(SaliencyConfig, main)
