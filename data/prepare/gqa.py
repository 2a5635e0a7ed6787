"""GQA -> OUT/train.jsonl. The region of a question is every object that the question and its answers name.

Questions (1.4 GB), scene graphs (43 MB) and pictures: https://cs.stanford.edu/people/dorarad/gqa/download.html. Unpack
the three archives, then

    python -m data.prepare.gqa --questions gqa/train_balanced_questions.json \\
        --scene_graphs gqa/train_sceneGraphs.json --images gqa/images --out data/gqa --limit 16000 --seed 0
    accelerate launch train_rl.py --data data/gqa/train.jsonl ...

questions      one JSON object: id -> {question, answer, imageId, annotations, ...}, where annotations is {question,
               answer, fullAnswer}, each a dict from a span of tokens ("4" or "2:4") to an object id, or to several ids
               with commas between
scene graphs   one JSON object: imageId -> {width, height, objects: id -> {name, x, y, w, h, ...}, ...}, in pixels
pictures       IMAGES/<imageId>.jpg

The download page documents the scene graphs; the annotations are as GQA's own eval.py and several later projects read
them. The released script of SAYO (arXiv 2602.08241) takes one object, the last that `semanticStr` names.

Pictures stay where they are, and OUT/train.jsonl holds paths relative to OUT; --copy_images copies them to OUT/images.
Questions about a whole scene ("Is it outdoors?") name no object and are dropped, as are rows whose region is
incomplete. Neither file is held in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.prepare.folder import PrepareConfig, prepare
from data.prepare.rows import Dropped, Picture, as_shown, text
from data.prepare.sources import read_entry, scan_object
from sayo.examples.pictures import DataError
from sayo.settings import option, run_command

QUESTION_FIELDS = ("question", "answer", "imageId", "annotations")
SCENE_FIELDS = ("width", "height", "objects")
ANNOTATED = ("question", "answer", "fullAnswer")


@dataclass
class GqaConfig(PrepareConfig):
    """Prepare GQA: questions about photos, with the boxes of all objects that the question and its answers name.

    Example: python -m data.prepare.gqa --questions gqa/train_balanced_questions.json --scene_graphs
    gqa/train_sceneGraphs.json --images gqa/images --out data/gqa. OUT/report.json counts what was dropped.
    """

    source, paths = "gqa", ("questions", "scene_graphs", "images")
    needed = (*PrepareConfig.needed, *paths)

    questions: str | None = option(None, "JSON of questions, such as train_balanced_questions.json (required).")
    scene_graphs: str | None = option(None, "JSON of scene graphs, such as train_sceneGraphs.json (required).")
    images: str | None = option(None, "Folder of the pictures, <imageId>.jpg (required).")
    copy_images: bool = option(False, "Copy the pictures to OUT/images instead of referring to them.")

    def problems(self) -> list[str]:
        found = super().problems() + entry_problems("questions", self.questions, QUESTION_FIELDS)
        found += entry_problems("scene_graphs", self.scene_graphs, SCENE_FIELDS)
        images = Path(self.images or __file__).expanduser()
        if images.is_dir() and not any(images.glob("*.jpg")):
            found.append(f"images={self.images!r}: the folder holds no .jpg; give the one with <imageId>.jpg in it")
        return found

    def open_rows(self) -> "Questions":
        return Questions(*(Path(path).expanduser() for path in (self.questions, self.scene_graphs, self.images)))

    def convert(self, row: dict, picture: Picture) -> dict:
        question, answer = text(row.get("question"), "question"), text(row.get("answer"), "answer")
        try:
            spans = [(row.get("annotations") or {}).get(name) or {} for name in ANNOTATED]
            listed = ",".join(str(ids) for span in spans for ids in span.values())
            named = dict.fromkeys(name.strip() for name in listed.split(",")) if any(spans) else {}
            if not named:
                raise Dropped("no annotated object")
            if not (graph := row["graph"]):
                raise Dropped("no scene graph", row["imageId"])
            objects = graph.get("objects") or {}
            if missing := [name for name in named if name not in objects]:
                raise Dropped("object not in the scene graph", ", ".join(missing))
            corners = [[objects[name][side] for side in ("x", "y", "w", "h")] for name in named]
            boxes = as_shown([[x, y, x + w, y + h] for x, y, w, h in corners], graph["width"], graph["height"], picture)
        except (AttributeError, KeyError, TypeError) as error:
            raise Dropped("annotations or scene graph of another form", error) from error
        return {"question": question, "answer": answer, "boxes": boxes}


def entry_problems(name: str, file: str | None, expected: Sequence[str]) -> list[str]:
    """What is wrong with a file of entries, judged by the first one."""
    if not file:
        return []
    path = Path(file).expanduser()
    if not path.is_file():
        return [f"{name}={file!r}: there is no such file"]
    try:
        _, start, end = next(scan_object(path))
    except (DataError, OSError, StopIteration) as error:
        return [f"{name}={file!r}: {str(error) or 'there is nothing in it'}"]
    key, value = read_entry(path, start, end)
    fields = value if isinstance(value, dict) else {}
    missing = [field for field in expected if field not in fields]
    present = f"it has {', '.join(fields)}" if fields else f"it is {value!r:.60}"
    return [f"{name}={file!r}: entry {key!r} has no {', '.join(missing)}; {present}"] if missing else []


class Questions(Sequence):
    """Questions with the scene graphs of their pictures, each read from its file when it is asked for."""

    def __init__(self, questions: Path, scene_graphs: Path, images: Path):
        self._questions, self._scene_graphs, self._images = questions, scene_graphs, images
        places = ((start, end) for _, start, end in scan_object(questions))
        self._places = np.fromiter(places, np.dtype((np.int64, 2)))
        self._graphs = {image: (start, end) for image, start, end in scan_object(scene_graphs)}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict:
        key, question = read_entry(self._questions, *self._places[index])
        if not isinstance(question, dict) or not isinstance(question.get("imageId"), str):
            raise Dropped("no imageId", key)
        image = question["imageId"]
        graph = read_entry(self._scene_graphs, *self._graphs[image])[1] if image in self._graphs else None
        return question | {"id": key, "picture": self._images / f"{image}.jpg", "graph": graph}


if __name__ == "__main__":
    run_command(GqaConfig, prepare)
