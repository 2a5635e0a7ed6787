"""The rows of a dataset from any file format, with its columns renamed to sayo's."""

import ast
import bz2
import csv
import glob
import gzip
import io
import itertools
import json
import lzma
import mmap
import os
import re
import shlex
import shutil
import sys
import tempfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from huggingface_hub.constants import HF_HUB_CACHE

from sayo.examples.pictures import DataError, DataFolder
from sayo.examples.regions import nesting

VALID_DATA = (
    "scenes, scenes:validation, scenes:heldout, scenes:newtype, a .jsonl, .ndjson, .csv, .tsv (each also .gz, .bz2 or "
    ".xz), .json or .parquet file, a pattern for several in one folder ('part-*.jsonl'), or a folder or Hub id "
    "(owner/name, or owner/name@revision) that datasets.load_from_disk or datasets.load_dataset reads"
)
TEXTS = {".jsonl": "lines", ".ndjson": "lines", ".json": "list", ".csv": "table", ".tsv": "table"}
PACKED = (".gz", ".bz2", ".xz")
UNPACKERS = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ": lzma}  # by the first bytes of a file
HUB_ID = r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./+-]+)?"  # "name", "owner/name", "owner/name@revision"
NAMES = ("id", "image", "images", "question", "answer", "answer_type", "choices", "boxes", "polygons", "mask", "masks")
# Two names for one thing: when one is mapped to a column, a column named like the other is ignored.
SIBLINGS = {"image": "images", "images": "image", "mask": "masks", "masks": "mask"}
REGIONS = ("boxes", "polygons", "mask", "masks")
NEEDED = ("image", "question", "answer")
ALIASES = {  # columns of public data sets, to suggest
    "image": "image image_path img img_path image_file file_name filename image_name photo picture",
    "images": "images image_paths img_paths pictures",
    "question": "question query problem prompt.0.content conversations.0.value messages.0.content prompt text",
    "answer": "answer label solution reward_model.ground_truth ground_truth gt_answer gt answers target response "
    "conversations.1.value messages.1.content",
    "choices": "choices options candidates",
    "boxes": "boxes bbox bboxes box objects.bbox",
}
LISTS = ("images", "choices", "boxes", "polygons", "masks")  # a table of texts has them as text
MAX_COLUMNS = 40  # named in one error message
MAX_DEPTH = 100  # nested lists and objects; Python cannot even print what is nested some 900 deep
MISSING = object()


class Lines(Sequence):
    """The non-blank lines of a text file as bytes; only their offsets and numbers (from 1) are in memory."""

    def __init__(self, path: Path):
        self.numbers, self._starts = array("q"), array("q")
        with open_text(path) as file:
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


class Joined(Sequence):
    """Several sequences, one after the other."""

    def __init__(self, parts: list[Sequence]):
        self._parts, self._starts = parts, list(itertools.accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def place(self, index: int) -> tuple[int, int]:
        """(part, index in it)."""
        part = bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]

    def __getitem__(self, index: int):
        part, inner = self.place(range(len(self))[index])
        return self._parts[part][inner]


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
    if getattr(feature, "dtype", None) == "float16" and value is not None:
        return float(str(np.float16(value)))  # 0.1, not 0.0999755859375
    if isinstance(feature, dict) and isinstance(value, dict):
        return {name: _with_names(entry, feature[name]) for name, entry in value.items()}
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)  # of the elements of a list
    if inner is not None and isinstance(value, list) and getattr(inner, "dtype", None) != "float16":
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
        parsed |= {name: _list_in(parsed[name]) for name in LISTS if isinstance(parsed.get(name), str)}
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

    def check_columns(self) -> None:
        """Raise DataError when no row has a picture, a question or an answer, but one that has it by another name."""
        missing, first = set(NEEDED), None
        for row in range(len(self)):
            try:
                found = self[row]
            except DataError:
                continue
            missing -= {name for name in NEEDED if found.get(name) is not None}
            missing -= {"image"} if found.get("images") is not None else set()
            if not missing:
                return
            first = first or found
        if first and (fits := _suggested(first, missing)):
            columns = ", ".join(_column_names(first)[:MAX_COLUMNS])
            given = [f"{name}={column}" for name, column in self._columns.items()]
            rest = sorted(missing - {"image" if name == "images" else name for name in fits})
            every = given + [f"{name}={column}" for name, column in fits.items()] + [f"{name}=COLUMN" for name in rest]
            names = ", ".join(sorted(missing))
            message = f"data {self.name!r}: no row has {names}; its columns are: {columns}"
            raise DataError(f"{message}\nthis may fit: --fields {shlex.join(every)}")


