"""What the scripts that prepare public datasets share: rows in, a folder that sayo trains on out.

    OUT/train.jsonl     one example per line, in the order that the seed gives (format: data/examples.py)
    OUT/images/         pictures that were embedded in the source, their encoded bytes unchanged
    OUT/report.json     how many rows were kept, and how many were dropped for which reason
    OUT/settings.json   what the folder was made with; a run with other settings is refused
    OUT/.work/          shards of a run that is not finished; gone when it is

A source is a sequence of rows, read one at a time. Rows are taken in a random order that depends on the seed alone, in
shards of SHARD_ROWS. A worker process writes a shard aside and renames it when it is complete; the parent reads shards
in order until it has enough rows. So an interrupted run goes on where it was, and the result has the same bytes
whatever was interrupted and however many processes there are.
"""

import hashlib
import json
import os
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, fields
from functools import lru_cache
from multiprocessing import parent_process
from pathlib import Path
from random import Random

import numpy as np
from tqdm import tqdm

from config import ConfigError, at_least, option
from data.pictures import DataError
from data.prepare_rows import Dropped, Picture, fit_boxes, inspect_picture, text

SHARD_ROWS = 250
OWN_FILES = ("report.json", "train.jsonl", ".work", "images", "settings.json")  # in the order that --overwrite deletes
SIGHTINGS = 3  # dropped rows that the report names for each reason


@dataclass
class FolderConfig:
    """The fields that every script has.

    paths   names of the fields that may be files or folders
    """

    paths = ()

    out: str | None = option(None, "Folder to write (required). The same command goes on after a stop.")
    seed: int = option(0, "Seed of the order of the rows, and so of a subset.")
    tolerance: float = option(
        0.02, "Clip boxes that stick out by up to this share of their picture's side; drop others."
    )
    num_processes: int | None = option(None, "Processes that read, check and write; as many as there are cores.")
    overwrite: bool = option(
        False, "Delete what this script wrote to `out` and start again; without it, a run goes on."
    )

    def problems(self) -> list[str]:
        """What is wrong, one sentence each. Subclasses add theirs."""
        found = required(self, "out") + at_least(self, 1, "num_processes") + at_least(self, 0, "seed")
        if not 0 <= self.tolerance <= 1:
            found.append(f"tolerance={self.tolerance}: give 0 to 1")
        return found

    def settings(self) -> dict:
        """What the result depends on: fields, files with their sizes."""
        found = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in ("out", "num_processes", "overwrite"):
                continue
            if entry.name in self.paths and value and (path := Path(value).expanduser()).exists():
                value = str(path.resolve())
                if path.is_file():
                    found[f"size of {entry.name}"] = path.stat().st_size
            found[entry.name] = value
        return found


@dataclass
class PrepareConfig(FolderConfig):
    """The fields of a script that prepares one dataset."""

    limit: int | None = option(None, "Keep a random subset of so many rows; all by default.")

    def problems(self) -> list[str]:
        return super().problems() + at_least(self, 1, "limit")


def required(config: FolderConfig, *names: str) -> list[str]:
    """A sentence for every named field that was not given."""
    return [f"{name} is missing: give --{name}" for name in names if not getattr(config, name)]


# ------------------------------------------------------------------------------------------------------- shards

_inspect_path = lru_cache(maxsize=100_000)(inspect_picture)  # many questions are about one picture


@dataclass
class Job:
    """What a worker needs. `rows[i]` is a dict with `id`, `picture` (path, bytes or None) and what `convert` reads."""

    source: str
    rows: Sequence[dict]
    convert: Callable[[dict, Picture], dict]
    out: Path
    store: bool
    tolerance: float


_job: Job | None = None  # of this worker process


def _start_worker(job: Job) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()  # a parent that is killed tells nobody; without this, its workers wait forever
    os._exit(1)


def _work(number: int, indices: list[int]) -> Path:
    return write_shard(_job, number, indices)


def write_shard(job: Job, number: int, indices: list[int]) -> Path:
    """The folder of a shard: rows.jsonl with a record of every row, and the pictures to store. Kept if it exists."""
    folder = job.out / ".work" / f"{number:06d}"
    if folder.exists():
        return folder
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    with open(aside / "rows.jsonl", "w", encoding="utf-8") as file:
        for index in indices:
            file.write(json.dumps(_record(job, index, aside)) + "\n")
    aside.rename(folder)
    return folder


