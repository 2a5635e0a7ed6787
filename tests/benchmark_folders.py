"""The paper's benchmarks as they lie on disk, a few rows each in exactly their columns, and the examples they are."""

import base64
import json
from pathlib import Path

import datasets
from conftest import write_jsonl
from prepare_folders import encoded, write_card

BUILDERS = {}
SHORT = "\nAnswer with a word, a number or a short phrase."


def builder(function):
    """BUILDERS[name](folder) writes a benchmark and returns the examples that it is."""
    BUILDERS[function.__name__.removeprefix("build_")] = function
    return function


def example(identifier: str, question: str, answer: str, choices=None, answer_type=None, boxes=()):
    return (identifier, question, answer, choices, answer_type, list(boxes))


def rows_of(columns: str, *reads: tuple, others: str) -> list[dict]:
    """A row for each tuple of values of the columns, separated by "|", that the loader reads; "..." in the others."""
    read = columns.split("|")
    return [dict.fromkeys(others.split("|"), "...") | dict(zip(read, values, strict=True)) for values in reads]


def embedded(color: str, path: str = "image.png") -> dict:
    return {"bytes": encoded(color), "path": path}


def hub_folder(folder: Path, splits: dict[str, tuple[str, list[dict]]], images=("image",)) -> None:
    """What a Hub repository of Parquet files holds: {split: (file, rows)}, and a README with features and splits."""
    files = []
    for split, (path, rows) in splits.items():
        dataset = datasets.Dataset.from_list(rows)
        for image in images:
            dataset = dataset.cast_column(image, datasets.Image())
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(folder / path)
        files.append({"split": split, "path": path})
    write_card(folder, dataset.features, files)


TABLE_OPTIONS = ["(A) 24%", "(B) 13%", "(C) 12%", "(D) 11%", "(E) This image doesn't feature the data."]
TABLE_CHOICES = ["24%", "13%", "12%", "11%", "This image doesn't feature the data."]


@builder
def build_mme_realworld_lite(folder: Path) -> list:
    text = "What's the percentage of Operating Expenses in FY 2025 in this table?"
    reads = [(f"perception/table/000{n}", f"{n}.jpg", text, TABLE_OPTIONS, answer) for n, answer in enumerate("BE", 1)]
    columns = "Question_id|Image|Text|Answer choices|Ground truth"
    rows = rows_of(columns, *reads, others="Question Type|Category|Subtask|Task")
    (folder / "data" / "imgs").mkdir(parents=True)
    (folder / "data" / "MME-RealWorld-Lite.json").write_text(json.dumps(rows, indent=4))
    for _, image, *_ in reads:
        (folder / "data" / "imgs" / image).write_bytes(encoded("red", form="JPEG"))
    return [example(name, text, answer, TABLE_CHOICES) for name, _, _, _, answer in reads]


@builder
def build_mme_realworld(folder: Path) -> list:
    """The Hub's copy for lmms-eval: pictures in base64."""
    question = "Where is the house with a yellow roof in the picture?"
    choices = ["Left.", "Right.", "Top.", "Bottom.", "It is not there."]
    options = [f"({letter}) {text}" for letter, text in zip("ABCDE", choices, strict=True)]
    picture = base64.b64encode(encoded("yellow", size=(400, 300), form="BMP")).decode()
    columns = "index|bytes|question|multi-choice options|answer"
    rows = rows_of(columns, (7, picture, question, options, "A"), others="category|l2-category")
    hub_folder(folder, {"train": ("data/train-00000-of-00001.parquet", rows)}, images=())
    return [example("7", question, "A", choices)]


