"""What the preparation scripts share: rows of a source in, a folder that sayo trains on out.

    OUT/train.jsonl     one example per line, in the order that the seed gives (format: docs/data.md)
    OUT/images/         pictures that were embedded in the source, their encoded bytes unchanged
    OUT/report.json     number of rows kept, and of rows dropped by reason
    OUT/settings.json   settings of the run; a run with other settings is refused
    OUT/.work/          records of an unfinished run, one for each row read; removed at the end

Rows are taken in a random order that depends on the seed alone. Threads read them and decode their pictures ahead, and
records are appended to .work/records.jsonl in order. A resumed run reads them back and continues with the next row. So
the result has the same bytes however often the run was interrupted and however many threads it has.
"""

import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from data.prepare.rows import Dropped, fit_boxes, inspect_picture, text
from sayo.examples.pictures import DataError
from sayo.settings import ConfigError, Settings, option

OWN_FILES = ("report.json", "train.jsonl", ".work", "images", "settings.json")  # in the order that --overwrite deletes
EXAMPLES_OF_DROPPED = 3  # rows that the report names for each reason
ROWS_PER_THREAD = 16  # of a block
inspect_path = lru_cache(maxsize=100_000)(inspect_picture)  # many questions are about one picture


@dataclass
class FolderConfig(Settings):
    """The fields of every preparation script.

    source   name of the data set, in reports and examples
    needed   names of the fields that must be given
    paths    names of the fields that may be files or folders; `images` must be a folder
    """

    source, needed, paths = "", ("out",), ()

    out: str | None = option(None, "Folder to write (required). The same command resumes an interrupted run.")
    seed: int = option(0, "Seed of the order of the rows, and so of a subset.", at_least=0)
    tolerance: float = option(
        0.02, "Clip boxes up to this share of a side outside; drop others.", at_least=0, at_most=1
    )
    num_processes: int | None = option(None, "Threads that decode pictures; default: one per core.", at_least=1)
    overwrite: bool = option(False, "Delete what this script wrote to `out` and start again instead of resuming.")

    @property
    def folder(self) -> Path:
        return Path(self.out).expanduser()

    def problems(self) -> list[str]:
        missing = [f"{name} is missing: give --{name}" for name in self.needed if not getattr(self, name)]
        found, images = missing + super().problems(), "images" in self.paths and self.images
        if images and not Path(images).expanduser().is_dir():
            found.append(f"images={images!r}: there is no such folder")
        return found

    def settings(self) -> dict:
        """What the result depends on: the source, fields, and the sizes of files."""
        found = {"source": self.source}
        for name in [entry.name for entry in fields(self) if entry.name not in ("out", "num_processes", "overwrite")]:
            value = getattr(self, name)
            if name in self.paths and value and (path := Path(value).expanduser()).exists():
                value = str(path.resolve())
                if path.is_file():
                    found[f"size of {name}"] = path.stat().st_size
            found[name] = value
        return found


@dataclass
class PrepareConfig(FolderConfig):
    """The fields of a script that prepares one data set. Its subclass has two more methods:

    open_rows()             a sequence of dicts with `id`, `picture` (path, bytes or None) and what `convert` reads
    convert(row, picture)   a dict with question, answer, and boxes in pixels; a pure function that may raise Dropped

    copy_images   whether pictures are copied to OUT/images; otherwise their paths are relative to OUT
    """

    copy_images = True

    limit: int | None = option(None, "Keep a random subset of so many rows; all by default.", at_least=1)


def random_order(count: int, seed: int) -> np.ndarray:
    """0 to count - 1 in a random order that is the same on every machine and in every version."""
    draw = Random(seed).random  # the one method whose sequence Python promises to keep
    return np.argsort(np.fromiter((draw() for _ in range(count)), float, count), kind="stable")