def _suggested(row: dict, missing: set[str]) -> dict[str, str]:
    """{name: column} for missing names, and then also for boxes and choices, that a column seems to hold."""
    columns, found = {name.lower(): name for name in _column_names(row)}, {}
    for name, aliases in ALIASES.items():
        if row.get(name) is None and (name in missing or name not in NEEDED):
            known = [columns.get(alias, alias) for alias in aliases.split()]
            if holding := [column for column in known if _look_up(row, column) not in (None, MISSING)]:
                found[name] = holding[0]
    if "image" in found or "image" not in missing:
        found.pop("images", None)
    return found if found.keys() & {*missing, "images"} else {}


class Files(Rows):
    """The rows of several files in one folder."""

    def __init__(self, name: str, files: list[Rows]):
        super().__init__(name, Joined([file._rows for file in files]), (), files[0].folder)
        self._files = files

    def label(self, row: int) -> str:
        file, inner = self._rows.place(row)
        return self._files[file].label(inner)


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
    exists, (name, _, revision) = os.path.exists(path), data.partition("@")
    if not exists and glob.has_magic(data):
        return _open_files(data, sorted(glob.glob(str(path))), split, allowed_folders)
    if not exists and (_kind(path) or not re.fullmatch(HUB_ID, data)):
        raise DataError(f"data {data!r}: there is no such file or folder; valid: {VALID_DATA}")
    if path.is_file() and not (kind := _kind(path) or _kind(Path(os.path.realpath(path)))):
        raise DataError(f"data {data!r} is a file of another type; valid: {VALID_DATA}")
    if path.is_file() and kind != "parquet":
        return Rows(data, *_open_text(data, path, kind), DataFolder.of_file(path, allowed_folders))
    caches = [datasets.config.DOWNLOADED_DATASETS_PATH, *([] if exists else [HF_HUB_CACHE])]
    is_folder = path.is_dir() or not exists
    folder = DataFolder(path, allowed_folders, caches) if is_folder else DataFolder.of_file(path, allowed_folders)
    try:
        files = data_files(path, split, folder) if path.is_dir() else []
        if files and all(_kind(file) in TEXTS.values() for file in files):  # `datasets` would guess types: dates, 007
            rows = Joined([_open_text(data, file, _kind(file))[0] for file in files])
            return Rows(data, rows, range(len(rows)), folder)
        dataset = open_dataset(path if exists else name, split, revision or None)
    except Exception as error:  # whatever pyarrow, fsspec and the Hub raise
        what = "cannot be loaded" if exists else "is no file or folder here, and no Hub id that can be loaded"
        raise DataError(f"data {data!r} {what} ({type(error).__name__}: {error}); valid: {VALID_DATA}") from error
    return Rows(data, Table(dataset), range(len(dataset)), folder)


def _open_files(data: str, paths: list[str], split: str, allowed_folders: Iterable[str]) -> Rows:
    """The rows of all files that a pattern names."""
    if not paths:
        raise DataError(f"data {data!r}: no file has such a name; valid: {VALID_DATA}")
    if folders := [path for path in paths if os.path.isdir(path)] or sorted(set(map(os.path.dirname, paths)))[1:]:
        raise DataError(f"data {data!r} reaches into several folders, among them {folders[0]!r}; give files of one")
    return Files(data, [open_rows(path, split, allowed_folders) for path in paths])


def data_files(path: Path, split: str, folder: DataFolder) -> list[Path]:
    """The files of a split of a folder that `datasets` finds by itself; [] for a folder of `save_to_disk`.

    Raises DataError when the folder's README, its state.json or a link leads to a file outside of `folder`.
    """
    import datasets  # slow: not when a script is imported

    if is_saved(path):
        files, own = {}, list(_saved_files(path))
    else:
        files = datasets.load_dataset_builder(str(path)).config.data_files or {}
        own = itertools.chain(*files.values())
    for file in own:
        folder.resolve("data file", str(file))
    return list(map(Path, files.get(split, ())))


def _saved_files(path: Path) -> Iterable[Path]:
    """The files that `datasets.load_from_disk` reads."""
    splits = path / "dataset_dict.json"
    yield from (file for file in (splits, path / "state.json", path / "dataset_info.json") if os.path.lexists(file))
    if os.path.isfile(path / "state.json"):
        state = json.loads((path / "state.json").read_bytes())
        yield from (path / file["filename"] for file in state["_data_files"])
    elif os.path.isfile(splits):
        for name in json.loads(splits.read_bytes())["splits"]:
            yield path / name
            yield from _saved_files(path / name)


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return os.path.isfile(path / "state.json") or os.path.isfile(path / "dataset_dict.json")