@builder
def build_m3cot(folder: Path) -> list:
    choices, question = ["jump", "sleep, or rest", "eat"], "What is the animal about to do?"
    images = (embedded("red"), None, embedded("blue"))
    reads = [(f"physical-{n}", question, choices, "ABC"[n], image) for n, image in enumerate(images)]
    others = "category|image_id|context|rationale|split|domain|topic"
    rows = rows_of("id|question|choices|answer|image", *reads, others=others)
    files = {name: f"data/{name}-00000-of-00001.parquet" for name in ("train", "test")}
    hub_folder(folder, {"train": (files["train"], rows[:1]), "test": (files["test"], rows)})
    return [example(f"physical-{n}", question, "ABC"[n], choices) for n in (0, 2)]


@builder
def build_vstar(folder: Path, count: int = 2) -> list:
    asked = "\nAnswer with the option's letter from the given choices directly."
    lines, expected, choices = [], [], ["rubber", "cotton", "kevlar", "leather"]
    for number in range(count):
        category, letter = ("direct_attributes", "relative_position")[number % 2], "AB"[number % 2]
        image = f"{category}/sa_{number}.jpg"
        (folder / category).mkdir(parents=True, exist_ok=True)
        (folder / image).write_bytes(encoded(f"hsl({number * 40 % 360}, 90%, 50%)", form="JPEG"))
        annotation = {"target_object": ["glove"], "bbox": [[4, 2, 15, 7]], "question": "What?", "options": ["rubber"]}
        if number != 1:
            (folder / image).with_suffix(".json").write_text(json.dumps(annotation))
        question = f"What is the material of glove {number}?"
        text = f"{question}\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather{asked}"
        lines.append({"text": text, "category": category, "label": letter, "question_id": str(number), "image": image})
        boxes = [] if number == 1 else [[4, 2, 19, 9]]
        expected.append(example(str(number), question, letter, choices, None, boxes))
    write_jsonl(folder, *lines, name="test_questions.jsonl")
    return expected


@builder
def build_mmstar(folder: Path) -> list:
    questions = [
        "Which option describes it?\nOptions: A: The suitcase is on the book., B: 3, 4, and 5, C: A: no, D: It",
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: How many snowmen are there?\nChoices:\n(A) 10\n(B) 15\n(C) 12\n(D) 20",
        "Look at the four pictures A to D. Which one is upside down?",
    ]
    reads = [(n, question, embedded("red", f"images/{n}.jpg"), "C") for n, question in enumerate(questions)]
    rows = rows_of("index|question|image|answer", *reads, others="category|l2_category|meta_info")
    hub_folder(folder, {"val": ("mmstar.parquet", rows)})
    first = ["The suitcase is on the book.", "3, 4, and 5", "A: no", "It"]
    return [
        example("0", "Which option describes it?", "C", first),
        example("1", "How many snowmen are there?", "C", ["10", "15", "12", "20"]),
        example("2", questions[2], "C", None, "letter"),
    ]


@builder
def build_mathvision(folder: Path) -> list:
    questions = ["How many triangles?\n<image1>", "Which picture?\n<image1>", "How long is the side?\n<image1>"]
    options = [["3", "$\\frac{9}{2}$"], ["A", "B", "C", "D", "E"], []]
    reads = list(zip("123", questions, options, ["B", "D", "\\frac{3}{2}"], [embedded("red")] * 3, strict=True))
    rows = rows_of("id|question|options|answer|decoded_image", *reads, others="image|solution|level|subject")
    test, mini = ("test-00000-of-00001-3532b8d3f1b4047a", "testmini-00000-of-00001-f8ff70fcb2f29b1d")
    files = {"test": (f"data/{test}.parquet", rows), "testmini": (f"data/{mini}.parquet", rows[:1])}
    hub_folder(folder, files, images=("decoded_image",))
    return [example(name, question, answer, given or None, "math") for name, question, given, answer, _ in reads]


WEMATH_QUESTION = "What is the area of the flower bed (  ) m²?(π = 3.14)"
WEMATH_CHOICES = ["200.96", "3215.36", "6280", "32", "No correct answer"]


