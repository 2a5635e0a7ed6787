"""The paper's benchmarks as they lie on disk, a few rows each in exactly their columns, and the examples they are."""

import base64
import json
from pathlib import Path

import datasets
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData
from prepare_folders import encoded

BUILDERS = {}
SHORT = "\nAnswer with a word, a number or a short phrase."


def builder(function):
    """BUILDERS[name](folder) writes a benchmark and returns the examples that it is."""
    BUILDERS[function.__name__.removeprefix("build_")] = function
    return function


def example(identifier: str, question: str, answer: str, choices=None, answer_type=None, boxes=()):
    return (identifier, question, answer, choices, answer_type, list(boxes))


def embedded(color: str, path: str = "image.png") -> dict:
    return {"bytes": encoded(color), "path": path}


def hub_folder(folder: Path, splits: dict[str, tuple[str, list[dict]]], images=("image",)) -> None:
    """What a Hub repository of Parquet files holds: {split: (file, rows)}, and a README with features and splits."""
    files, card = [], DatasetCardData()
    for split, (path, rows) in splits.items():
        dataset = datasets.Dataset.from_list(rows)
        for image in images:
            dataset = dataset.cast_column(image, datasets.Image())
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(folder / path)
        files.append({"split": split, "path": path})
    DatasetInfosDict(default=datasets.DatasetInfo(features=dataset.features)).to_dataset_card_data(card)
    MetadataConfigs(default={"data_files": files}).to_dataset_card_data(card)
    (folder / "README.md").write_text(f"---\n{card}\n---\n")


# --- MME-RealWorld -----------------------------------------------------------------------------------------------

TABLE_OPTIONS = ["(A) 24%", "(B) 13%", "(C) 12%", "(D) 11%", "(E) This image doesn't feature the data."]
TABLE_CHOICES = ["24%", "13%", "12%", "11%", "This image doesn't feature the data."]


@builder
def build_mme_realworld_lite(folder: Path) -> list:
    rows = []
    for number, (answer, options) in enumerate([("B", TABLE_OPTIONS), ("E", TABLE_OPTIONS)], 1):
        rows.append(
            {
                "Question_id": f"perception/diagram_and_table/table/000{number}",
                "Image": f"{number}.jpg",
                "Text": "What's the percentage of Operating Expenses in FY 2025 in this table?",
                "Question Type": "Multiple Choice",
                "Answer choices": options,
                "Ground truth": answer,
                "Category": "table",
                "Subtask": "Diagram and Table",
                "Task": "Perception",
            }
        )
        (folder / "data" / "imgs").mkdir(parents=True, exist_ok=True)
        (folder / "data" / "imgs" / f"{number}.jpg").write_bytes(encoded("red", form="JPEG"))
    (folder / "data" / "MME-RealWorld-Lite.json").write_text(json.dumps(rows, indent=4))
    return [example(row["Question_id"], row["Text"], row["Ground truth"], TABLE_CHOICES) for row in rows]


@builder
def build_mme_realworld(folder: Path) -> list:
    """The Hub's copy for lmms-eval: pictures in base64."""
    question = "Where is the house with a yellow roof in the picture?"
    row = {
        "index": 7,
        "bytes": base64.b64encode(encoded("yellow", size=(400, 300), form="BMP")).decode(),
        "question": question,
        "multi-choice options": ["(A) Left.", "(B) Right.", "(C) Top.", "(D) Bottom.", "(E) It is not there."],
        "answer": "A",
        "category": "Perception/Remote Sensing",
        "l2-category": "position",
    }
    hub_folder(folder, {"train": ("data/train-00000-of-00001.parquet", [row])}, images=())
    return [example("7", question, "A", ["Left.", "Right.", "Top.", "Bottom.", "It is not there."])]


# --- the others, in the order of the paper's table ---------------------------------------------------------------


@builder
def build_m3cot(folder: Path) -> list:
    def row(identifier, answer, image):
        return {
            "id": identifier,
            "category": "physical-commonsense",
            "image_id": f"{identifier}.png",
            "question": "What is the animal about to do?",
            "choices": ["jump", "sleep, or rest", "eat"],
            "context": "",
            "answer": answer,
            "rationale": "It bends its legs.",
            "split": "test",
            "image": image,
            "domain": "commonsense",
            "topic": "physical-commonsense",
        }

    rows = [row("physical-commonsense-1", "A", embedded("red")), row("physical-commonsense-2", "B", None)]
    rows.append(row("physical-commonsense-3", "C", embedded("blue")))
    hub_folder(
        folder,
        {"train": ("data/train-00000-of-00001.parquet", rows[:1]), "test": ("data/test-00000-of-00001.parquet", rows)},
    )
    choices = ["jump", "sleep, or rest", "eat"]
    return [example(row["id"], row["question"], row["answer"], choices) for row in (rows[0], rows[2])]


