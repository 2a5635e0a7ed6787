"""The one form an example has in sayo, and the loader that checks a whole data set before anything long starts.

An example is a dict with these keys; any other key (`kind`, `reasoning`, ...) is passed through, null counts as absent:

    image      a picture, or `images`, a list of them; in a file: a path, or {"bytes", "path"} as `datasets` stores it
    question   text
    answer     text; a number is turned into text. With `choices`: the text of a choice, or its letter A, B, ...
    boxes      the regions that the answer rests on: [[x1, y1, x2, y2], ...] in pixels of the original picture as a
               viewer shows it (EXIF rotation applied), x1 < x2, y1 < y2; for several images one such list for each
    polygons   regions, too: [[[x, y], [x, y], [x, y], ...], ...] in the same unit, in a file also flat as in COCO,
               [[x1, y1, x2, y2, x3, y3, ...], ...]; for several images one such list for each
    mask       a region, too: a picture of exactly the image's size, black where the region is not; for several images
               `masks`, one or null for each. Once loaded, always `masks`
    choices    optional list of texts
    answer_type  optional: how an answer is compared with this one, where it is not as text: text, yes_no, number,
               relaxed_number, math, letter or list, as grader.py says; beside `choices` only math
    id         optional, unique; default "FILE:number", where lines of a .jsonl count from 1, other rows from 0

The region of a question is the union of its boxes, polygons and masks. Files may have boxes in other formats
(`box_format`) and other column names (`fields`); an example has what is listed here.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.paths import DataFolder
from data.pictures import DataError, load_mask, load_picture
from data.regions import BOX_FORMATS, fit_regions
from data.row_checks import check_row, check_rows
from data.rows import Rows, open_rows
from data.scenes import load_scenes

__all__ = ["DataError", "Examples", "load_examples", "load_picture"]

MAX_LISTED = 20  # bad rows named in one error message


class Examples(Sequence):
    """A lazy sequence of examples: pictures stay in their files, or encoded, until an example is asked for.

    `examples[i]` is a new dict with the keys listed at the top of this file: `images` is a list of decoded RGB PIL
    pictures; with exactly one, `image` is that picture and `boxes` a flat list, else `boxes` holds a list per image,
    and so does `polygons` for questions that have any. `masks`, for questions that have any, is a list with one "L"
    PIL picture (255 inside) or None for each image, also with exactly one. A slice gives a list of such dicts.
    Raises IndexError for an index outside the sequence.

    name      what it was loaded from
    skipped   one message for each row that was dropped as bad
    """

    def __init__(self, rows: Rows, chosen: Sequence[int], skipped: Sequence[str] = (), box_format: str = "xyxy"):
        self.name, self.skipped = rows.name, list(skipped)
        self._rows, self._chosen, self._box_format = rows, chosen, box_format

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self.peek(index)
        example["images"] = [load_picture(image) for image in example["images"]]
        example |= fit_regions(example, [image.size for image in example["images"]], self._box_format)
        if "masks" in example:
            example["masks"] = [mask and load_mask(mask) for mask in example["masks"]]
        if len(example["images"]) == 1:
            example["image"] = example["images"][0]
            example |= {name: example[name][0] for name in ("boxes", "polygons") if name in example}
        return example

    def drop(self, bad: Sequence[tuple[int, str]]) -> None:
        """Leave out the examples at these indices; what is wrong with each goes to `skipped`."""
        gone = {index for index, _ in bad}
        self.skipped += [message for _, message in bad]
        self._chosen = [row for index, row in enumerate(self._chosen) if index not in gone]

    def peek(self, index: int) -> dict:
        """The example as it is written: `images`, `masks` not decoded, `boxes` and `polygons` as a list per image."""
        return check_row(self._rows[self._chosen[index]], self._rows.folder)


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
    """Open a data set and check every row of it, or as many as it takes to find `limit` good ones.

    Each distinct picture is decoded once, although its header would give the size: a truncated file that is found in
    the third hour loses the run, found here it costs seconds.

    data           `scenes`, `scenes:validation`, `scenes:heldout`, `scenes:newtype` (which take none of the options
                   below but split); a .jsonl, .json (one list) or .parquet file, its picture paths relative to the
                   file; a folder made by `Dataset.save_to_disk`; any other folder or Hub id that
                   `datasets.load_dataset` reads, owner/name@revision for a branch, tag or commit of it
    bad_rows       "error" raises when there are any, "skip" drops them, lists them in `.skipped` and says how many
    require_boxes  whether a row without any region (box, polygon or mask) is bad
    split          of a folder or Hub id that has several
    box_format     how boxes are written, one of BOX_FORMATS of data/regions.py; polygons are in the same unit
    fields         "name=column" entries for columns that have other names than here, such as "question=query"; dots
                   lead into nested columns: "answer=label.text"
    allowed_folders  folders beside that of the data that its pictures and masks may lie in; a path, or a link, that
                   leads anywhere else makes a row bad

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
        try:
            scenes = load_scenes(f"scenes:{split}" if data == "scenes" else data)
        except ValueError as error:
            raise DataError(str(error)) from error
        every = range(len(scenes))  # drawn by sayo itself, nothing to check
        return Examples(Rows(data, scenes, every, DataFolder(Path())), every[:limit])
    rows = open_rows(data, split, allowed_folders or ())
    if not len(rows):
        raise DataError(f"data {data!r} has no rows; write at least one example")
    rows.rename(fields or ())
    return checked_examples(rows, box_format, limit=limit, bad_rows=bad_rows, require_boxes=require_boxes)


def checked_examples(rows: Rows, box_format: str, *, limit: int | None, bad_rows: str, require_boxes: bool) -> Examples:
    """The good rows as examples; arguments and DataError as for load_examples."""
    chosen, skipped = check_rows(rows, box_format, limit, require_boxes)
    if skipped and (bad_rows == "error" or not chosen):
        listed, more = skipped[:MAX_LISTED], len(skipped) - MAX_LISTED
        rest = [f"and {more} more"] if more > 0 else []
        hint = "--bad_rows skip drops them" if chosen else "no good row is left"
        summary = f"{len(skipped)} bad and {len(chosen)} good rows in {rows.name}:"
        allowing = rows.folder.hint()
        hint += f"; this would allow the folders of files outside: {allowing}" if allowing else ""
        raise DataError("\n  ".join([summary, *listed, *rest]) + f"\n{hint}")
    if skipped:
        of = f"{len(skipped)} of {len(skipped) + len(chosen)} rows skipped"
        print(f"{Path(rows.name).name}: {of}, first: {skipped[0]}", file=sys.stderr)
    return Examples(rows, chosen, skipped, box_format)
