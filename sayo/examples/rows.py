"""The rows of a dataset from any file format, with its columns renamed to sayo's."""

import itertools
import json
import mmap
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from sayo.examples.pictures import DataError, DataFolder
from sayo.examples.regions import nesting

VALID_DATA = (
    "scenes, scenes:validation, scenes:heldout, scenes:newtype, a .jsonl, .json or .parquet file, or a folder or Hub "
    "id (owner/name, or owner/name@revision) that datasets.load_from_disk or datasets.load_dataset reads"
)
HUB_ID = r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./+-]+)?"  # "name", "owner/name", "owner/name@revision"
NAMES = ("id", "image", "images", "question", "answer", "answer_type", "choices", "boxes", "polygons", "mask", "masks")
# Two names for one thing: when one is mapped to a column, a column named like the other is ignored.
SIBLINGS = {"image": "images", "images": "image", "mask": "masks", "masks": "mask"}
REGIONS = ("boxes", "polygons", "mask", "masks")
MAX_COLUMNS = 40  # named in one error message
MAX_DEPTH = 100  # nested lists and objects; Python cannot even print what is nested some 900 deep
MISSING = object()


class Lines(Sequence):
    """The non-blank lines of a text file as bytes; only their offsets and numbers (from 1) are in memory."""

    def __init__(self, path: Path):
        self.numbers, self._starts = array("q"), array("q")
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, 1):
                if line.removeprefix(b"\xef\xbb\xbf").strip():  # a byte order mark is no content
                    self.numbers.append(number)
                    self._starts.append(start)
                start += len(line)
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if start else b""

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        start = self._starts[index]
        end = self._text.find(b"\n", start)
        return self._text[start : end if end >= 0 else len(self._text)].strip()


class Table(Sequence):
    """The rows of a `datasets` table as dicts, with pictures still encoded and class labels by name."""

    def __init__(self, dataset):
        # The default format would decode the pictures.
        self._rows, self._features = dataset.with_format("arrow"), dataset.features

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        return _with_names(self._rows[index].to_pylist()[0], self._features)


def _with_names(value, feature):
    """The value with class labels as names, None for a number without a name, such as -1 for "no label"."""
    if getattr(feature, "_type", None) == "ClassLabel":
        return feature.names[value] if value is not None and 0 <= value < len(feature.names) else None
    if isinstance(feature, dict) and isinstance(value, dict):
        return {name: _with_names(entry, feature[name]) for name, entry in value.items()}
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)  # of the elements of a list
    if inner is not None and isinstance(value, list):
        return [_with_names(entry, inner) for entry in value]
    return value


class Rows:
    """The rows of a dataset as dicts, with the columns that the user mapped under sayo's names.

    name      what they were loaded from
    folder    what relative picture paths count from, and where pictures may lie
    """

    def __init__(self, name: str, rows: Sequence, numbers: Sequence[int], folder: DataFolder):
        self.name, self.folder = name, folder
        self._rows, self._numbers, self._columns = rows, numbers, {}

    def __len__(self) -> int:
        return len(self._rows)

    def label(self, row: int) -> str:
        return f"{Path(self.name).name}:{self._numbers[row]}"

    def __getitem__(self, row: int) -> dict:
        """A row with its id, otherwise unchecked. Raises DataError when it is not an object."""
        parsed = _rename(_parse(self._rows[row]), self._columns)
        given = parsed.get("id")
        return parsed | {"id": self.label(row) if given in (None, "") else str(given)}

    def rename(self, fields: Iterable[str]) -> None:
        """Map columns by "name=column" entries. Raises DataError with all problems and the columns that exist."""
        columns, problems = parse_fields(fields)
        missing, seen = set(columns.values()), {}
        for row in self._rows if missing else ():  # mostly the first row has all of them
            try:
                parsed = _parse(row)
            except DataError:
                continue
            missing = {column for column in missing if _look_up(parsed, column) is MISSING}
            seen |= dict.fromkeys(_column_names(parsed))
            if not missing:
                break
        absent = [(name, column) for name, column in columns.items() if column in missing]
        if problems := problems + [f"{name}={column}: no row has {column!r}" for name, column in absent]:
            listed = [*list(seen)[:MAX_COLUMNS], *(["..."] if len(seen) > MAX_COLUMNS else [])]
            message = "\n  ".join([f"--fields does not fit {self.name}:", *problems])
            raise DataError(message + (f"\ncolumns are: {', '.join(listed)}" if seen else ""))
        self._columns = columns


