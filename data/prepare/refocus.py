"""ReFocus_Data -> OUT/train.jsonl, pictures in OUT/images: questions about charts, with the areas to focus on.

    python -m data.prepare.refocus --out data/refocus --limit 4000 --seed 0        # downloads it from the Hub
    python -m data.prepare.refocus --data /path/to/ReFocus_Data --out data/refocus # a local copy of the Hub's files
    accelerate launch train_rl.py --data data/refocus/train.jsonl ...

Columns read (https://huggingface.co/datasets/ReFocus/ReFocus_Data, arXiv 2501.05452; 14,344 rows in the train split):
id, question, answer, image (embedded picture) and focus_areas_bbox {x1: [...], y1: [...], x2: [...], y2: [...]} in
pixels, one number per area and side. They are as the released script of SAYO (arXiv 2602.08241) and another project
read them; the dataset's own page could not be seen. Every area counts; the released script of SAYO takes the first.

Rows without an area are dropped and counted.
"""

from dataclasses import dataclass

from data.prepare.folder import prepare
from data.prepare.rows import Dropped, Picture, text
from data.prepare.sources import DATA_HELP, TableConfig, TableRows, open_table
from sayo.settings import option, run_command

COLUMNS = ("id", "question", "answer", "focus_areas_bbox")
SIDES = ("x1", "y1", "x2", "y2")


@dataclass
class RefocusConfig(TableConfig):
    """Prepare ReFocus_Data: questions about charts, with the areas to focus on.

    Example: python -m data.prepare.refocus --out data/refocus --limit 4000. OUT/report.json counts what was dropped.
    """

    source = "refocus"

    data: str = option("ReFocus/ReFocus_Data", DATA_HELP)

    def open_rows(self) -> TableRows:
        return TableRows(open_table(self.data, self.split, self.revision, COLUMNS, "image"), "image", "id")

    def convert(self, row: dict, picture: Picture) -> dict:
        areas = row["focus_areas_bbox"] or {}
        try:
            if isinstance(areas, list):  # `datasets` gives a dict of lists, or a list of dicts for a list of structs
                areas = {side: [area[side] for area in areas] for side in SIDES}
            boxes = [list(box) for box in zip(*(areas.get(side) or [] for side in SIDES), strict=True)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Dropped("focus areas of another form", areas) from error
        if not boxes:
            raise Dropped("no focus area")
        return {"question": text(row["question"], "question"), "answer": text(row["answer"], "answer"), "boxes": boxes}


if __name__ == "__main__":
    run_command(RefocusConfig, prepare)