def _wemath_rows(image) -> tuple[list[dict], list]:
    """Two rows of one id with this picture, and the examples that they are."""
    option, keys = "A. 200.96;B. 3215.36;C. 6280;D. 32; E. No correct answer", ("3steps_1", "3steps_multi")
    reads = [("3steps_165", WEMATH_QUESTION, option, "B", image, key) for key in keys]
    others = "split|knowledge concept|question number|knowledge concept description"
    rows = rows_of("ID|question|option|answer|image_path|key", *reads, others=others)
    return rows, [example(f"3steps_165@{key}", WEMATH_QUESTION, "B", WEMATH_CHOICES) for key in keys]


@builder
def build_wemath(folder: Path) -> list:
    rows, expected = _wemath_rows(embedded("red"))
    hub_folder(folder, {"testmini": ("data/testmini-00000-of-00001.parquet", rows)}, images=("image_path",))
    return expected


def build_wemath_repository(folder: Path) -> list:
    """As the benchmark's own repository has it: JSON, and pictures under data/."""
    rows, expected = _wemath_rows("3steps/image/165-3.png")
    (folder / "data" / "3steps" / "image").mkdir(parents=True)
    (folder / "data" / "3steps" / "image" / "165-3.png").write_bytes(encoded())
    (folder / "data" / "testmini.json").write_text(json.dumps(rows))
    return expected


@builder
def build_chartqa(folder: Path) -> list:
    answers = {"How many stores did Saint Laurent operate in 2020?": "267", "Which years?": "[2010, 2012]"}
    answers["What color?"] = "Blue"
    common = {"type": "augmented_test", "image": embedded("red")}
    rows = [common | {"question": question, "answer": answer} for question, answer in answers.items()]
    hub_folder(folder, {"test": ("data/test-00000-of-00001.parquet", rows)})
    known = enumerate(answers.items())
    return [example(str(n), question + SHORT, answer, None, "relaxed_number") for n, (question, answer) in known]


def build_chartqa_of_huggingface(folder: Path) -> list:
    """The other copy of ChartQA on the Hub: query, and label as a list of one."""
    row = {"image": embedded("red"), "query": "How many?", "label": ["14"], "human_or_machine": 0}
    hub_folder(folder, {"test": ("data/test-00000-of-00001.parquet", [row])})
    return [example("0", "How many?" + SHORT, "14", None, "relaxed_number")]


@builder
def build_ai2d(folder: Path) -> list:
    rows = [
        {"question": "What eats grass?", "options": ["wolf", "hare"], "answer": "1", "image": embedded("red")},
        {"question": "Which letter?", "options": ["B", "A", "D", "C"], "answer": "0", "image": embedded("blue")},
    ]
    hub_folder(folder, {"test": ("data/test-00000-of-00001.parquet", rows)})
    return [
        example("0", "What eats grass?", "B", ["wolf", "hare"]),
        # The letter A is the text of another choice: the text says which one is meant.
        example("1", "Which letter?", "B", ["B", "A", "D", "C"]),
    ]


@builder
def build_charxiv(folder: Path) -> list:
    others = "category|year|original_figure_path|figure_path|num_subplots|descriptive_q1|descriptive_a1"
    others += "|reasoning_q_source|reasoning_a_type"
    asked = [("2004.03856", "Which model is best?", "Joint-CNN"), ("2004.03856", "Which plot?", "A")]
    asked.append(("2004.10956", "How many points lie above 0.95?", "2"))
    reads = [(*each, embedded("red")) for each in asked]
    rows = rows_of("original_id|reasoning_q|reasoning_a|image", *reads, others=others)
    hub_folder(folder, {"validation": ("val.parquet", rows), "test": ("test.parquet", rows[:1])})
    names = ("2004.03856#0", "2004.03856#1", "2004.10956")
    return [example(name, text + SHORT, answer) for name, (_, text, answer) in zip(names, asked, strict=True)]