def _record(job: Job, index: int, folder: Path) -> dict:
    """{"id", "example", "identity", "stored"} of a row that can be used, or {"id", "dropped", "detail"}."""
    record = {"id": f"row {index}"}
    try:
        row = job.rows[index]
        record["id"] = text(row["id"], "id")
        content = row["picture"]
        picture = _inspect_path(content) if isinstance(content, Path) else inspect_picture(content)
        made = job.convert(row, picture)
        boxes = fit_boxes(made.pop("boxes"), picture.width, picture.height, job.tolerance)
    except Dropped as dropped:
        return record | {"dropped": dropped.reason, "detail": dropped.detail}
    except RecursionError:
        return record | {"dropped": "row nested too deeply", "detail": ""}
    if isinstance(content, bytes):
        name = hashlib.sha256(content).hexdigest()[:24] + picture.suffix
    else:
        name = content.name
    stored = name if job.store else None
    image = f"images/{name}"
    if not job.store:
        image = Path(os.path.relpath(content.parent.resolve() / name, job.out.resolve())).as_posix()
    if stored and not (folder / stored).exists():
        (folder / stored).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    identity = digest(image, made["question"], made["answer"])
    example = {"id": record["id"], "image": image, **made, "boxes": boxes, "source": job.source}
    return record | {"example": example, "identity": identity, "stored": stored}


def digest(*parts: str) -> str:
    """Stands for the texts where many are remembered: a long one costs no more memory than a short one."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _finished_shards(job: Job, order: np.ndarray, num_processes: int) -> Iterator[Path]:
    """The shards' folders in order, worked on by processes that are a few shards ahead."""
    starts = range(0, len(order), SHARD_ROWS)
    num_processes = min(num_processes, len(starts))
    tasks = ((number, order[start : start + SHARD_ROWS].tolist()) for number, start in enumerate(starts))
    if num_processes <= 1:
        yield from (write_shard(job, *task) for task in tasks)
        return
    waiting = deque()
    with ProcessPoolExecutor(num_processes, initializer=_start_worker, initargs=(job,)) as executor:
        try:
            for task in tasks:
                waiting.append(executor.submit(_work, *task))
                if len(waiting) > 2 * num_processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


# ------------------------------------------------------------------------------------------------------- folder


def random_order(count: int, seed: int) -> np.ndarray:
    """0 to count - 1 in a random order that is the same on every machine and in every version."""
    draw = Random(seed).random  # the one method whose sequence Python promises to keep
    return np.argsort(np.fromiter((draw() for _ in range(count)), float, count), kind="stable")


def write_json(path: Path, value: dict) -> None:
    """Write the file in one step: it is there as a whole or not at all."""
    aside = path.with_name(path.name + ".unfinished")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def claim_folder(out: Path, settings: dict, overwrite: bool, own_files: Sequence[str] = OWN_FILES) -> None:
    """Make the folder of a run, or see that it is this very run's.

    own_files   what the run writes there, settings.json last; a folder with nothing but that may be claimed again

    Raises ConfigError if it is another's, or cannot be made or written.
    """
    try:
        _claim(out, settings, overwrite, own_files)
    except OSError as error:
        fix = "give a new or an empty folder where files can be written"
        raise ConfigError(f"out={str(out)!r:.300} cannot be made or written: {error!s:.300}; {fix}") from error


