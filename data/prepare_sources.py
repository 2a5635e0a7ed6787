"""How the preparation scripts read public datasets: huge JSON objects, JSON lines, and tables of `datasets`.

Nothing here holds a file in memory. A file of JSON is read once to note where its entries are (16 bytes an entry), then
each entry is parsed from its own bytes when a worker asks for it.
"""

import json
import os
import pickle
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
from tqdm import tqdm

from config import ConfigError
from data.pictures import DataError
from data.prepare_rows import Dropped

CHUNK = 1 << 20  # bytes
LONGEST_ENTRY = 1 << 26  # bytes; a text that is longer without an end is taken for broken JSON
REOPEN_AFTER = 100  # rows of a table
# The mark that some editors put in front of UTF-8, decoded as Latin-1, is no content.
OPENING, COLON = re.compile("(?:\xef\xbb\xbf)?[ \t\n\r]*{[ \t\n\r]*"), re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
AFTER_ENTRY, BLANKS = re.compile(r"[ \t\n\r]*([,}])[ \t\n\r]*"), re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()


def scan_object(path: Path, chunk: int = CHUNK) -> Iterator[tuple[str, int, int]]:
    """(key, start, end) for each entry of the one JSON object in a file: bytes start to end are `"key": value`.

    The bytes are decoded as Latin-1, one character each, so that positions in the text are positions in the file. No
    byte of a longer UTF-8 character looks like punctuation of JSON; keys are decoded again as what they are.

    Raises DataError with the position where the file stops being one JSON object.
    """
    with open(path, "rb") as file:
        text, base, at, more, inside = "", 0, 0, chunk, None  # text[at] is byte base + at; inside: opened, not closed
        while True:
            try:
                if inside is None:
                    if (opening := OPENING.match(text)) and opening.end() < len(text):
                        at, inside = opening.end(), text[opening.end()] != "}"
                        at += not inside
                        continue
                elif inside:
                    _, colon = DECODER.raw_decode(text, at) if text[at : at + 1] == '"' else (None, -1)
                    if colon > 0 and (value := COLON.match(text, colon)):
                        _, end = DECODER.raw_decode(text, value.end())
                        if (after := AFTER_ENTRY.match(text, end)) and (after[1] == "}" or after.end() < len(text)):
                            yield json.loads(text[at:colon].encode("latin-1")), base + at, base + end
                            at, inside, more = after.end(), after[1] == ",", chunk
                            continue
                elif BLANKS.fullmatch(text, at):
                    at = len(text)
            except json.JSONDecodeError:
                pass  # so far only the end of what was read; the end of the file is another matter
            except RecursionError as error:
                raise DataError(f"{path}: the entry at byte {base + at:,} is nested too deeply; remove it") from error
            added = file.read(more).decode("latin-1")
            if not added and inside is False and at == len(text):
                return
            if not added or len(text) - at > LONGEST_ENTRY:
                found = f"the entry at byte {base + at:,} begins with {text[at : at + 40]!r}"
                raise DataError(f"{path} is not one JSON object, or is cut off: {found}")
            text, base, at, more = text[at:] + added, base + at, 0, 2 * more


def read_entry(path: Path, start: int, end: int) -> tuple[str, object]:
    """The key and value whose bytes scan_object named."""
    with open(path, "rb") as file:
        file.seek(start)
        ((key, value),) = json.loads(b"{" + file.read(end - start) + b"}").items()
    return key, value


def scan_with_bar(path: Path) -> Iterator[tuple[str, int, int]]:
    """scan_object with a progress bar of bytes."""
    with tqdm(total=path.stat().st_size, desc=f"reading {path.name}", unit="B", unit_scale=True, mininterval=1) as bar:
        for key, start, end in scan_object(path):
            yield key, start, end
            bar.update(end - bar.n)


class JsonLines(Sequence):
    """The lines of several .jsonl files that are not blank; `lines[i]` is (path, line number from 1, value)."""

    def __init__(self, paths: Sequence[Path]):
        self._paths, self._files, self._starts, self._numbers = list(paths), array("B"), array("q"), array("q")
        for index, path in enumerate(self._paths):
            start = 0
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._files.append(index)
                        self._starts.append(start)
                        self._numbers.append(number)
                    start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Path, int, dict]:
        """Raises Dropped for a line that is not a JSON object."""
        path = self._paths[self._files[index]]
        with open(path, "rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Dropped("line is not JSON", f"{path.name}:{self._numbers[index]}: {error}") from error
        if not isinstance(value, dict):
            raise Dropped("line is not a JSON object", f"{path.name}:{self._numbers[index]}")
        return path, self._numbers[index], value


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
        if not content and cell.get("path") and os.path.isfile(cell["path"]):
            content = Path(cell["path"]).read_bytes()
        return row | {"id": str(index if identifier in (None, "") else identifier), "picture": content}


def open_table(data: str, split: str, revision: str | None, columns: Sequence[str], image_column: str):
    """The split of a Hub dataset, or of a folder in the Hub's format or of save_to_disk, or of a .parquet file.

    columns   those that will be read, besides image_column

    Raises ConfigError that names the columns that are missing and those that there are, if possible before a download.
    """
    path, wanted = Path(data).expanduser(), [*columns, image_column]
    try:
        if path.suffix == ".parquet" and path.is_file():
            dataset = datasets.Dataset.from_parquet(str(path))
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            dataset = datasets.load_from_disk(str(path))
            if isinstance(dataset, datasets.DatasetDict):
                if split not in dataset:
                    raise ValueError(f"it has no split {split!r}, but {', '.join(dataset)}")
                dataset = dataset[split]
        else:
            name = str(path) if path.exists() else data
            features = datasets.load_dataset_builder(name, revision=revision).info.features
            if features:  # known from the dataset's README
                _check_columns(data, features, wanted, image_column)
            dataset = datasets.load_dataset(name, split=split, revision=revision)
    except ConfigError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # those of pyarrow and the Hub are these
        what = (
            "cannot be loaded" if path.exists() else "is no file or folder here, and no Hub dataset that can be loaded"
        )
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
