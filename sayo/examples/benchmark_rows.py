"""Rows of a public benchmark as examples: parses options and answers, finds pictures."""

import base64
import os
import re
import string
from collections import Counter
from collections.abc import Sequence

from sayo.examples.pictures import DataError, DataFolder
from sayo.examples.rows import Table
from sayo.grader.grader import normalized

LONGEST_PATH = 1000  # characters; a longer text is a picture in base64
LONGEST_QUESTION, MOST_STARTS = 20_000, 20  # bounds on work: characters, and candidates for the first option

_INSTRUCTION = re.compile(
    r"(?:Answer with the option's letter from the given choices directly|Please answer with the letter of the "
    r"correct option|Please select the correct answer from the options above)\.?$",
    re.IGNORECASE,
)
_HINT = re.compile(r"^Hint: Please answer the question and provide the correct option letter[^\n]*\n\s*Question:\s*")
_HEADER = re.compile(r"(?:(?:answer )?options?|choices?) ?:?$", re.IGNORECASE)
# An option's letter, and what may stand before it: nothing, a line break, or a separator.
_STYLES = (r"(?:^|(?<=\s)|(?<=[,;:]))\({}\)\s*", r"(?:^|(?<=[\n,;])|(?<=[,;:]\s))[ \t]{{0,8}}{}[:.)]\s*")


def split_options(text: str) -> tuple[str, list[str]]:
    """(question, options without their letters) of a text that contains its options; [] when there are none.

    Options begin with (A), A:, A. or A), with at least two letters in order; the longest such run counts, of equally
    long ones the last. A header before them ("Options:", "Choices:") and an instruction after them are removed.

    Example: "Which?\\nOptions: A: 3, 4, B: red" gives ("Which?", ["3, 4", "red"]).
    """
    text = _HINT.sub("", _INSTRUCTION.sub("", text.strip())).strip()
    best: list[re.Match] = []
    if len(text) > LONGEST_QUESTION:
        return text, []
    for style in _STYLES:
        patterns = [re.compile(style.format(letter)) for letter in string.ascii_uppercase]
        for first in list(patterns[0].finditer(text))[-MOST_STARTS:]:
            run, end = [first], first.end()
            for pattern in patterns[1:]:
                following = pattern.search(text, end)
                if following is None:
                    break
                run.append(following)
                end = following.end()
            if len(run) >= max(2, len(best)):
                best = run
    if not best:
        return text, []
    starts = [*(found.start() for found in best[1:]), len(text)]
    pairs = zip(best, starts, strict=True)
    options = [text[found.end() : start].strip().rstrip(",;").rstrip() for found, start in pairs]
    if not all(options):
        return text, []
    return _HEADER.sub("", text[: best[0].start()].strip()).strip(), options


def without_letters(options: Sequence[str]) -> list[str]:
    """The options without their letters, if each begins with its own."""
    pairs = zip(string.ascii_uppercase, options, strict=False)
    found = [re.match(rf"\s*[(\[]?{letter}[)\].:]+\s*(?=\S)", text) for letter, text in pairs]
    if len(options) > 1 and all(found):
        return [text[letter.end() :].strip() for text, letter in zip(options, found, strict=True)]
    return [text.strip() for text in options]


