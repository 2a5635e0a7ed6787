"""Small public datasets as they lie on disk, for the tests of the preparation scripts, with what is to come out."""

import io
import json
from pathlib import Path

import datasets
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData
from PIL import Image

WIDTH, HEIGHT = 40, 30


def encoded(color: str = "red", size: tuple[int, int] = (WIDTH, HEIGHT), form: str = "PNG", orientation: int = 1):
    """An encoded picture."""
    stream, exif = io.BytesIO(), Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    Image.new("RGB", size, color).save(stream, form, exif=exif)
    return stream.getvalue()


def read_lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def read_report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# --- GQA ---------------------------------------------------------------------------------------------------------


def gqa_question(image: str, asked="Is the cat left of the dog?", said="yes", /, **annotations) -> dict:
    """A question with all the fields that the real ones have; annotations are those of question, answer, fullAnswer."""
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "cat (11)"}],
        "entailed": [],
        "equivalent": ["1"],
        "question": asked,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": None, "local": "06-cat"},
        "answer": said,
        "semanticStr": "select: cat (11)",
        "annotations": {"question": {}, "answer": {}, "fullAnswer": {}} | annotations,
        "types": {"detailed": "relVerify", "semantic": "rel", "structural": "verify"},
        "fullAnswer": "Yes, the cat is left of the dog.",
    }


def build_gqa(folder: Path, num_plain: int = 40) -> tuple[dict, dict, dict]:
    """Write GQA's files. Returns the fields of GqaConfig, boxes by the id of a good question, ids by reason."""
    images = folder / "images"
    images.mkdir(parents=True)
    objects = {
        "11": {"name": "cat", "x": 1, "y": 2, "w": 10, "h": 12, "attributes": ["black"], "relations": []},
        "12": {"name": "dog", "x": 20, "y": 3, "w": 15, "h": 20, "attributes": [], "relations": []},
        "13": {"name": "rug", "x": 0, "y": 0, "w": 41, "h": 30, "attributes": [], "relations": []},
        "14": {"name": "dot", "x": 4, "y": 4, "w": 0, "h": 3, "attributes": [], "relations": []},
        "15": {"name": "far", "x": 30, "y": 4, "w": 30, "h": 3, "attributes": [], "relations": []},
        "16": {"name": "tom", "x": 1, "y": 2, "w": 10, "h": 12, "attributes": [], "relations": []},
    }
    graph = {"width": WIDTH, "height": HEIGHT, "location": "indoors", "objects": objects}
    graphs = {name: graph for name in ("n1", "gone", "cut", "turned", *map(str, range(num_plain)))}
    graphs["wide"] = graph | {"width": 2 * WIDTH}
    for index, name in enumerate(["n1", "wide", *map(str, range(num_plain))]):
        (images / f"{name}.jpg").write_bytes(encoded(f"hsl({index * 7 % 360}, 90%, 50%)", form="JPEG"))
    (images / "n1_no_graph.jpg").write_bytes(encoded(form="JPEG"))
    (images / "cut.jpg").write_bytes(encoded(form="JPEG")[:-30])
    (images / "turned.jpg").write_bytes(encoded(form="JPEG", orientation=6))  # shown as 30 x 40

    cat, dog = [1, 2, 11, 14], [20, 3, 35, 23]
    questions = {f"0{i}": gqa_question(str(i), f"What is {i}?", question={"2": "11"}) for i in range(num_plain)}
    boxes = {key: [cat] for key in questions}
    good = {  # more than one object, of all three texts, in the order of their names, without repetitions
        "several": (gqa_question("n1", "A?", question={"2": "12", "4:6": "11"}, fullAnswer={"0": "12"}), [dog, cat]),
        "answers": (gqa_question("n1", "B?", answer={"0": "11"}, fullAnswer={"3": "12"}), [cat, dog]),
        "comma": (gqa_question("n1", "C?", answer={"0": "11,12"}), [cat, dog]),
        "edge": (gqa_question("n1", "D?", question={"0": "13"}), [[0, 0, 40, 30]]),
        "same box": (gqa_question("n1", "E?", question={"0": "11", "1": "16"}), [cat]),
        "turned": (gqa_question("turned", "F?", question={"0": "11"}), [[30 - 14, 1, 30 - 2, 11]]),
        "naïve": (gqa_question("n1", 'Où est « "{le}, chat" » 猫 ?', "là", question={"0": "11"}), [cat]),
    }
    for key, (question, expected) in good.items():
        questions[key], boxes[key] = question, expected
    bad = {
        "no annotated object": [gqa_question("n1", "Is it outdoors?")],
        "no question": [gqa_question("n1", "  ", question={"0": "11"})],
        "no answer": [gqa_question("n1", "G?", None, question={"0": "11"})],
        "picture missing": [gqa_question("gone", question={"0": "11"})],
        "picture unreadable": [gqa_question("cut", question={"0": "11"})],
        "object not in the scene graph": [gqa_question("n1", "H?", question={"0": "11", "1": "99"})],
        "no scene graph": [gqa_question("n1_no_graph", question={"0": "11"})],
        "box without area": [gqa_question("n1", "I?", question={"0": "11", "1": "14"})],
        "box outside of its picture": [gqa_question("n1", "J?", question={"0": "15"})],
        "picture of another size than annotated": [gqa_question("wide", question={"0": "11"})],
        "annotations or scene graph of another form": [gqa_question("n1", "K?") | {"annotations": ["11"]}],
        "no imageId": [{"question": "L?", "answer": "yes", "annotations": {}}],
    }
    reasons = {}
    for reason, cases in bad.items():
        for number, question in enumerate(cases):
            questions[f"{reason} {number}"] = question
            reasons.setdefault(reason, []).append(f"{reason} {number}")
    (folder / "questions.json").write_text(json.dumps(questions, ensure_ascii=False), encoding="utf-8")
    (folder / "graphs.json").write_text(json.dumps(graphs, indent=1))
    paths = {"questions": folder / "questions.json", "scene_graphs": folder / "graphs.json", "images": images}
    return {name: str(path) for name, path in paths.items()}, boxes, reasons


