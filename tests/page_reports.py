"""Small reports for the tests of the page, whose tokens look where a test says, and what a browser shows of them."""

import numpy as np
import torch
from PIL import Image

from answers import Answer
from report import answer_parts, map_parts, picture_parts

WIDTH, HEIGHT, COLUMNS, ROWS = 120, 80, 3, 2
LAYERS = ["mean of all 2", "layer 0", "layer 1 (rewarded)"]


def cells_of_grid() -> np.ndarray:
    x, y = np.meshgrid(np.arange(COLUMNS) * 40, np.arange(ROWS) * 40)
    return np.stack([x, y, x + 40, y + 40], -1).reshape(-1, 4)  # (6, 4)


def answer_that_looks_at(tokens: list[str], cells: list[list[int]], correct: bool) -> dict:
    """An answer whose token t looks mostly at cell cells[layer][t] in each of two layers."""
    count, coverage = len(tokens), np.array([1.0, 0, 0, 0, 0, 0])
    maps = np.full((2, count, COLUMNS * ROWS), 0.01)
    for layer in range(2):
        maps[layer, np.arange(count), cells[layer]] = 0.4
    accuracy = float(correct)
    scores = {"attention": 0.5, "format": 1.0, "accuracy": accuracy, "total": 2.5, "tas": 0.75, "tas_selected": 0.8}
    entropies = torch.linspace(0, 2, count) if count else torch.zeros(0)
    text = "".join(tokens)
    nothing = torch.zeros(count)
    answer = Answer(
        nothing.long(),
        tokens,
        entropies,
        nothing,
        nothing,
        [count - 1] * (count > 0),
        scores,
        text,
        False,
        torch.tensor(coverage),
    )
    return answer_parts(answer) | map_parts(maps, coverage, [0, 1], [(6, None)])


def example_of(question: str, answers: list[dict], color: str = "white") -> dict:
    picture = picture_parts(
        Image.new("RGB", (WIDTH, HEIGHT), color), ([(0, 0, 40, 40)], [[[50, 50], [80, 50], [60, 70]]], None)
    )
    picture["cells"] = cells_of_grid().flatten().tolist()
    shape = {"question": question, "answer": "red", "choices": ["red", "blue"], "region_share": 1 / 6}
    return shape | {"pictures": [picture], "answers": answers}


def report_of(examples: list[dict], policies=("base", "adapter")) -> dict:
    return {
        "about": "a model",
        "terms": "terms",
        "summary": [["", "accuracy"], *([name, "0.5"] for name in policies)],
        "policies": list(policies),
        "layers": LAYERS,
        "first_layer": 2,
        "most_entropy": 2.0,
        "examples": examples,
    }


BASE = answer_that_looks_at(["The", " red", " one"], [[5, 5, 5], [0, 4, 2]], False)
ADAPTER = answer_that_looks_at(["It", " is", " at", " the", " top"], [[3] * 5, [1, 5, 0, 3, 4]], True)
PLAIN = report_of(
    [
        example_of("What color?", [BASE, ADAPTER]),
        example_of("Second?", [ADAPTER, BASE]),
        example_of("Third?", [ADAPTER, ADAPTER]),
    ]
)


# --- what a browser shows ---


def find(browser, selector: str):
    return browser.find_elements("css selector", selector)


def settle(browser) -> None:
    """Two frames: moves of a pointer reach the page with the next frame, not at once."""
    browser.execute_script("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def tokens_of(browser, pane: int):
    return find(find(browser, ".tokens")[pane], ".token")


def selected(browser) -> list[str]:
    """Text of the token under the cursor in each pane, None where the completion has ended."""
    settle(browser)
    chosen = [find(tokens, '[aria-selected="true"]') for tokens in find(browser, ".tokens")]
    return [own[0].get_property("textContent") if own else None for own in chosen]


def brightest_cells(browser) -> list[int | None]:
    """For each pane the cell of the grid at whose center the map is brightest; None for an empty map."""
    settle(browser)
    centers = [[(x1 + x2) // 2, (y1 + y2) // 2] for x1, y1, x2, y2 in cells_of_grid().tolist()]
    code = """return [...document.querySelectorAll('canvas')].map((canvas) => arguments[0].map(([x, y]) => {
        const [red, green, blue, alpha] = canvas.getContext('2d').getImageData(x, y, 1, 1).data;
        return alpha ? red + green : -1;
    }))"""
    return [None if max(own) < 0 else int(np.argmax(own)) for own in browser.execute_script(code, centers)]


def text_of(browser, node) -> str:
    return browser.execute_script("return arguments[0].textContent.toWellFormed()", node)


def press(browser, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser, duration=0).send_keys(*keys).perform()


def focus(browser, selector: str, index: int = 0) -> None:
    browser.execute_script("arguments[0].focus()", find(browser, selector)[index])


def keys():
    from selenium.webdriver.common.keys import Keys

    return Keys