def write_json(path: Path, value: dict) -> None:
    """Write the file in one step: it is there as a whole or not at all."""
    aside = path.with_name(path.name + ".unfinished")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def claim_folder(config: FolderConfig, own_files: Sequence[str] = OWN_FILES) -> None:
    """Make the folder of a run, or check that it belongs to this very run.

    own_files   what the run writes there, settings.json last; a folder with nothing but that may be claimed again

    Raises ConfigError if it belongs to another run, or cannot be made or written.
    """
    out, file = config.folder, config.folder / "settings.json"
    settings = json.loads(json.dumps(config.settings()))
    try:
        if config.overwrite and file.exists():
            for name in own_files:
                shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
        if any((out / name).exists() for name in own_files[:-1]) and file.exists():
            known = json.loads(file.read_text(encoding="utf-8"))
            both = [(name, known.get(name), settings.get(name)) for name in sorted({*known, *settings})]
            if lines := [f"  {name} was {then!r}, now it is {now!r}" for name, then, now in both if then != now]:
                fix = "give the same settings again, another --out, or --overwrite to start again"
                raise ConfigError("\n".join([f"out={str(out)!r} was made with other settings; {fix}:", *lines]))
        elif out.exists() and (not out.is_dir() or any(path != file for path in out.iterdir())):
            raise ConfigError(f"out={str(out)!r} holds something else already: give an empty or a new folder")
        else:
            out.mkdir(parents=True, exist_ok=True)
            write_json(file, settings)
    except OSError as error:
        fix = "give a new or an empty folder where files can be written"
        raise ConfigError(f"out={str(out)!r:.300} cannot be made or written: {error!s:.300}; {fix}") from error


def prepare(config: PrepareConfig, rows: Sequence[dict] | None = None) -> dict:
    """Write OUT from the rows, which are opened if OUT is not complete, and return the report.

    Raises ConfigError if OUT belongs to another run, DataError if files cannot be read or written, or no row is left.
    """
    out = config.folder
    claim_folder(config)
    if not (out / "report.json").exists():
        try:
            _build(config, config.open_rows() if rows is None else rows)
        except OSError as error:
            raise DataError(f"{error}; run the same command again to resume") from error
    shutil.rmtree(out / ".work", ignore_errors=True)  # only now: a stop before this line loses nothing
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    print(format_report(report), f"-> {out / 'train.jsonl'}", sep="\n")
    if not config.copy_images:
        print(f"its pictures stay where they are: give --allowed_folders {config.images} beside it")
    if not report["kept"]:
        where = f"the reasons are above, examples are in {out / 'report.json'}"
        raise DataError(f"no row of {config.source} can be used; {where}")
    return report


def _build(config: PrepareConfig, rows: Sequence[dict]) -> None:
    """Read rows until there are enough, then write train.jsonl and report.json."""
    out, work, by_row = config.folder, config.folder / ".work", config.limit is None
    for folder in (work, out / "images") if config.copy_images else (work,):
        folder.mkdir(exist_ok=True)
    read, kept, seen = 0, 0, set()
    shown = {"desc": config.source, "unit": "row" if by_row else "kept row", "mininterval": 1}
    shown["total"] = len(rows) if by_row else min(config.limit, len(rows))
    with open(work / "records.jsonl", "a+b") as log, tqdm(**shown) as bar:

        def count(record: dict) -> None:
            nonlocal read, kept
            read, kept = read + 1, kept + ("dropped" not in record)
            seen.update(() if "dropped" in record else _identities(record).values())
            bar.update(by_row or "dropped" not in record)

        former = _records(log)
        before = (next(former, None) or _append(log, {"rows": len(rows)}))["rows"]
        if before != len(rows):
            found = f"the source had {before} rows before the stop and has {len(rows)} now"
            raise DataError(f"{found}; start again: --overwrite")
        for record in former:
            count(record)
        order = random_order(len(rows), config.seed)[read:].tolist() if kept != config.limit else []
        for record, picture in _read_rows(config, rows, order):
            if "dropped" not in record:
                repeated = [reason for reason, name in _identities(record).items() if name in seen]
                if repeated:
                    record = {"id": record["id"], "dropped": repeated[0], "detail": ""}
                elif config.copy_images and not (out / record["image"]).exists():
                    (work / "picture").write_bytes(picture if isinstance(picture, bytes) else picture.read_bytes())
                    (work / "picture").replace(out / record["image"])
            count(_append(log, record))
            if kept == config.limit:
                break
        _write_results(config, len(rows), islice(_records(log), 1, None))