def parse_fields(fields: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """{name: column} of "name=column" entries, and a message for each entry that is not one."""
    columns, problems = {}, []
    for field in fields:
        name, equals, column = (part.strip() for part in field.partition("="))
        if not equals or not name or not column:
            problems.append(f"{field!r} is not name=column; write for example question=query")
        elif name not in NAMES:
            problems.append(f"{field}: unknown name {name!r}; valid are {', '.join(NAMES)}")
        elif name in columns:
            problems.append(f"{field}: {name} has the column {columns[name]!r} already; give one")
        else:
            columns[name] = column
    return columns, problems


def open_rows(data: str, split: str, allowed_folders: Iterable[str] = ()) -> Rows:
    """The rows of `data`, unchecked. Raises DataError when it cannot be opened."""
    import datasets  # slow: not when a script is imported

    path = Path(os.path.expanduser(data))  # Path.expanduser raises RuntimeError for an unknown user
    # os.path, because Path.exists raises OSError for a name that is too long.
    if path.suffix in (".jsonl", ".json") and os.path.isfile(path):
        return _open_json(data, path, DataFolder(path.parent, allowed_folders))
    exists, (name, _, revision) = os.path.exists(path), data.partition("@")
    if not exists and (path.suffix in (".jsonl", ".json", ".parquet") or not re.fullmatch(HUB_ID, data)):
        raise DataError(f"data {data!r}: there is no such file or folder; valid: {VALID_DATA}")
    if path.is_file() and path.suffix != ".parquet":
        raise DataError(f"data {data!r} is a file of another type; valid: {VALID_DATA}")
    try:
        if path.is_dir() and not is_saved(path):  # its README or configuration may lead `datasets` out of it
            files = datasets.load_dataset_builder(str(path)).config.data_files or {}
            for file in itertools.chain(*files.values()):
                DataFolder(path, allowed_folders).resolve("data file", str(file))
        dataset = open_dataset(path if exists else name, split, revision or None)
    except Exception as error:  # whatever pyarrow, fsspec and the Hub raise
        what = "cannot be loaded" if exists else "is no file or folder here, and no Hub id that can be loaded"
        raise DataError(f"data {data!r} {what} ({type(error).__name__}: {error}); valid: {VALID_DATA}") from error
    caches = [datasets.config.DOWNLOADED_DATASETS_PATH, *([] if exists else [HF_HUB_CACHE])]
    folder = DataFolder(path.parent if path.is_file() else path, allowed_folders, caches)
    return Rows(data, Table(dataset), range(len(dataset)), folder)


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return os.path.isfile(path / "state.json") or os.path.isfile(path / "dataset_dict.json")


def open_dataset(source: str | Path, split: str, revision: str | None = None):
    """The split of a folder of `save_to_disk`, or of a Hub id or other folder; all of a .parquet file.

    Raises ValueError for an unknown split of a saved folder, and whatever `datasets` raises.
    """
    import datasets  # slow: not when a script is imported

    path = Path(os.path.expanduser(source))
    if path.suffix == ".parquet" and os.path.isfile(path):
        return datasets.Dataset.from_parquet(str(path))
    if not is_saved(path):
        return datasets.load_dataset(str(path if os.path.exists(path) else source), split=split, revision=revision)
    dataset = datasets.load_from_disk(str(path))
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise ValueError(f"unknown split {split!r}; valid ones: {', '.join(dataset)}")
    return dataset[split]


def _open_json(data: str, path: Path, folder: DataFolder) -> Rows:
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"data {data!r} is text in UTF-16; save it as UTF-8")
    if path.suffix == ".jsonl":
        lines = Lines(path)
        return Rows(data, lines, lines.numbers, folder)
    try:
        rows = json.loads(path.read_bytes(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        fix = "write one list of objects, or name it .jsonl where every line is one"
        raise DataError(f"data {data!r} is not JSON ({error}); {fix}") from error
    if not isinstance(rows, list):
        what = f"one object with the keys {', '.join(rows)}" if isinstance(rows, dict) else f"{rows!r}"
        raise DataError(f"data {data!r} holds {what:.300}; write one list of objects, [{{...}}, {{...}}]")
    return Rows(data, rows, range(len(rows)), folder)


def _parse(row) -> dict:
    """The dict in a line of JSON (bytes), or a row that is parsed already."""
    try:
        parsed = json.loads(row, object_pairs_hook=_object) if isinstance(row, bytes) else row
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error}): {row[:60]!r}; write one JSON object per line") from error
    if nesting(parsed, list, dict) > MAX_DEPTH:
        fix = 'write one object, {"image": ..., "question": ...}'
        raise DataError(f"nested more than {MAX_DEPTH} lists or objects deep; {fix}")
    if not isinstance(parsed, dict):
        raise DataError(f'not a JSON object: {row!r:.60}; write {{"image": ..., "question": ..., ...}}')
    return parsed


def _object(pairs: list[tuple]) -> dict:
    """A JSON object. Raises ValueError for a repeated key, because JSON does not define which value counts."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r:.100} twice in one object")
    return found


def _rename(row: dict, columns: dict[str, str]) -> dict:
    """The row with the mapped names. A mapped name has no value where its column is missing, whatever the row holds.

    A column that is one of sayo's names is kept under that name, too ("answer=question"), unless both are regions.
    """
    if not columns:
        return row
    moved = {name: _look_up(row, column) for name, column in columns.items()}
    both_regions = {column for name, column in columns.items() if name in REGIONS and column in REGIONS}
    gone = {*columns, *map(SIBLINGS.get, columns), *(set(columns.values()) - set(NAMES)), *both_regions}
    kept = {name: value for name, value in row.items() if name not in gone}
    return kept | {name: value for name, value in moved.items() if value is not MISSING}


def _look_up(value, column: str):
    """The value at a dotted path into dicts, a list of values for a list of dicts; else MISSING."""
    if isinstance(value, list) and value:
        found = [_look_up(entry, column) for entry in value]
        return MISSING if any(entry is MISSING for entry in found) else found
    if not isinstance(value, dict):
        return MISSING
    if column in value:
        return value[column]
    head, dot, rest = column.partition(".")
    return _look_up(value[head], rest) if dot and head in value else MISSING


def _column_names(row: dict, before: str = "") -> list[str]:
    """Columns as --fields names them, nested ones with dots."""
    names = []
    for name, value in row.items():
        nested = value[0] if isinstance(value, list) and value else value
        inner = isinstance(nested, dict) and set(nested) != {"bytes", "path"}  # those two are a picture
        names += _column_names(nested, f"{before}{name}.") if inner else [before + name]
    return names
