"""Small reports for the tests of the page, whose tokens look where a test says."""

import numpy as np
import torch
from browser import settle
from PIL import Image

from evaluate import Answer
from sayo.show.report import answer_parts, map_parts, picture_parts

WIDTH, HEIGHT = 120, 80
LAYERS = ["mean of all 2", "layer 0", "layer 1 (rewarded)"]
GRID = np.array([(x, y, x + 40, y + 40) for y in (0, 40) for x in (0, 40, 80)])  # (6, 4) cells
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!-- <script>",
    "javascript:window.hacked=1",
    "{{script}} {{data}}",
    "line\u2028paragraph\u2029end",
    "\u202eturned\u202c \u200f\u200e",
    "nul\x00bell\x07",
    "filler\u3164 selector\ufe0f joiner\u034f tag\U000e0041",
    "&lt;b&gt; &amp; &#60;",
    "lone \ud800 surrogate",
    "é 🎉 \\u003c \\",
]


def looking_at(tokens: list[str], cells: list[list[int]], correct: bool) -> dict:
    """An answer whose token t looks mostly at cell cells[layer][t] in each of two layers."""
    count, coverage = len(tokens), np.array([1.0, 0, 0, 0, 0, 0])
    maps = np.full((2, count, len(GRID)), 0.01)
    for layer in range(2):
        maps[layer, np.arange(count), cells[layer]] = 0.4
    accuracy = float(correct)
    scores = {"attention": 0.5, "format": 1.0, "accuracy": accuracy, "total": 2.5, "tas": 0.75, "tas_selected": 0.8}
    entropies, nothing = torch.linspace(0, 2, count), torch.zeros(count)
    scored, text = [count - 1] * (count > 0), "".join(tokens)
    values = [nothing.long(), tokens, entropies, nothing, nothing, scored, scores, text, False, torch.tensor(coverage)]
    answer = Answer(*values)
    return answer_parts(answer) | map_parts(maps, coverage, [0, 1], [(6, None)])


def example_of(question: str, answers: list[dict], color: str = "white") -> dict:
    region = [(0, 0, 40, 40)], [[[50, 50], [80, 50], [60, 70]]], None
    picture = picture_parts(Image.new("RGB", (WIDTH, HEIGHT), color), region)
    picture["cells"] = GRID.flatten().tolist()
    shape = {"question": question, "answer": "red", "choices": ["red", "blue"], "region_share": 1 / 6}
    return shape | {"pictures": [picture], "answers": answers}


def report_of(examples: list[dict], policies=("base", "adapter")) -> dict:
    report = {"about": "a model", "terms": "terms", "layers": LAYERS, "first_layer": 2, "most_entropy": 2.0}
    report["summary"] = [["", "accuracy"], *([name, "0.5"] for name in policies)]
    return report | {"policies": list(policies), "examples": examples}


BASE = looking_at(["The", " red", " one"], [[5, 5, 5], [0, 4, 2]], False)
ADAPTER = looking_at(["It", " is", " at", " the", " top"], [[3] * 5, [1, 5, 0, 3, 4]], True)
ANSWERS = {"What color?": [BASE, ADAPTER], "Second?": [ADAPTER, BASE], "Third?": [ADAPTER, ADAPTER]}
PLAIN = report_of([example_of(*pair) for pair in ANSWERS.items()])


def brightest_cells(browser) -> list[int | None]:
    """For each pane the cell of the grid at whose center the map is brightest; None for an empty map."""
    settle(browser)
    centers = [[(x1 + x2) // 2, (y1 + y2) // 2] for x1, y1, x2, y2 in GRID.tolist()]
    code = """return [...document.querySelectorAll('canvas')].map((canvas) => arguments[0].map(([x, y]) => {
        const [red, green, blue, alpha] = canvas.getContext('2d').getImageData(x, y, 1, 1).data;
        return alpha ? red + green : -1;
    }))"""
    return [None if max(own) < 0 else int(np.argmax(own)) for own in browser.execute_script(code, centers)]
