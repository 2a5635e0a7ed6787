"""Small public datasets as they lie on disk, and what the preparation scripts make of them.

Each build_... gives fields of the config that reads it, the rows to keep as {id: (question, answer, boxes, encoded
picture)}, and the ids of the rows to drop by reason.
"""

import io
import json
from pathlib import Path

import datasets
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData
from PIL import Image

WIDTH, HEIGHT = 40, 30
BOX = [1.5, 2.0, 20.0, 14.25]  # of Visual-CoT
SALIENCY = [  # box as it is written, boxes of the 200 x 100 picture or a reason
    ("[0.1, 0.2, 0.5, 0.9]", [[20, 20, 100, 90]]),
    ("[0.094, 0.312, 0.44, 0.795]", [[18.8, 31.2, 88, 79.5]]),
    ("[-0.004, 0.5, 1.002, 1.01]", [[0, 50, 200, 100]]),  # clipped
    ("[0.0, 0.0, 1.0, 1.0]", [[0, 0, 200, 100]]),
    ("[0.5, 0.5, 1.3, 0.9]", "box outside of its picture"),
    ("[0.5, 0.5, 0.5, 0.9]", "box without area"),
    ("[0.5, 0.5, 0.9]", "box is not four numbers"),
    ("somewhere", "box is not four numbers"),
    ("", "no box"),
    (None, "no box"),
]


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


def gqa_question(image: str, asked="Is the cat left of the dog?", said="yes", /, **annotations) -> dict:
    """A question with all the fields that the real ones have; annotations are those of question, answer, fullAnswer."""
    annotations = {"question": {}, "answer": {}, "fullAnswer": {}} | annotations
    row = {"question": asked, "imageId": image, "answer": said, "annotations": annotations, "isBalanced": True}
    row |= {"semantic": [{"operation": "select", "dependencies": [], "argument": "cat (11)"}], "entailed": []}
    row |= {"semanticStr": "select: cat (11)", "groups": {"global": None, "local": "06-cat"}, "equivalent": ["1"]}
    row |= {"types": {"detailed": "relVerify", "semantic": "rel", "structural": "verify"}}
    return row | {"fullAnswer": "Yes, the cat is left of the dog."}


def build_gqa(folder: Path, num_plain: int = 40) -> tuple[dict, dict, dict]:
    images = folder / "images"
    images.mkdir(parents=True)
    sides = {"11": (1, 2, 10, 12), "12": (20, 3, 15, 20), "13": (0, 0, 41, 30)}
    sides |= {"14": (4, 4, 0, 3), "15": (30, 4, 30, 3), "16": (1, 2, 10, 12)}
    common = {"name": "thing", "attributes": ["black"], "relations": []}
    objects = {key: common | dict(zip("xywh", values, strict=True)) for key, values in sides.items()}
    graph = {"width": WIDTH, "height": HEIGHT, "location": "indoors", "objects": objects}
    graphs = {name: graph for name in ("n1", "gone", "cut", "turned", *map(str, range(num_plain)))}
    graphs["wide"] = graph | {"width": 2 * WIDTH}
    names = enumerate(["n1", "wide", *map(str, range(num_plain))])
    pictures = {name: encoded(f"hsl({index * 7 % 360}, 90%, 50%)", form="JPEG") for index, name in names}
    pictures["n1_no_graph"] = encoded(form="JPEG")
    pictures |= {"cut": encoded(form="JPEG")[:-30], "turned": encoded(form="JPEG", orientation=6)}  # shown as 30 x 40
    for name, picture in pictures.items():
        (images / f"{name}.jpg").write_bytes(picture)

    cat, dog = [1, 2, 11, 14], [20, 3, 35, 23]
    good = {f"0{i}": (gqa_question(str(i), f"What is {i}?", question={"2": "11"}), [cat]) for i in range(num_plain)}
    good |= {  # more than one object, of all three texts, in the order of their names, without repetitions
        "several": (gqa_question("n1", "A?", question={"2": "12", "4:6": "11"}, fullAnswer={"0": "12"}), [dog, cat]),
        "answers": (gqa_question("n1", "B?", answer={"0": "11"}, fullAnswer={"3": "12"}), [cat, dog]),
        "comma": (gqa_question("n1", "C?", answer={"0": "11,12"}), [cat, dog]),
        "edge": (gqa_question("n1", "D?", question={"0": "13"}), [[0, 0, 40, 30]]),
        "same box": (gqa_question("n1", "E?", question={"0": "11", "1": "16"}), [cat]),
        "turned": (gqa_question("turned", "F?", question={"0": "11"}), [[30 - 14, 1, 30 - 2, 11]]),
        "naïve": (gqa_question("n1", 'Où est « "{le}, chat" » 猫 ?', "là", question={"0": "11"}), [cat]),
    }
    bad = {
        "no annotated object": gqa_question("n1", "Is it outdoors?"),
        "no question": gqa_question("n1", "  ", question={"0": "11"}),
        "no answer": gqa_question("n1", "G?", None, question={"0": "11"}),
        "picture missing": gqa_question("gone", question={"0": "11"}),
        "picture unreadable": gqa_question("cut", question={"0": "11"}),
        "object not in the scene graph": gqa_question("n1", "H?", question={"0": "11", "1": "99"}),
        "no scene graph": gqa_question("n1_no_graph", question={"0": "11"}),
        "box without area": gqa_question("n1", "I?", question={"0": "11", "1": "14"}),
        "box outside of its picture": gqa_question("n1", "J?", question={"0": "15"}),
        "picture of another size than annotated": gqa_question("wide", question={"0": "11"}),
        "annotations or scene graph of another form": gqa_question("n1", "K?") | {"annotations": ["11"]},
        "no imageId": {"question": "L?", "answer": "yes", "annotations": {}},  # read with the picture: it has no id yet
    }
    questions = {key: question for key, (question, _) in good.items()}
    questions |= {f"{reason} 0": row for reason, row in bad.items()}
    (folder / "questions.json").write_text(json.dumps(questions, ensure_ascii=False), encoding="utf-8")
    (folder / "graphs.json").write_text(json.dumps(graphs, indent=1))
    paths = {"questions": folder / "questions.json", "scene_graphs": folder / "graphs.json", "images": images}
    rows = {key: (q["question"], q["answer"], boxes, pictures[q["imageId"]]) for key, (q, boxes) in good.items()}
    dropped = {reason: [f"{reason} 0"] for reason in bad} | {"no imageId": [f"row {len(questions) - 1}"]}
    return {name: str(path) for name, path in paths.items()}, rows, dropped


