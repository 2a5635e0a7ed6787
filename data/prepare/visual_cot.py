"""Visual-CoT -> OUT/train.jsonl: questions from twelve datasets, each with the region that helps to answer it.

The metadata are read from the Hub or a local copy; the pictures (143 GB) must be on disk. They come as the pieces of
one archive; its layout is as later projects describe it:

    hf download deepcs233/Visual-CoT --repo-type dataset --include "cot_images_tar_split/*" --local-dir visual_cot
    mkdir visual_cot/images && cat visual_cot/cot_images_tar_split/* | tar -x -C visual_cot/images
    python -m data.prepare.visual_cot --images visual_cot/images --out data/visual_cot --subsets gqa vsr --limit 20000
    accelerate launch train_rl.py --data data/visual_cot/train.jsonl ...

metadata   metadata/<subset>_cot_train.jsonl of https://huggingface.co/datasets/deepcs233/Visual-CoT (arXiv 2403.16999):
           question, answer, image (file name), width, height, bboxs [[x1, y1, x2, y2], ...] in pixels, dataset, split;
           confirmed in the four files that https://github.com/deepcs233/Visual-CoT holds (cub, dude, sroie, vsr)
pictures   IMAGES/<dataset>/<image>, with or without a folder `cot` between, as the authors' converter names them;
           textcap uses the pictures of textvqa

Why not viscot_363k.json, which the models were trained on: it joins several boxes to one, and its fractions are of the
picture padded to a square. Many pictures of gqa are said to be missing from the archive (issue 33 of the repository);
such rows are dropped and counted. Pictures stay where they are. The id of an example is "<subset>_cot_train:<line>".
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from data.prepare.folder import PrepareConfig, prepare
from data.prepare.rows import Dropped, Picture, as_shown, text
from sayo.examples.rows import Lines
from sayo.settings import ConfigError, option, run_command

ENDING = "_cot_train.jsonl"
FIELDS = ("question", "answer", "image", "width", "height", "bboxs", "dataset")
PICTURES_OF = {"textcap": "textvqa"}


@dataclass
class VisualCotConfig(PrepareConfig):
    """Prepare Visual-CoT: questions from twelve datasets with the regions that help to answer them.

    Example: python -m data.prepare.visual_cot --images visual_cot/images --out data/visual_cot --subsets gqa vsr
    --limit 20000. Then train with --data data/visual_cot/train.jsonl. OUT/report.json counts what was dropped and why.
    """

    source, paths, copy_images = "visual_cot", ("images", "metadata"), False
    needed = (*PrepareConfig.needed, *paths)

    images: str | None = option(None, "Folder of the unpacked pictures (required).")
    metadata: str = option("deepcs233/Visual-CoT", "Hub dataset, or a folder with its metadata/*_cot_train.jsonl.")
    subsets: list[str] = option([], "Parts of it, such as gqa cub vsr; all that there are by default.")
    revision: str | None = option(None, "Branch, tag or commit of the Hub dataset.")

    def problems(self) -> list[str]:
        folder = Path(self.metadata).expanduser()
        return super().problems() + (subset_problems(folder, self.subsets) if folder.is_dir() else [])

    def open_rows(self) -> "MetadataRows":
        folder = Path(self.metadata).expanduser()
        if not folder.is_dir():
            part = {"repo_type": "dataset", "revision": self.revision, "allow_patterns": "metadata/*.jsonl"}
            try:
                folder = Path(snapshot_download(self.metadata, **part))
            except (OSError, ValueError) as error:  # HfHubHTTPError is an OSError, HFValidationError a ValueError
                message = f"metadata={self.metadata!r} is no folder here, and no Hub dataset: {error}"
                raise ConfigError(message) from error
            if found := subset_problems(folder, self.subsets):
                raise ConfigError("\n".join(found))
        files = metadata_files(folder)
        return MetadataRows([files[name] for name in self.subsets or files], Path(self.images).expanduser())

    def convert(self, row: dict, picture: Picture) -> dict:
        question, answer = text(row.get("question"), "question"), text(row.get("answer"), "answer")
        try:
            width, height = (float(side) if isinstance(side, str) else side for side in (row["width"], row["height"]))
            boxes = as_shown(row.get("bboxs") or [], width, height, picture)
        except (KeyError, TypeError, ValueError) as error:
            raise Dropped("boxes or size of another form", error) from error
        return {"question": question, "answer": answer, "boxes": boxes}


def metadata_files(folder: Path) -> dict[str, Path]:
    """The files by the name of their subset, in the folder itself or in its folder `metadata`."""
    inner = folder / "metadata"
    files = sorted((inner if inner.is_dir() else folder).glob(f"*{ENDING}"))
    return {path.name.removesuffix(ENDING): path for path in files}


def subset_problems(folder: Path, subsets: Sequence[str]) -> list[str]:
    """What is wrong with the files and their first lines."""
    files, found = metadata_files(folder), []
    if not files:
        return [f"metadata={str(folder)!r}: there is no *{ENDING} in it or in its folder metadata"]
    if unknown := [name for name in subsets if name not in files]:
        found.append(f"subsets: there is no {', '.join(unknown)}; there are {', '.join(files)}")
    for path in [files[name] for name in subsets or files if name in files]:
        rows = MetadataRows([path])
        try:
            row = rows.line(0)[1] if len(rows) else {}
        except Dropped as error:
            found.append(f"{path}: {error.reason}: {error.detail}")
            continue
        if missing := [name for name in FIELDS if name not in row]:
            found.append(f"{path}: the first line has no {', '.join(missing)}; it has {', '.join(row) or 'nothing'}")
    return found


class MetadataRows(Sequence):
    """Rows of the metadata with the paths of their pictures, None for one that is at none of its possible places."""

    def __init__(self, files: Sequence[Path], images: Path = Path()):
        opened = [(path, Lines(path)) for path in files]
        self._places = [(path, lines, index) for path, lines in opened for index in range(len(lines))]
        self._images = images

    def __len__(self) -> int:
        return len(self._places)

    def line(self, index: int) -> tuple[str, dict]:
        """("<file>:<line>", object) of a line that is not blank. Raises Dropped unless it is a JSON object."""
        path, lines, at = self._places[index]
        try:
            row = json.loads(lines[at])
        except (ValueError, RecursionError) as error:
            raise Dropped("line is not JSON", f"{path.name}:{lines.numbers[at]}: {error}") from error
        if not isinstance(row, dict):
            raise Dropped("line is not a JSON object", f"{path.name}:{lines.numbers[at]}")
        return f"{path.stem}:{lines.numbers[at]}", row

    def __getitem__(self, index: int) -> dict:
        identifier, row = self.line(index)
        places, image, dataset = [], row.get("image"), str(row.get("dataset"))
        if isinstance(image, str) and image:
            folder = PICTURES_OF.get(dataset, dataset)
            places = [self._images / folder / image, self._images / "cot" / folder / image, self._images / image]
        picture = next((place for place in places if os.path.isfile(place)), None)
        return row | {"id": identifier, "picture": picture}


if __name__ == "__main__":
    run_command(VisualCotConfig, prepare)