# --- the Hub -----------------------------------------------------------------------------------------------------


def push_to_folder(dataset: datasets.Dataset, folder: Path, num_shards: int = 3) -> str:
    """Write the files that push_to_hub would: Parquet shards under data/ and a README with features and splits."""
    (folder / "data").mkdir(parents=True)
    for index in range(num_shards):
        shard = dataset.shard(num_shards, index, contiguous=True)
        shard.to_parquet(folder / "data" / f"train-{index:05d}-of-{num_shards:05d}.parquet")
    card = DatasetCardData()
    DatasetInfosDict(default=datasets.DatasetInfo(features=dataset.features)).to_dataset_card_data(card)
    MetadataConfigs(default={"data_files": [{"split": "train", "path": "data/train-*"}]}).to_dataset_card_data(card)
    (folder / "README.md").write_text(f"---\n{card}\n---\n")
    return str(folder)


def build_refocus(folder: Path, num_plain: int = 30) -> tuple[str, dict, dict, dict]:
    """A copy of ReFocus_Data. Returns its folder, boxes and encoded picture by good id, ids by reason."""
    chart = {"x1": [5.0, 20.0], "y1": [1.0, 1.0], "x2": [9.0, 30.5], "y2": [20.0, 20.0]}
    none = {"x1": [], "y1": [], "x2": [], "y2": []}

    def row(identifier, picture=None, areas=chart, question=None, answer="7", path="chart.png"):
        picture = encoded(f"rgb({len(rows) * 5}, 9, 9)") if picture is None else picture
        return {
            "id": identifier,
            "question": question or f"How many for {identifier}?",
            "answer": answer,
            "image": {"bytes": picture, "path": path},
            "thoughts": ["Look at the bars."],
            "edited_image": {"bytes": encoded("green"), "path": "edited.png"},
            "focus_areas_bbox": areas,
            "source": "chartqa_v_bar",
            "split": "train",
            "x_values": ["a", "b"],
            "figure_bbox": {"x1": 0.0, "y1": 0.0, "x2": 40.0, "y2": 30.0},
        }

    rows: list[dict] = []
    for index in range(num_plain):
        rows.append(row(f"plain {index}"))
    rows.append(
        row("jpeg", encoded("blue", form="JPEG", orientation=6), {"x1": [1], "y1": [1], "x2": [29], "y2": [39]})
    )
    rows.append(row("same picture", encoded("rgb(0, 9, 9)"), chart))  # bytes of "plain 0"
    boxes = {entry["id"]: [[5, 1, 9, 20], [20, 1, 30.5, 20]] for entry in rows} | {"jpeg": [[1, 1, 29, 39]]}
    pictures = {entry["id"]: entry["image"]["bytes"] for entry in rows}
    bad = {
        "no focus area": row("empty", areas=none),
        "focus areas of another form": row("uneven", areas=chart | {"x1": [1.0]}),
        "no answer": row("mute", answer=" "),
        "picture unreadable": row("cut", picture=encoded()[:40]),
        "picture missing": row("gone", picture=b"", path=None),
        "duplicate id": row("plain 1", question="Another question?"),
    }
    reasons = {reason: [entry["id"]] for reason, entry in bad.items()}
    rows += bad.values()
    dataset = datasets.Dataset.from_list(rows)
    dataset = dataset.cast_column("image", datasets.Image()).cast_column("edited_image", datasets.Image())
    return push_to_folder(dataset, folder), boxes, pictures, reasons
