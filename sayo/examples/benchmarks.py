"""The paper's nine benchmarks as examples, from the Hub or a local copy.

Columns and splits are those that the paper's released loaders read (Cratileo/Sayo, eval/utils/data_loaders.py), unless
noted. None was downloaded here; the notes say what else confirms a format.

    mme_realworld_lite  Question_id, Text, "Answer choices" ("(A) 24%", ...), "Ground truth", Image: a file name. The
                  Hub's copy for lmms-eval has index, question, "multi-choice options", answer, bytes (base64) instead
    m3cot         id, question, choices, answer (a letter), image; rows without a picture are dropped, as in the paper
    vstar         question_id, text (with the options), label, image: a path; a picture in lmms-lab's copy. The JSON
                  beside each picture has bbox, [x, y, w, h] in pixels (confirmed in other projects): the region
    mmstar        index, question, answer, image. The question contains the options, as "Options: A: ..., B: ..." or,
                  from MathVista, as "Choices:" with "(A) ..." on separate lines (confirmed in other loaders)
    mathvision    id, question, options (may be empty), answer (a letter, or LaTeX), decoded_image
    wemath        ID, key, question, option ("A. ...;B. ...;"), answer, image_path: a picture on the Hub, a path in the
                  repository. The score is plain accuracy, as in the paper's script, not We-Math's strict score
    chartqa       question, answer, image, as lmms-lab uploaded it; query and label in HuggingFaceM4/ChartQA
    ai2d          question, options, answer (an index from 0), image
    charxiv       original_id, reasoning_q, reasoning_a, image. Graded as text or number, where the benchmark asks a GPT
                  judge and the paper's script has its own text rules: scores are not comparable
    mme_realworld the columns of the lite one, all English questions; the paper's table has the lite one

The paper's script accepts a multiple-choice answer that contains the right letter anywhere, and grades ChartQA without
its tolerance (eval/score.py), so the paper's figures are a guide, not directly comparable.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from sayo.examples.benchmark_rows import BenchmarkRows, column_of
from sayo.examples.load import Examples, checked_examples
from sayo.examples.pictures import DataError, DataFolder
from sayo.examples.rows import Rows, data_files, open_dataset

SHORT = "{question}\nAnswer with a word, a number or a short phrase."


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. A column is "a|b" for whichever of them a copy has, "a@b" for both joined, "" for none."""

    source: str  # on the Hub
    split: str  # of a copy that `datasets` reads as a whole
    id: str = "id"
    image: str = "image"
    question: str = "question"
    answer: str = "answer"
    choices: str = ""
    options_inside: bool = False  # the question contains the choices
    index: bool = False  # the answer is the index of a choice
    template: str = "{question}"
    answer_type: str | None = None  # of answers without choices, see sayo/grader/grader.py
    files: Sequence[str] = ()  # data files of a local copy: the first pattern that matches; if none, `datasets` decides
    pictures: Sequence[str] = (".",)  # folders of a local copy that picture paths may count from
    paths: bool = False  # the Hub has pictures as files, so the whole repository is downloaded
    pictureless: bool = False  # rows without a picture are dropped, not an error
    boxes: Callable[[dict, DataFolder | None], list] | None = None  # (row, folder) -> [[x, y, width, height], ...]


def _boxes_beside_picture(row: dict, folder: DataFolder | None) -> list:
    """The boxes in the JSON file that V* has beside each picture; [] without one."""
    if folder is None or not isinstance(row["image"], str):
        return []
    path = Path(folder.resolve("annotation", str(Path(row["image"]).with_suffix(".json"))))
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("bbox") or []
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path.name} is not the annotation of a picture: {error}; download it again") from error