def _read_rows(config: PrepareConfig, rows: Sequence[dict], order: Sequence[int]) -> Iterator[tuple]:
    """What _read_row gives for every index, in order; threads share a block of rows at a time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    num_threads = config.num_processes or cores
    block = ROWS_PER_THREAD * num_threads
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(order), block):
            yield from pool.map(partial(_read_row, config, rows), order[start : start + block])


def _read_row(config: PrepareConfig, rows: Sequence[dict], index: int) -> tuple[dict, Path | bytes | None]:
    """The record of a row, an example or {"id", "dropped", "detail"}, and its picture."""
    identifier = f"row {index}"
    try:
        row = rows[index]
        identifier, content = text(row["id"], "id"), row["picture"]
        picture = inspect_path(content) if isinstance(content, Path) else inspect_picture(content)
        made = config.convert(row, picture)
        boxes = fit_boxes(made.pop("boxes"), picture.width, picture.height, config.tolerance)
    except (Dropped, RecursionError) as error:
        dropped = error if isinstance(error, Dropped) else Dropped("row nested too deeply")
        return {"id": identifier, "dropped": dropped.reason, "detail": dropped.detail}, None
    if isinstance(content, bytes):
        image = f"images/{hashlib.sha256(content).hexdigest()[:24]}{picture.suffix}"
    elif config.copy_images:
        image = f"images/{content.name}"
    else:
        image = Path(os.path.relpath(content.parent.resolve() / content.name, config.folder.resolve())).as_posix()
    return {"id": identifier, "image": image, **made, "boxes": boxes, "source": config.source}, content


def _identities(example: dict) -> dict[str, str]:
    """Hashes of what no two examples may share, by the reason to drop the second one."""
    whole = [example[name] for name in ("image", "question", "answer")]
    shared = {"duplicate (picture, question, answer)": whole, "duplicate id": [example["id"]]}
    return {reason: hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:20] for reason, texts in shared.items()}


def _records(log: BinaryIO) -> Iterator[dict]:
    """The lines of the log. A killed run may have written the last one in part, which is then removed."""
    end = log.seek(0)
    with suppress(ValueError):
        for line in log:
            record = json.loads(line if line.endswith(b"\n") else b"")
            end += len(line)
            yield record
    log.truncate(end)


def _append(log: BinaryIO, record: dict) -> dict:
    """Add a line to the log, where it survives the process."""
    log.write(json.dumps(record).encode() + b"\n")
    log.flush()
    return record


def _write_results(config: PrepareConfig, num_rows: int, records: Iterable[dict]) -> None:
    """Write train.jsonl and, last, report.json."""
    kept, dropped, named = 0, Counter(), defaultdict(list)
    with open(config.folder / ".work" / "train.jsonl", "w", encoding="utf-8") as file:
        for record in records:
            if "dropped" not in record:
                kept += 1
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                continue
            dropped[record["dropped"]] += 1
            if len(named[record["dropped"]]) < EXAMPLES_OF_DROPPED:
                named[record["dropped"]].append(f"{record['id']}: {record['detail']}".removesuffix(": "))
    (config.folder / ".work" / "train.jsonl").replace(config.folder / "train.jsonl")
    by_count = dict(sorted(dropped.items(), key=lambda entry: (-entry[1], entry[0])))
    report = {"source": config.source, "asked_for": config.limit, "rows_of_source": num_rows}
    report |= {"read": kept + dropped.total(), "kept": kept, "dropped": by_count}
    report["examples_of_dropped"] = {reason: named[reason] for reason in by_count}
    write_json(config.folder / "report.json", report)


def format_report(report: dict) -> str:
    """The report as a table."""
    lines = [("rows of the source", report["rows_of_source"]), ("read", report["read"]), ("kept", report["kept"])]
    lines += [(f"dropped: {reason}", count) for reason, count in report["dropped"].items()]
    width = max(len(name) for name, _ in lines)
    table = [report["source"], *(f"  {name:{width}}  {count:>9,}" for name, count in lines)]
    if report["asked_for"] is not None and report["kept"] < report["asked_for"]:
        table.append(f"  fewer than the {report['asked_for']:,} rows asked for: the source has no more")
    return "\n".join(table)