class BenchmarkRows(Sequence):
    """The rows of a Benchmark (benchmarks.py) in the format of load.py.

    folder     that picture paths count from; None for a table from the Hub
    unparsed   ids of the rows read so far whose options could not be parsed; they are graded by letter
    """

    def __init__(self, benchmark, dataset, folder: DataFolder | None):
        self.benchmark, self.folder, self.unparsed = benchmark, folder, set()
        used = [name for name in ("image", "question", "answer", "choices") if getattr(benchmark, name)]
        self._columns = {name: column_of(benchmark, name, dataset.column_names) for name in used}
        parts = benchmark.id.split("@") if "@" in benchmark.id else []
        if benchmark.id and not parts:
            parts = [column_of(benchmark, "id", dataset.column_names)]
        names = ["@".join(map(str, key)) for key in zip(*(dataset[part] for part in parts), strict=True)]
        names = names or list(map(str, range(len(dataset))))
        repeated = {name for name, count in Counter(names).items() if count > 1}
        self._ids = [f"{name}#{row}" if name in repeated else name for row, name in enumerate(names)]
        self._rows = Table(dataset.select_columns(list(dict.fromkeys(self._columns.values()))))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        """The example in a row, unchecked. Raises DataError for a row that is not in the benchmark's format."""
        raw = self._rows[index]
        row = {name: raw[column] for name, column in self._columns.items()}
        if not isinstance(row["question"], str):
            raise DataError(f"{self._columns['question']} is {row['question']!r:.200}; it should be a text")
        # The prompt puts the picture first; some models would take the marker for a placeholder.
        whole = row["question"].replace("<image>", "").strip()
        question, choices = self._choices(whole, row.get("choices"))
        answer, answer_type = self._answer(row["answer"], choices, row.get("choices"))
        if answer_type == "letter":
            self.unparsed.add(self._ids[index])
            question, choices = "\n".join([whole, *filter(None, [row.get("choices")])]), []
        pictures = row["image"] if isinstance(row["image"], list) else [row["image"]]
        images = [self._picture(picture) for picture in pictures if picture is not None]
        question = self.benchmark.template.format(question=question)
        example = {"id": self._ids[index], "images": images, "question": question}
        example |= {"answer": answer, "choices": choices or None, "answer_type": answer_type}
        if self.benchmark.boxes:
            example["boxes"] = self.benchmark.boxes(row, self.folder)
        return example

    def _choices(self, question: str, given) -> tuple[str, list[str]]:
        """The question and its choices, [] for none."""
        if self.benchmark.options_inside:
            return split_options(question)
        if isinstance(given, str):
            return question, split_options(given)[1]
        return question, without_letters(list(map(str, given or [])))

    def _answer(self, answer, choices: list[str], given) -> tuple[str, str | None]:
        """The answer and its answer_type: "letter" where the choices are unknown."""
        if isinstance(answer, list):
            answer = answer[0] if len(answer) == 1 else f"[{', '.join(map(str, answer))}]"
        answer, answer_type = str(answer).strip(), self.benchmark.answer_type
        letter = re.fullmatch(r"[(\[]?([A-Z])[)\].]?", answer)
        number = ord(letter[1]) - ord("A") if letter else -1
        if self.benchmark.index and answer.isdecimal():
            number = int(answer)
        if choices:
            beside = answer_type if answer_type == "math" else None
            texts = list(map(normalized, choices))
            if 0 <= number < len(choices):  # the letter may be the text of another choice
                name = string.ascii_uppercase[number]
                return choices[number] if name.casefold() in texts else name, beside
            if normalized(answer) in texts:
                return choices[texts.index(normalized(answer))], beside
        if letter and (self.benchmark.options_inside or isinstance(given, str)):
            return letter[1], "letter"
        return answer, None if choices else answer_type

    def _picture(self, picture):
        """The bytes of a picture, or its path from the folder. Raises DataError when it is outside or missing."""
        if isinstance(picture, dict):
            if picture.get("bytes"):
                return picture["bytes"]
            picture = picture.get("path")
        if not isinstance(picture, str) or not picture:
            return picture
        if len(picture) > LONGEST_PATH:
            try:
                return base64.b64decode(picture, validate=True)
            except ValueError as error:
                raise DataError(f"picture {picture[:40]!r}... is neither a path nor base64: {error}") from error
        if self.folder is None:
            raise DataError(f"picture {picture!r:.200} is a path, but the Hub's table has no files; read a local copy")
        for place in self.benchmark.pictures:
            path = self.folder.resolve("picture", os.path.join(place, picture))
            if os.path.isfile(path):
                return os.path.join(place, picture)
        looked = ", ".join(str(self.folder.path / place) for place in self.benchmark.pictures)
        raise DataError(f"picture {picture!r:.200}: there is no such file in {looked}; unpack the pictures there")


def column_of(benchmark, name: str, present: Sequence[str]) -> str:
    """The column for a benchmark's field in this copy. Raises DataError with the columns that exist."""
    wanted = getattr(benchmark, name).split("|")
    if found := [column for column in wanted if column in present]:
        return found[0]
    found = f"no column {' or '.join(wanted)} ({name}), but {', '.join(present)}"
    fix = "give a copy in the format that sayo/examples/benchmarks.py describes"
    raise DataError(f"{benchmark.source}: this copy has {found}; {fix}")