def push_to_folder(dataset: datasets.Dataset, folder: Path, num_shards: int = 3) -> str:
    """Write the files that push_to_hub would: Parquet shards under data/ and a README with features and splits."""
    (folder / "data").mkdir(parents=True)
    for index in range(num_shards):
        shard = dataset.shard(num_shards, index, contiguous=True)
        shard.to_parquet(folder / "data" / f"train-{index:05d}-of-{num_shards:05d}.parquet")
    write_card(folder, dataset.features, [{"split": "train", "path": "data/train-*"}])
    return str(folder)


def write_card(folder: Path, features: datasets.Features, files: list[dict[str, str]]) -> None:
    """The README of a Hub repository: features, and the files of its splits."""
    card = DatasetCardData()
    DatasetInfosDict(default=datasets.DatasetInfo(features=features)).to_dataset_card_data(card)
    MetadataConfigs(default={"data_files": files}).to_dataset_card_data(card)
    (folder / "README.md").write_text(f"---\n{card}\n---\n")


def build_refocus(folder: Path, num_plain: int = 30) -> tuple[dict, dict, dict]:
    chart = {"x1": [5.0, 20.0], "y1": [1.0, 1.0], "x2": [9.0, 30.5], "y2": [20.0, 20.0]}
    others = {"thoughts": ["Look at the bars."], "edited_image": {"bytes": encoded("green"), "path": "edited.png"}}
    others |= {"source": "chartqa_v_bar", "split": "train", "x_values": ["a", "b"]}
    others |= {"figure_bbox": {"x1": 0.0, "y1": 0.0, "x2": 40.0, "y2": 30.0}}

    def row(identifier, picture=None, areas=chart, question=None, answer="7", path="chart.png"):
        picture = encoded(f"rgb({len(rows) * 5}, 9, 9)") if picture is None else picture
        read = {"id": identifier, "question": question or f"How many for {identifier}?", "answer": answer}
        return others | read | {"image": {"bytes": picture, "path": path}, "focus_areas_bbox": areas}

    rows: list[dict] = []  # its length is in the color of a picture
    rows.extend(row(f"plain {index}") for index in range(num_plain))
    turned = encoded("blue", form="JPEG", orientation=6)
    rows.append(row("jpeg", turned, {"x1": [1], "y1": [1], "x2": [29], "y2": [39]}))
    rows.append(row("same picture", encoded("rgb(0, 9, 9)"), chart))  # bytes of "plain 0"
    boxes = [[5, 1, 9, 20], [20, 1, 30.5, 20]]
    kept = {entry["id"]: (entry["question"], entry["answer"], boxes, entry["image"]["bytes"]) for entry in rows}
    kept["jpeg"] = (*kept["jpeg"][:2], [[1, 1, 29, 39]], turned)
    bad = {
        "no focus area": row("empty", areas={name: [] for name in chart}),
        "focus areas of another form": row("uneven", areas=chart | {"x1": [1.0]}),
        "no answer": row("mute", answer=" "),
        "picture unreadable": row("cut", picture=encoded()[:40]),
        "picture missing": row("gone", picture=b"", path=None),
        "duplicate id": row("plain 1", question="Another question?"),  # the row that seed 0 has first
    }
    kept["plain 1"] = ("Another question?", *kept["plain 1"][1:3], bad["duplicate id"]["image"]["bytes"])
    dataset = datasets.Dataset.from_list(rows + list(bad.values()))
    dataset = dataset.cast_column("image", datasets.Image()).cast_column("edited_image", datasets.Image())
    dropped = {reason: [entry["id"]] for reason, entry in bad.items()}
    return {"data": push_to_folder(dataset, folder)}, kept, dropped


