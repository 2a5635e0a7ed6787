"""saliency-r1-8k -> OUT/train.jsonl, pictures in OUT/images: mixed questions with one region each.

    python -m data.prepare.saliency_r1 --out data/saliency_r1                      # downloads it from the Hub
    python -m data.prepare.saliency_r1 --data /path/to/saliency-r1-8k --out data/saliency_r1
    accelerate launch train_rl.py --data data/saliency_r1/train.jsonl ...

Columns read (https://huggingface.co/datasets/peterant330/saliency-r1-8k, one split `train` of 8,080 rows): problem,
solution, image (embedded picture) and bbox, text such as "[0.094, 0.312, 0.44, 0.795]": x1, y1, x2, y2 as fractions of
the picture's width and height. The names are as several projects that train on it read them. The dataset's own page
could not be seen, so they are flags; look at some regions before training: `python visualize.py --data ...`.

Boxes that exceed their picture by up to --tolerance of a side are clipped, rows with others are dropped and counted.
The id of an example is the number of its row, from 0: whether the column `question_id` is unique is not known.
"""

import json
from dataclasses import dataclass

from data.prepare.folder import prepare
from data.prepare.rows import Dropped, Picture, text
from data.prepare.sources import DATA_HELP, TableConfig, TableRows, open_table
from reward import extract_answer
from sayo.examples.regions import is_number
from sayo.settings import option, run_command


@dataclass
class SaliencyConfig(TableConfig):
    """Prepare saliency-r1-8k: mixed questions with one region each.

    Example: python -m data.prepare.saliency_r1 --out data/saliency_r1. OUT/report.json counts what was dropped.
    """

    source = "saliency_r1"
    needed = (*TableConfig.needed, "question_column", "answer_column", "box_column", "image_column")

    data: str = option("peterant330/saliency-r1-8k", DATA_HELP)
    question_column: str = option("problem", "Column of the questions.")
    answer_column: str = option("solution", "Column of the answers.")
    box_column: str = option("bbox", "Column of the boxes: four fractions, as a list or as text.")
    image_column: str = option("image", "Column of the pictures.")

    def open_rows(self) -> TableRows:
        columns = (self.question_column, self.answer_column, self.box_column)
        dataset = open_table(self.data, self.split, self.revision, columns, self.image_column)
        return TableRows(dataset, self.image_column)

    def convert(self, row: dict, picture: Picture) -> dict:
        sides = row[self.box_column]
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
        answer = text(row[self.answer_column], "answer")
        answer = extract_answer(answer) or answer  # data sets for GRPO often keep answers as a policy should write them
        return {"question": text(row[self.question_column], "question"), "answer": answer, "boxes": [pixels]}


if __name__ == "__main__":
    run_command(SaliencyConfig, prepare)