@builder
def build_vstar(folder: Path, count: int = 2) -> list:
    asked = "\nAnswer with the option's letter from the given choices directly."
    lines, expected = [], []
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
        choices = ["rubber", "cotton", "kevlar", "leather"]
        expected.append(example(str(number), question, letter, choices, None, boxes))
    (folder / "test_questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return expected


@builder
def build_mmstar(folder: Path) -> list:
    questions = [
        "Which option describes it?\nOptions: A: The suitcase is on the book., B: 3, 4, and 5, C: A: no, D: It",
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: How many snowmen are there?\nChoices:\n(A) 10\n(B) 15\n(C) 12\n(D) 20",
        "Look at the four pictures A to D. Which one is upside down?",
    ]
    rows = [
        {
            "index": number,
            "question": question,
            "image": embedded("red", f"images/{number}.jpg"),
            "answer": "C",
            "category": "coarse perception",
            "l2_category": "image scene and topic",
            "meta_info": {"source": "MMBench", "split": "val", "image_path": f"images/{number}.jpg"},
        }
        for number, question in enumerate(questions)
    ]
    hub_folder(folder, {"val": ("mmstar.parquet", rows)})
    first = ["The suitcase is on the book.", "3, 4, and 5", "A: no", "It"]
    return [
        example("0", "Which option describes it?", "C", first),
        example("1", "How many snowmen are there?", "C", ["10", "15", "12", "20"]),
        example("2", questions[2], "C", None, "letter"),
    ]


@builder
def build_mathvision(folder: Path) -> list:
    def row(identifier, question, options, answer):
        return {
            "id": identifier,
            "question": question,
            "options": options,
            "image": f"images/{identifier}.jpg",
            "decoded_image": embedded("red"),
            "answer": answer,
            "solution": None,
            "level": 1,
            "subject": "counting",
        }

    rows = [
        row("1", "How many triangles?\n<image1>", ["3", "$\\frac{9}{2}$"], "B"),
        row("2", "Which picture?\n<image1>", ["A", "B", "C", "D", "E"], "D"),
        row("3", "How long is the side?\n<image1>", [], "\\frac{3}{2}"),
    ]
    test, mini = ("test-00000-of-00001-3532b8d3f1b4047a", "testmini-00000-of-00001-f8ff70fcb2f29b1d")
    files = {"test": (f"data/{test}.parquet", rows), "testmini": (f"data/{mini}.parquet", rows[:1])}
    hub_folder(folder, files, images=("decoded_image",))
    return [
        example("1", rows[0]["question"], "B", ["3", "$\\frac{9}{2}$"], "math"),
        example("2", rows[1]["question"], "D", ["A", "B", "C", "D", "E"], "math"),
        example("3", rows[2]["question"], "\\frac{3}{2}", None, "math"),
    ]


def _wemath_row(key: str, image) -> dict:
    return {
        "ID": "3steps_165",
        "split": "testmini",
        "knowledge concept": "Area of Circles",
        "question": "What is the area of the flower bed (  ) m²?(π = 3.14)",
        "option": "A. 200.96;B. 3215.36;C. 6280;D. 32; E. No correct answer",
        "answer": "B",
        "image_path": image,
        "key": key,
        "question number": 1575,
        "knowledge concept description": "Area of ...",
    }


def _wemath_examples() -> list:
    choices = ["200.96", "3215.36", "6280", "32", "No correct answer"]
    question = _wemath_row("", None)["question"]
    return [example(f"3steps_165@{key}", question, "B", choices) for key in ("3steps_1", "3steps_multi")]


@builder
def build_wemath(folder: Path) -> list:
    rows = [_wemath_row(key, embedded("red")) for key in ("3steps_1", "3steps_multi")]
    hub_folder(folder, {"testmini": ("data/testmini-00000-of-00001.parquet", rows)}, images=("image_path",))
    return _wemath_examples()


def build_wemath_repository(folder: Path) -> list:
    """As the benchmark's own repository has it: JSON, and pictures under data/."""
    rows = [_wemath_row(key, "3steps/image/165-3.png") for key in ("3steps_1", "3steps_multi")]
    (folder / "data" / "3steps" / "image").mkdir(parents=True)
    (folder / "data" / "3steps" / "image" / "165-3.png").write_bytes(encoded())
    (folder / "data" / "testmini.json").write_text(json.dumps(rows))
    return _wemath_examples()


@builder
def build_chartqa(folder: Path) -> list:
    answers = [("How many stores did Saint Laurent operate in 2020?", "267"), ("Which years?", "[2010, 2012]")]
    answers.append(("What color?", "Blue"))
    rows = [
        {"type": "augmented_test", "question": question, "answer": answer, "image": embedded("red")}
        for question, answer in answers
    ]
    hub_folder(folder, {"test": ("data/test-00000-of-00001.parquet", rows)})
    return [
        example(str(number), question + SHORT, answer, None, "relaxed_number")
        for number, (question, answer) in enumerate(answers)
    ]


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
    def row(original_id, question, answer):
        return {
            "image": embedded("red"),
            "category": "cs",
            "year": "20",
            "original_figure_path": "foo/bar.jpg",
            "original_id": original_id,
            "figure_path": "images/0.jpg",
            "num_subplots": 1,
            "descriptive_q1": 2,
            "descriptive_a1": "Not Applicable",
            "reasoning_q": question,
            "reasoning_q_source": 1,
            "reasoning_a": answer,
            "reasoning_a_type": 1,
        }

    rows = [row("2004.03856", "Which model is best?", "Joint-CNN"), row("2004.03856", "Which plot?", "A")]
    rows.append(row("2004.10956", "How many points lie above 0.95?", "2"))
    hub_folder(folder, {"validation": ("val.parquet", rows), "test": ("test.parquet", rows[:1])})
    return [
        example("2004.03856#0", "Which model is best?" + SHORT, "Joint-CNN"),
        example("2004.03856#1", "Which plot?" + SHORT, "A"),
        example("2004.10956", "How many points lie above 0.95?" + SHORT, "2"),
    ]