def build_saliency(folder: Path, box_type=str, **names) -> tuple[dict, dict, dict]:
    """Its boxes as text or lists, `names` for its columns."""
    rows, kept, dropped = [], {}, {}
    for number, (box, expected) in enumerate(SALIENCY):
        picture = encoded(f"hsl({number * 30}, 80%, 50%)", (200, 100))
        row = {"dataset": "CUB" if number % 2 else "DocVQA", "split": "train", "question_id": number % 2}  # repeats
        row |= {"problem": f"Question {number}?", "solution": "Yes"}
        row["bbox"] = box if box_type is str else json.loads(box) if box and box.startswith("[") else None
        row["image"] = {"bytes": picture, "path": f"{number}.png"}
        rows.append({names.get(name, name): value for name, value in row.items()})
        if isinstance(expected, str):
            dropped.setdefault(expected, []).append(str(number))
        else:
            kept[str(number)] = (row["problem"], "Yes", expected, picture)
    dataset = datasets.Dataset.from_list(rows).cast_column(names.get("image", "image"), datasets.Image())
    return {"data": push_to_folder(dataset, folder)}, kept, dropped


def build_mixture(folder: Path) -> tuple[dict, dict, dict]:
    parts = {"gqa": build_gqa(folder / "gqa"), "refocus": build_refocus(folder / "refocus")}
    fields = {f"gqa_{name}": path for name, path in parts["gqa"][0].items()} | {"refocus": parts["refocus"][0]["data"]}
    rows = {f"{part}:{key}": row for part, (_, rows, _) in parts.items() for key, row in rows.items()}
    return fields, rows, {part: dropped for part, (*_, dropped) in parts.items()}


def visual_cot_line(dataset: str, image: str, question: str, answer="Yes", bboxs=None, **more) -> dict:
    """A line of the metadata of Visual-CoT."""
    row = {"question": question, "answer": answer, "image": image, "width": WIDTH, "height": HEIGHT}
    return row | {"bboxs": [BOX] if bboxs is None else bboxs, "dataset": dataset, "split": "train"} | more


def build_visual_cot(folder: Path) -> tuple[dict, dict, dict]:
    """Metadata as on the Hub and pictures as in its archive."""
    line, picture, images, metadata = visual_cot_line, encoded(form="JPEG"), folder / "images", folder / "hub/metadata"
    for name in ("cub/001.Albatross/a.jpg", "cot/vsr/1.jpg", "gqa/2.jpg", "textvqa/3.jpg", "gqa/cut.jpg"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(picture[:60] if "cut" in name else picture)
    changes = [{"image": "missing.jpg"}, {"image": "cut.jpg"}, {"bboxs": []}, {"bboxs": [[30, 4, 70, 9]]}]
    changes += [{"width": 500}, {"answer": None}, {"bboxs": 3}]
    bad = [line("gqa", "2.jpg", f"{number}?") | change for number, change in enumerate(changes)]
    albatross, pair = "001.Albatross/a.jpg", [BOX, [0, 0, 40, 30]]
    files = {
        "cub": [line("cub", albatross, "Grey forehead?"), line("cub", albatross, "Blue?", "No")],
        "vsr": [line("vsr", "1.jpg", "Under?", bboxs=pair), line("vsr", "1.jpg", "Under?")],
        "textcap": [line("textcap", "3.jpg", "What is written?", "stop", ocr=["stop"])],
        "gqa": [line("gqa", "2.jpg", "Where?", "left", full_answer="It is left."), *bad, "not JSON"],
    }
    metadata.mkdir(parents=True)
    for name, rows in files.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (metadata / f"{name}_cot_train.jsonl").write_text("\n".join(lines) + "\n")
    kept = {
        "cub_cot_train:1": ("Grey forehead?", "Yes", [BOX], picture),
        "cub_cot_train:2": ("Blue?", "No", [BOX], picture),
        "vsr_cot_train:1": ("Under?", "Yes", pair, picture),  # of the two, the row that seed 0 has first
        "textcap_cot_train:1": ("What is written?", "stop", [BOX], picture),
        "gqa_cot_train:1": ("Where?", "left", [BOX], picture),
    }
    reasons = ["picture missing", "picture unreadable", "no box", "box outside of its picture"]
    reasons += ["picture of another size than annotated", "no answer", "box is not four numbers"]
    dropped = {reason: [f"gqa_cot_train:{number}"] for number, reason in enumerate(reasons, 2)}
    # Files are read in the order of their names: cub, gqa, textcap, vsr.
    dropped |= {"line is not JSON": ["row 10"], "duplicate (picture, question, answer)": ["vsr_cot_train:2"]}
    return {"metadata": str(folder / "hub"), "images": str(images)}, kept, dropped