def open_dataset(source: str | Path, split: str, revision: str | None = None):
    """The split of a folder of `save_to_disk`, or of a Hub id or other folder; all of a .parquet file.

    Raises ValueError for an unknown split of a saved folder, and whatever `datasets` raises.
    """
    import datasets  # slow: not when a script is imported

    path = Path(os.path.expanduser(source))
    if _kind(path) != "parquet" and os.path.islink(path):  # a link may be called anything
        path = Path(os.path.realpath(path))
    if _kind(path) == "parquet" and os.path.isfile(path):
        return datasets.Dataset.from_parquet(str(path))
    if not is_saved(path):
        return datasets.load_dataset(str(path if os.path.exists(path) else source), split=split, revision=revision)
    dataset = datasets.load_from_disk(str(path))
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise ValueError(f"unknown split {split!r}; valid ones: {', '.join(dataset)}")
    return dataset[split]


def _kind(path: Path) -> str:
    """What a data file is by its name: "lines", "list", "table", "parquet"; "" for something else."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    return TEXTS.get(Path(path.stem).suffix.lower() if suffix in PACKED else suffix, "")


def open_text(path: Path):
    """A text file, open for reading bytes; a packed one is unpacked to a temporary file. Raises DataError."""
    file = path.open("rb")
    start = file.read(5)
    file.seek(0)
    for unpacker in (unpacker for magic, unpacker in UNPACKERS.items() if start.startswith(magic)):
        try:
            with file, unpacker.open(file) as packed:
                file = tempfile.TemporaryFile()
                shutil.copyfileobj(packed, file)
                file.seek(0)
        except Exception as error:  # OSError, EOFError, and what the packers have of their own
            raise DataError(f"data {str(path)!r} cannot be unpacked ({error}); pack it again") from error
    if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"data {str(path)!r} is text in UTF-16; save it as UTF-8")
    file.seek(0)
    return file


def _open_text(data: str, path: Path, kind: str) -> tuple[Sequence, Sequence[int]]:
    """(rows, their numbers) of a text file; the first line of a file has the number 1."""
    if kind == "lines":
        lines = Lines(path)
        return lines, lines.numbers
    with open_text(path) as file:
        if kind == "table":
            return _open_table(data, file)
        try:
            rows = json.loads(file.read(), object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            fix = "write one list of objects, or name it .jsonl where every line is one"
            raise DataError(f"data {data!r} is not JSON ({error}); {fix}") from error
    if not isinstance(rows, list):
        what = f"one object with the keys {', '.join(rows)}" if isinstance(rows, dict) else f"{rows!r}"
        raise DataError(f"data {data!r} holds {what:.300}; write one list of objects, [{{...}}, {{...}}]")
    return rows, range(len(rows))


def _open_table(data: str, file) -> tuple[list[dict], list[int]]:
    """(rows, lines that they begin in) of a .csv or .tsv file: every cell is text, an empty one absent."""
    csv.field_size_limit(sys.maxsize)
    rows, numbers = [], []
    try:
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        separator = max(",;\t", key=text.readline().count)
        text.seek(0)
        reader = csv.DictReader(text, delimiter=separator, strict=True)
        names = reader.fieldnames or []
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(f"data {data!r} has two columns with the name {twice[0]!r}; name each in its first line")
        for row in reader:
            rows.append({name: cell or None for name, cell in row.items()})
            numbers.append(reader.line_num - sum(str(cell).count("\n") for cell in row.values()))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"data {data!r} is no table in UTF-8 with one row per line ({error}); save it as one"
        ) from error
    return rows, numbers


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
    if None in parsed:  # of csv.DictReader
        raise DataError(
            f"cells {parsed[None]!r:.100} are beyond the names in the first line; quote cells with separators"
        )
    return parsed


def _list_in(text: str):
    """The list or object that a text spells in JSON or Python, otherwise the text."""
    for read in (json.loads, ast.literal_eval) if text.lstrip()[:1] in ("[", "{") else ():
        try:
            found = read(text.strip())
            return found if nesting(found, list, dict) <= MAX_DEPTH else text
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return text


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
    """The value at a dotted path (`label.text`, `turns.0.text`), every value for a list of dicts; else MISSING."""
    if isinstance(value, list) and value:
        found = [_look_up(entry, column) for entry in value]
        number, dot, rest = column.partition(".")
        if any(entry is MISSING for entry in found) and re.fullmatch("-?[0-9]{1,4}", number):
            entry = value[int(number)] if -len(value) <= int(number) < len(value) else MISSING
            return _look_up(entry, rest) if dot else entry
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
