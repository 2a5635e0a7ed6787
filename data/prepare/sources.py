"""How the preparation scripts read public datasets: huge JSON objects, and tables of `datasets`.

No file is held in memory. A file of JSON is read once to index its entries (16 bytes an entry), then each entry is
parsed from its own bytes when it is needed.
"""

import json
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from tqdm import tqdm

from data.prepare.folder import PrepareConfig
from sayo.examples.pictures import DataError, DataFolder
from sayo.examples.rows import data_files, is_saved, open_dataset
from sayo.settings import ConfigError, option

CHUNK = 1 << 20  # bytes
LONGEST_ENTRY = 1 << 26  # bytes; a text that is longer without an end is taken for broken JSON
REOPEN_AFTER = 100  # rows of a table
DATA_HELP = "Hub dataset, or a folder that holds its files."
BLANK, MARK = "[ \t\n\r]*", "\xef\xbb\xbf"  # some editors put this mark in front of UTF-8, here as Latin-1
KEY = rf'{BLANK}("[^"\\]*(?:\\.[^"\\]*)*"){BLANK}:{BLANK}'
FIRST, NEXT, AFTER = (re.compile(text) for text in (f"(?:{MARK})?{BLANK}{{{KEY}", f"{BLANK},{KEY}", f"{BLANK}[,}}]"))
EMPTY, CLOSING = re.compile(f"(?:{MARK})?{BLANK}{{{BLANK}}}{BLANK}"), re.compile(f"{BLANK}}}{BLANK}")
DECODER = json.JSONDecoder()


def scan_object(path: Path, chunk: int = CHUNK) -> Iterator[tuple[str, int, int]]:
    """(key, start, end) for each entry of the one JSON object in a file: bytes start to end are `"key": value`.

    The bytes are decoded as Latin-1, one character each, so that positions in the text are positions in the file. No
    byte of a longer UTF-8 character looks like punctuation of JSON; keys are decoded again as what they are.

    Raises DataError with the position where the file stops being one JSON object.
    """
    shown = {"desc": f"reading {path.name}", "mininterval": 1, "delay": 1}
    with open(path, "rb") as raw, tqdm.wrapattr(raw, "read", path.stat().st_size, **shown) as file:
        text, base, at, more, entry = "", 0, 0, chunk, FIRST  # text[at] is byte base + at
        while True:
            key = entry.match(text, at)
            start = key.start(1) if key else at
            try:
                end = DECODER.raw_decode(text, key.end())[1] if key else 0
                if key and AFTER.match(text, end):  # else a number may have more digits
                    yield json.loads(key[1].encode("latin-1")), base + start, base + end
                    at, more, entry = end, chunk, NEXT
                    continue
            except json.JSONDecodeError:
                pass  # the entry is incomplete so far
            except RecursionError as error:
                found = f"the entry at byte {base + start:,} is nested too deeply"
                raise DataError(f"{path}: {found}; remove it") from error
            added = file.read(more).decode("latin-1")
            if not added and (CLOSING if entry is NEXT else EMPTY).fullmatch(text, at):
                return
            if not added or len(text) - at > LONGEST_ENTRY:
                found = f"the entry at byte {base + start:,} begins with {text[start : start + 40]!r}"
                raise DataError(f"{path} is not one JSON object, or is cut off: {found}")
            text, base, at, more = text[at:] + added, base + at, 0, 2 * more


def read_entry(path: Path, start: int, end: int) -> tuple[str, object]:
    """The key and value whose bytes scan_object named."""
    with open(path, "rb") as file:
        file.seek(start)
        ((key, value),) = json.loads(b"{" + file.read(end - start) + b"}").items()
    return key, value


@dataclass
class TableConfig(PrepareConfig):
    """The fields of a script that reads a table of `datasets`."""

    needed, paths = (*PrepareConfig.needed, "data", "split"), ("data",)

    data: str = option("", DATA_HELP)
    split: str = option("train", "Split of it.")
    revision: str | None = option(None, "Branch, tag or commit of the Hub dataset.")


class TableRows(Sequence):
    """Rows of a `datasets` table as dicts with `id` and `picture`: encoded bytes, a path, or None.

    id_column   column of the ids; None numbers the rows from 0, as does a row without one
    """

    def __init__(self, dataset: datasets.Dataset, image_column: str, id_column: str | None = None):
        self._dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        self._image_column, self._id_column, self._reads = image_column, id_column, 0

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict:
        self._reads += 1
        if self._reads % REOPEN_AFTER == 0:  # a copy maps the table's files anew, which frees the pages read so far
            self._dataset = pickle.loads(pickle.dumps(self._dataset))
        row = self._dataset[index]
        cell, identifier = row.pop(self._image_column) or {}, row.get(self._id_column)
        content = cell.get("bytes")
        if not content and os.path.isfile(cell.get("path") or ""):
            content = Path(cell["path"]).read_bytes()
        return row | {"id": str(index if identifier in (None, "") else identifier), "picture": content}


def open_table(data: str, split: str, revision: str | None, columns: Sequence[str], image_column: str):
    """The split of a Hub dataset, or of a folder in the Hub's format or of save_to_disk, or of a .parquet file.

    columns   those that will be read, besides image_column

    Raises ConfigError that names the columns that are missing and those that there are, if possible before a download.
    """
    path, wanted = Path(data).expanduser(), [*columns, image_column]
    try:
        if not path.is_file() and not is_saved(path):
            name = str(path) if path.exists() else data
            if features := datasets.load_dataset_builder(name, revision=revision).info.features:  # from its README
                _check_columns(data, features, wanted, image_column)
        if path.is_dir():
            data_files(path, split, DataFolder(path))
        dataset = open_dataset(data, split, revision)
    except ConfigError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # those of pyarrow and the Hub are these
        absent = "is no file or folder here, and no Hub dataset that can be loaded"
        what = "cannot be loaded" if path.exists() else absent
        raise ConfigError(f"data={data!r} {what}: {type(error).__name__}: {error}") from error
    _check_columns(data, dataset.features, wanted, image_column)
    return dataset.select_columns(wanted)


def _check_columns(data: str, features: datasets.Features, wanted: list[str], image_column: str) -> None:
    missing = [name for name in wanted if name not in features]
    present = f"columns present: {', '.join(features)}"
    found = [f"data={data!r} has no column {', '.join(missing)}; {present}"] if missing else []
    image = features.get(image_column)
    as_pictures = isinstance(image, datasets.Image) or (isinstance(image, dict) and {"bytes", "path"} <= set(image))
    if image is not None and not as_pictures and getattr(image, "dtype", None) != "binary":
        found.append(f"data={data!r}: column {image_column} holds {image}, not pictures; {present}")
    if found:
        raise ConfigError("\n".join(found))
