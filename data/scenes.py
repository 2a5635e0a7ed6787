"""Write synthetic scenes to a folder as any other data set (sayo/examples/scenes draws them).

python -m data.scenes --out scenes --count 20000
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from sayo.examples.scenes.scenes import DEFAULT_SIZES, Scenes
from sayo.settings import protect_output


def write_scenes(scenes: Sequence, folder: Path) -> None:
    """Write folder/train.jsonl, and a PNG for each example in folder/images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for number, example in enumerate(tqdm(scenes, desc="scenes", unit="picture")):
            row = {name: example[name] for name in ("id", "question", "answer", "boxes", "kind")}
            row["image"] = f"images/{number:06d}.png"
            example["image"].save(folder / row["image"], compress_level=1)
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write scenes to a folder: train.jsonl and images/.")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--split", default="train", choices=tuple(DEFAULT_SIZES), help="default: train")
    parser.add_argument("--count", type=int, default=1000, help="number of examples (default: 1000)")
    arguments = parser.parse_args()
    protect_output()
    write_scenes(Scenes(arguments.split, arguments.count), Path(arguments.out).expanduser())
    print(f"{arguments.count} examples of scenes:{arguments.split} -> {Path(arguments.out) / 'train.jsonl'}")


if __name__ == "__main__":
    main()