def _claim(out: Path, settings: dict, overwrite: bool, own_files: Sequence[str]) -> None:
    file, settings = out / "settings.json", json.loads(json.dumps(settings))
    if overwrite and file.exists():
        for name in own_files:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    if any((out / name).exists() for name in own_files[:-1]) and file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
        different = [name for name in sorted({*known, *settings}) if known.get(name) != settings.get(name)]
        if different:
            lines = [f"  {name} was {known.get(name)!r}, now it is {settings.get(name)!r}" for name in different]
            fix = "give the same settings again, another --out, or --overwrite to start again"
            raise ConfigError("\n".join([f"out={str(out)!r} was made with other settings; {fix}:", *lines]))
    elif out.exists() and (not out.is_dir() or any(path != file for path in out.iterdir())):
        raise ConfigError(f"out={str(out)!r} holds something else already: give an empty or a new folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)


def prepare(
    config: PrepareConfig,
    source: str,
    open_rows: Callable[[], Sequence[dict]],
    convert: Callable[[dict, Picture], dict],
    store: bool = False,
) -> dict:
    """Write OUT from the rows of a source and return the report. `open_rows` is not called when OUT is complete.

    convert   pure function: row and picture -> dict with question, answer, boxes in pixels, or raises Dropped
    store     whether pictures are copied to OUT/images; otherwise their paths are relative to OUT

    Raises ConfigError when OUT belongs to another run, DataError when files cannot be read or written, or no
    row is left.
    """
    out = Path(config.out).expanduser()
    claim_folder(out, {"source": source} | config.settings(), config.overwrite)
    if not (out / "report.json").exists():
        try:
            _build(out, config, Job(source, open_rows(), convert, out, store, config.tolerance))
        except OSError as error:
            raise DataError(f"{error}; run the same command again to go on") from error
        except BrokenProcessPool as error:
            fix = "run the same command again to go on, with a smaller --num_processes if memory was short"
            raise DataError(f"a worker process was killed; {fix}") from error
    shutil.rmtree(out / ".work", ignore_errors=True)  # only now: a stop before this line loses nothing
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    print(format_report(report), f"-> {out / 'train.jsonl'}", sep="\n")
    if not store:
        print(f"its pictures stay where they are: give --allowed_folders {config.images} beside it")
    if not report["kept"]:
        raise DataError(f"no row of {source} can be used; the reasons are above, examples are in {out / 'report.json'}")
    return report


def _build(out: Path, config: PrepareConfig, job: Job) -> None:
    """Work on shards until there are enough rows, then write train.jsonl and report.json."""
    work, available = out / ".work", len(job.rows)
    work.mkdir(exist_ok=True)
    (out / "images").mkdir(exist_ok=True) if job.store else None
    if (work / "plan.json").exists() and (before := json.loads((work / "plan.json").read_text())["rows"]) != available:
        raise DataError(
            f"the source had {before} rows before the stop and has {available} now; start again: --overwrite"
        )
    write_json(work / "plan.json", {"rows": available})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    order, kept, dropped, sightings, seen = random_order(available, config.seed), 0, Counter(), {}, set()
    wanted = available if config.limit is None else min(config.limit, available)
    with (
        closing(_finished_shards(job, order, config.num_processes or cores)) as shards,
        open(work / "train.jsonl", "w", encoding="utf-8") as file,
        tqdm(total=wanted, desc=job.source, unit="row" if config.limit is None else "kept row", mininterval=1) as bar,
    ):
        for record in _records(shards):
            if "example" in record:
                keys = {record["identity"], digest(record["id"])}
                if keys & seen:
                    reason = "duplicate (picture, question, answer)" if record["identity"] in seen else "duplicate id"
                    record |= {"dropped": reason, "detail": ""}
                else:
                    seen |= keys
            if "dropped" in record:
                dropped[record["dropped"]] += 1
                examples = sightings.setdefault(record["dropped"], [])
                if len(examples) < SIGHTINGS:
                    examples.append(f"{record['id']}: {record['detail']}".removesuffix(": "))
            else:
                kept += 1
                file.write(json.dumps(record["example"], ensure_ascii=False) + "\n")
                # Moved at once. A run that goes on after a stop comes here again and finds it moved.
                if record["stored"] and record["from"].joinpath(record["stored"]).exists():
                    record["from"].joinpath(record["stored"]).replace(out / "images" / record["stored"])
            bar.update(config.limit is None or "dropped" not in record)
            if kept == config.limit:
                break
    by_count = dict(sorted(dropped.items(), key=lambda entry: (-entry[1], entry[0])))
    report = {"source": job.source, "asked_for": config.limit, "rows_of_source": available}
    report |= {"read": kept + dropped.total(), "kept": kept, "dropped": by_count}
    report["examples_of_dropped"] = {reason: sightings[reason] for reason in by_count}
    (work / "train.jsonl").replace(out / "train.jsonl")
    write_json(out / "report.json", report)


def _records(shards: Iterator[Path]) -> Iterator[dict]:
    """The records of all shards in order, with the folder that each is from."""
    for folder in shards:
        with open(folder / "rows.jsonl", encoding="utf-8") as file:
            yield from (json.loads(line) | {"from": folder} for line in file)


def format_report(report: dict) -> str:
    """The report as a table."""
    lines = [("rows of the source", report["rows_of_source"]), ("read", report["read"]), ("kept", report["kept"])]
    lines += [(f"dropped: {reason}", count) for reason, count in report["dropped"].items()]
    width = max(len(name) for name, _ in lines)
    table = [report["source"], *(f"  {name:{width}}  {count:>9,}" for name, count in lines)]
    if report["asked_for"] is not None and report["kept"] < report["asked_for"]:
        table.append(f"  fewer than the {report['asked_for']:,} rows asked for: the source has no more")
    return "\n".join(table)