_MME_REALWORLD = {
    "split": "train", "id": "Question_id|index", "image": "Image|bytes", "question": "Text|question",
    "answer": "Ground truth|answer", "choices": "Answer choices|multi-choice options",
    "pictures": ("data/imgs", "imgs", "data", "."),
}  # fmt: skip
BENCHMARKS = {
    "mme_realworld_lite": Benchmark("yifanzhang114/MME-RealWorld-lite-lmms-eval", **_MME_REALWORLD,
        files=("data/MME-RealWorld-Lite.json", "MME-RealWorld-Lite.json")),
    "m3cot": Benchmark("LightChen2333/M3CoT", "test", choices="choices", pictureless=True),
    "vstar": Benchmark("craigwu/vstar_bench", "test", id="question_id", question="text", answer="label",
        options_inside=True, files=("test_questions.jsonl",), paths=True, boxes=_boxes_beside_picture),
    "mmstar": Benchmark("Lin-Chen/MMStar", "val", id="index", options_inside=True, files=("mmstar.parquet",)),
    "mathvision": Benchmark("MathLLMs/MathVision", "test", image="decoded_image", choices="options",
        answer_type="math", files=("data/test-*.parquet",)),
    "wemath": Benchmark("We-Math/We-Math", "testmini", id="ID@key", image="image_path", choices="option",
        files=("testmini.json", "data/testmini.json"), pictures=(".", "data")),
    "chartqa": Benchmark("lmms-lab/ChartQA", "test", id="", question="question|query", answer="answer|label",
        template=SHORT, answer_type="relaxed_number"),
    "ai2d": Benchmark("lmms-lab/ai2d", "test", id="", choices="options", index=True),
    "charxiv": Benchmark("princeton-nlp/CharXiv", "validation", id="original_id", question="reasoning_q",
        answer="reasoning_a", template=SHORT, files=("val.parquet",)),
    "mme_realworld": Benchmark("yifanzhang114/MME-RealWorld-Lmms-eval", **_MME_REALWORLD,
        files=("MME_RealWorld.json", "data/MME_RealWorld.json")),
}  # fmt: skip
PAPER_NINE = tuple(BENCHMARKS)[:9]  # the columns of the paper's table, in its order
# Percent; SAYO, arXiv 2602.08241, its main table: the base model, and the model trained from it.
PUBLISHED = {
    "Qwen3-VL-4B": ((56.80, 65.10, 79.06, 60.80, 21.64, 55.63, 80.12, 75.16, 38.00),
                    (57.63, 64.32, 83.25, 63.53, 22.47, 63.97, 81.96, 80.51, 41.90)),
    "Qwen3-VL-8B": ((56.23, 64.71, 81.15, 62.60, 22.20, 52.64, 78.96, 75.55, 42.70),
                    (62.85, 68.46, 82.20, 65.27, 25.26, 64.83, 81.84, 83.06, 42.50)),
    "InternVL3.5-8B": ((45.34, 54.70, 73.82, 60.27, 13.82, 20.06, 79.12, 73.22, 34.10),
                       (50.03, 57.20, 72.77, 62.73, 13.62, 25.23, 82.28, 76.88, 43.20)),
}  # fmt: skip


def published(model: str) -> dict[str, tuple[float, float]]:
    """{benchmark: (base, trained)} in percent from the paper for a model of this name; {} if it is not in there.

    Example: "Qwen/Qwen3-VL-8B-Instruct" gets the paper's row of Qwen3-VL-8B, "Qwen/Qwen3-VL-8B-Thinking" nothing.
    """
    name = Path(model).name.lower().replace("_", ".").removesuffix("-hf").removesuffix("-instruct")
    figures = {known.lower(): rows for known, rows in PUBLISHED.items()}
    return dict(zip(PAPER_NINE, zip(*figures[name], strict=True), strict=True)) if name in figures else {}


