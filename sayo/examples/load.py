"""The format of an example, and the loader, which checks a whole dataset before a long job starts.

An example is a dict with these keys. Other keys (`kind`, `reasoning`, ...) are passed through; null counts as absent.

    image      a picture, or `images`, a list of them; in a file: a path, base64, or {"bytes", "path"} as in `datasets`
    question   text
    answer     text, a number, a boolean or a date, or a list of several right ones: the others are then in
               `other_answers`. With `choices`: the text of a choice, its letter A, B, ..., or its index from 0. What
               stands around it in a file is taken off: see sayo/grader/gold.py
    boxes      the regions that the answer rests on: [[x1, y1, x2, y2], ...] in pixels of the original picture with
               EXIF rotation applied, x1 < x2, y1 < y2; for several images a list of such lists
    polygons   further regions: [[[x, y], [x, y], [x, y], ...], ...] in the same unit, or flat as in COCO,
               [[x1, y1, x2, y2, x3, y3, ...], ...]; for several images a list of such lists
    mask       a further region: a picture of exactly the image's size, black outside the region; for several images
               `masks`, a list with one or null for each. A loaded example always has `masks`
    choices    optional list of texts; in a file, also {"A": text, ...} or {"label": [...], "text": [...]}
    answer_type  optional: how answers are compared, text (the default, and math for LaTeX), yes_no, number,
               relaxed_number, math, letter or list, see sayo/grader/grader.py; only math beside `choices`
    id         optional, unique; default "FILE:number", counting the lines of a .jsonl from 1, other rows from 0

The region of a question is the union of its boxes, polygons and masks. Files may hold boxes in other formats
(`box_format`) and under other column names (`fields`).
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from sayo.examples.checks import check_row, check_rows
from sayo.examples.pictures import DataError, DataFolder, load_mask, load_picture
from sayo.examples.regions import BOX_FORMATS, fit_regions
from sayo.examples.rows import Rows, open_rows
from sayo.examples.scenes.scenes import load_scenes

__all__ = ["DataError", "Examples", "load_examples", "load_picture"]

MAX_LISTED = 20  # bad rows named in one error message


class Examples(Sequence):
    """A lazy sequence of examples; pictures are decoded when an example is indexed.

    `examples[i]` is a new dict with the keys above. `images` is a list of RGB PIL pictures; with exactly one, `image`
    is that picture and `boxes` (and `polygons`, if any) a flat list, otherwise a list per image. `masks`, if any, is a
    list with an "L" PIL picture (255 inside) or None per image.

    name      what it was loaded from
    skipped   a message for each row that was dropped as bad
    """

    def __init__(self, rows: Rows, chosen: Sequence[int], skipped: Sequence[str] = (), box_format: str = "xyxy"):
        self.name, self.skipped = rows.name, list(skipped)
        self._rows, self._chosen, self._box_format = rows, chosen, box_format

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self.raw(index)
        example["images"] = [load_picture(image) for image in example["images"]]
        example |= fit_regions(example, [image.size for image in example["images"]], self._box_format)
        if "masks" in example:
            example["masks"] = [mask and load_mask(mask) for mask in example["masks"]]
        if len(example["images"]) == 1:
            example["image"] = example["images"][0]
            example |= {name: example[name][0] for name in ("boxes", "polygons") if name in example}
        return example

    def drop(self, bad: Sequence[tuple[int, str]]) -> None:
        """Drop the examples at these indices and add their messages to `skipped`."""
        gone = {index for index, _ in bad}
        self.skipped += [message for _, message in bad]
        self._chosen = [row for index, row in enumerate(self._chosen) if index not in gone]

    def raw(self, index: int) -> dict:
        """The example as written: `images` and `masks` undecoded, `boxes` and `polygons` as a list per image."""
        return check_row(self._rows[self._chosen[index]], self._rows.folder)

    def written(self, index: int) -> dict:
        """The row of an example, unchecked."""
        return self._rows[self._chosen[index]]


def load_examples(
    data: str,
    *,
    limit: int | None = None,
    bad_rows: str = "error",
    require_boxes: bool = True,
    split: str = "train",
    box_format: str = "xyxy",
    fields: Iterable[str] | None = None,
    allowed_folders: Iterable[str] | None = None,
) -> Examples:
    """Open a dataset and check all rows, or as many as it takes to find `limit` good ones.

    Each distinct picture is decoded once, although its header gives the size: a truncated file found hours into a run
    would end it.

    data           `scenes`, `scenes:validation`, `scenes:heldout`, `scenes:newtype` (only `split` and `limit` apply to
                   them); a .jsonl, .json (one list), .csv or .parquet file (VALID_DATA in rows.py has all), or a
                   pattern for several in one folder, with picture paths relative to it; a folder
                   written by `Dataset.save_to_disk`; any other folder or Hub id that `datasets.load_dataset` reads,
                   owner/name@revision for a branch, tag or commit
    bad_rows       "error" raises when there is any, "skip" drops them, lists them in `.skipped` and prints how many
    require_boxes  whether a row without a region (box, polygon or mask) is bad
    split          of a folder or Hub id with several
    box_format     how boxes are written, one of BOX_FORMATS in regions.py; polygons are in the same unit
    fields         "name=column" entries for columns with other names, such as "question=query"; a dot reads a nested
                   column, a number one entry of a list: "answer=label.text", "question=turns.0.text"
    allowed_folders  folders, beside the data's own, that pictures and masks may lie in; a path or link to anywhere
                   else makes a row bad

    Raises DataError when the data cannot be opened, when `fields` does not fit it, when a row is bad and bad_rows is
    "error", and when no good row is left; ValueError for an invalid argument.
    """
    if bad_rows not in ("error", "skip"):
        raise ValueError(f"bad_rows is {bad_rows!r}; valid ones: error, skip")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give a positive number of examples, or None for all of them")
    if box_format not in BOX_FORMATS:
        raise ValueError(f"box_format is {box_format!r}; valid ones: {', '.join(BOX_FORMATS)}")
    if data.partition(":")[0] == "scenes":
        scenes = load_scenes(f"scenes:{split}" if data == "scenes" else data)
        every = range(len(scenes))  # our own, nothing to check
        return Examples(Rows(data, scenes, every, DataFolder(Path())), every[:limit])
    rows = open_rows(data, split, allowed_folders or ())
    if not len(rows):
        raise DataError(f"data {data!r} has no rows; write at least one example")
    rows.rename(fields or ())
    rows.check_columns()
    return checked_examples(
        rows, box_format, limit=limit, bad_rows=bad_rows, require_boxes=require_boxes, can_declare=True
    )


def checked_examples(
    rows: Rows, box_format: str, *, limit: int | None, bad_rows: str, require_boxes: bool, can_declare: bool = False
) -> Examples:
    """The good rows as examples; arguments and errors as for load_examples.

    can_declare   whether the user can give another box_format: then a file that seems to have one is an error
    """
    chosen, skipped, other_format, misfits = check_rows(rows, box_format, limit, require_boxes)
    misfits = misfits if can_declare else set()
    if skipped and (bad_rows == "error" or not chosen or misfits):
        rest = [message for message in skipped if message not in misfits]
        lines = [f"{len(skipped)} bad and {len(chosen)} good rows in {rows.name}:"]
        if misfits:  # the good ones fit by chance
            first = next(message for message in skipped if message in misfits)
            fix = f"give --box_format {other_format}"
            lines.append(f"{len(misfits)} have boxes in another format; {fix}; first: {first}")
        lines += [*rest[:MAX_LISTED], *([f"and {len(rest) - MAX_LISTED} more"] if len(rest) > MAX_LISTED else [])]
        hint = "--bad_rows skip drops them" if chosen else "no good row is left"
        if misfits:
            hint = f"give --box_format {other_format}; no row is skipped before, as the others fit by chance"
        if flag := rows.folder.hint():
            hint += f"; this would allow the folders of files outside: {flag}"
        raise DataError("\n  ".join(lines) + f"\n{hint}")
    if skipped:
        counted = f"{len(skipped)} of {len(skipped) + len(chosen)} rows skipped"
        print(f"{Path(rows.name).name}: {counted}, first: {skipped[0]}", file=sys.stderr)
    return Examples(rows, chosen, skipped, box_format)