def local_copies(names: Sequence[str], roots: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """{benchmark: folder or file} from --benchmark_root entries (DIR or name=path), and messages about bad entries.

    A benchmark in a DIR may have its own name or that of its Hub repository.
    """
    found, problems, parents = {}, [], []
    for root in roots:
        name, equals, path = root.partition("=")
        named = bool(equals) and name in BENCHMARKS
        place = Path(os.path.expanduser(path if named else root))
        if named:
            found[name] = place
            problems += [] if os.path.exists(place) else [f"benchmark_root={root!r}: there is no {path!r}"]
        elif os.path.isdir(place):
            parents.append(place)
        else:
            fix = f"give a folder that exists, or name=path; names: {', '.join(BENCHMARKS)}"
            problems.append(f"benchmark_root={root!r}: {fix}")
    for name in [name for name in names if parents and name not in found]:
        wanted = (name, Path(BENCHMARKS[name].source).name)
        if places := [parent / place for parent in parents for place in wanted if (parent / place).exists()]:
            found[name] = places[0]
        else:
            fix = f"give {name}=path, or leave benchmark_root out to read {BENCHMARKS[name].source} from the Hub"
            problems.append(f"benchmark_root: no {' or '.join(wanted)} in {', '.join(map(str, parents))}; {fix}")
    return found, problems


def load_benchmark(
    name: str,
    *,
    copy: Path | None = None,
    limit: int | None = None,
    bad_rows: str = "error",
    allowed_folders: Sequence[str] | None = None,
    revision: str | None = None,
) -> Examples:
    """The checked examples of a benchmark, one of BENCHMARKS.

    copy       a local folder or data file; None for the Hub or its cache
    revision   branch, tag or commit on the Hub
    limit, bad_rows, allowed_folders   as for load_examples

    Raises DataError when the copy cannot be opened, has other columns, or has bad rows.
    """
    benchmark = BENCHMARKS[name]
    try:
        dataset, path = _open(benchmark, copy, revision, allowed_folders or ())
    except Exception as error:  # whatever pyarrow, fsspec and the Hub raise
        where = str(copy) if copy else f"{benchmark.source} of the Hub"
        hint = "" if copy else f"; download it and give --benchmark_root {name}=FOLDER"
        raise DataError(f"{name}: {where} cannot be read ({type(error).__name__}: {error}){hint}") from error
    if benchmark.pictureless:
        dataset = _with_pictures(name, dataset, column_of(benchmark, "image", dataset.column_names))
    folder = DataFolder(path or Path(), allowed_folders or ())
    rows = BenchmarkRows(benchmark, dataset, path and folder)
    numbered = Rows(name, rows, range(len(rows)), folder)
    examples = checked_examples(numbered, "xywh", limit=limit, bad_rows=bad_rows, require_boxes=False)
    if kept := len(rows.unparsed):
        print(f"{name}: options of {kept} questions stay in their text, graded by letter", file=sys.stderr)
    return examples


def _open(benchmark: Benchmark, copy: Path | None, revision: str | None, allowed_folders: Sequence[str]) -> tuple:
    """The rows, and the folder that picture paths count from; None for a table from the Hub."""
    if copy is None and benchmark.paths:
        from huggingface_hub import snapshot_download

        copy = Path(snapshot_download(benchmark.source, repo_type="dataset", revision=revision))
    if copy is None:
        return open_dataset(benchmark.source, benchmark.split, revision), None
    copy = copy.expanduser().absolute()
    folder, patterns = (copy.parent, [copy.name]) if copy.is_file() else (copy, benchmark.files)
    files = next(filter(None, (sorted(map(str, folder.glob(pattern))) for pattern in patterns)), None)
    inside = (DataFolder.of_file if copy.is_file() else DataFolder)(copy, allowed_folders)
    if files is None:
        data_files(copy, benchmark.split, inside)
        return open_dataset(copy, benchmark.split), folder
    for file in files:
        inside.resolve("data file", file)
    import datasets  # slow: not when a script is imported

    kind = "parquet" if files[0].endswith(".parquet") else "json"
    return datasets.load_dataset(kind, data_files=files, split="train"), folder


def _with_pictures(name: str, dataset, column: str):
    """The rows that have a picture; prints how many have none."""
    pictures = dataset.select_columns([column]).with_format("arrow")[:][column]
    present = pc.is_valid(pictures)
    if getattr(dataset.features[column], "_type", None) == "Image":
        parts = [pc.is_valid(pc.struct_field(pictures, part)) for part in ("bytes", "path")]
        present = pc.and_(present, pc.or_(*parts))
    kept, total = [row for row, has_picture in enumerate(present.to_pylist()) if has_picture], len(dataset)
    if len(kept) < total:
        print(f"{name}: {total - len(kept)} of {total} questions have no picture: left out", file=sys.stderr)
    return dataset.select(kept)
