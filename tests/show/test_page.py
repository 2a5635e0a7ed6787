"""The report's page in a real Chromium: pointer, finger, keyboard, sliders, filter, and text alternatives."""

import time

import numpy as np
import pytest
from browser import actions, find, focus, point, press, require_chromium, selected, tokens_of
from page_reports import ADAPTER, GRID, HEIGHT, PLAIN, WIDTH, brightest_cells, example_of, looking_at, report_of
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from sayo.show.heat import paint_tokens
from sayo.show.report import map_parts


def test_without_chromium_a_user_is_told_and_ci_fails(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium chromium-driver"):
        require_chromium()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="Chromium is not installed"):
        require_chromium()


def test_the_token_under_the_pointer_moves_both_maps(show):
    browser = show(PLAIN)
    assert selected(browser) == ["The", "It"] and brightest_cells(browser) == [0, 1]
    point(browser, tokens_of(browser, 1)[1])
    assert selected(browser) == [" red", " is"] and brightest_cells(browser) == [4, 5]
    point(browser, tokens_of(browser, 1)[4])
    assert selected(browser) == [None, " top"] and brightest_cells(browser) == [None, 4]
    assert "has ended after 3 tokens" in find(browser, ".where")[0].text
    actions(browser).move_to_element(tokens_of(browser, 0)[2]).click().perform()  # held
    point(browser, tokens_of(browser, 0)[0])
    assert selected(browser) == [" one", " at"]
    press(browser, Keys.ESCAPE)
    point(browser, tokens_of(browser, 0)[1])
    assert selected(browser) == [" red", " is"]


def test_a_finger_that_slides_moves_the_maps(show):
    browser = show(PLAIN, width=360, height=740, phone=True)
    browser.execute_script("arguments[0].scrollIntoView()", find(browser, ".tokens")[1])
    places = [token.rect for token in tokens_of(browser, 1)]
    top = browser.execute_script("return window.scrollY")
    x = [place["x"] + place["width"] / 2 for place in places]
    y = places[0]["y"] + places[0]["height"] / 2 - top

    def touch(kind: str, points: list[dict]) -> None:
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", [{"x": x[1], "y": y}])
    assert selected(browser) == [" red", " is"]
    touch("touchMove", [{"x": x[2], "y": y}])
    touch("touchMove", [{"x": x[3], "y": y}])
    assert selected(browser) == [None, " the"] and brightest_cells(browser) == [None, 3]
    touch("touchEnd", [])


def test_the_keyboard_moves_token_and_example_in_step(show):
    browser = show(PLAIN)
    focus(browser, ".tokens", 1)
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert selected(browser) == [" one", " at"] and brightest_cells(browser) == [2, 0]
    press(browser, Keys.ARROW_LEFT)
    assert selected(browser) == [" red", " is"]
    press(browser, Keys.END)
    assert selected(browser) == [None, " top"]
    press(browser, Keys.ARROW_RIGHT)  # there is no further token
    assert selected(browser) == [None, " top"]
    press(browser, Keys.ARROW_DOWN)
    assert find(browser, "#question")[0].text == "Second?" and selected(browser) == ["It", "The"]
    assert browser.execute_script("return document.activeElement.matches('.pane:nth-child(2) .tokens')")
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_UP)
    assert find(browser, "#question")[0].text == "What color?" and selected(browser) == ["The", "It"]
    focus(browser, "#examples")
    press(browser, Keys.END)
    assert find(browser, "#question")[0].text == "Third?"
    assert find(browser, '#examples [aria-selected="true"]')[0].text.startswith("Third?")


def test_the_address_leads_back_to_an_example_and_a_token(show):
    browser = show(PLAIN)
    focus(browser, ".tokens")
    press(browser, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    time.sleep(0.4)
    address, place = browser.current_url.split("#")
    assert place == "2.2"
    browser.refresh()
    assert find(browser, "#question")[0].text == "Second?" and selected(browser) == [" is", " red"]
    for ending, question in (("#99.99", "Third?"), ("#0.0", "What color?"), ("#<b>", "What color?")):
        browser.get("about:blank")
        browser.get(address + ending)
        assert find(browser, "#question")[0].text == question


def test_tab_reaches_every_control_in_the_order_of_the_page_and_shows_where_it_is(show):
    browser, reached = show(PLAIN), []
    code = """const at = document.activeElement, style = getComputedStyle(at);
        return [at.id || at.className || at.tagName, style.outlineStyle, parseFloat(style.outlineWidth)]"""
    for _ in range(12):
        press(browser, Keys.TAB)
        reached.append(browser.execute_script(code))
    names = [name for name, *_ in reached]
    expected = ["skip", "filter", "examples", "previous", "next", "layer", "opacity", "region", "tokens", "tokens"]
    assert names[: len(expected)] == expected and names[len(expected)] == "SUMMARY"
    assert all(style != "none" and width >= 2 for _, style, width in reached[1:11])


def test_sliders_change_layer_and_opacity(show):
    browser = show(PLAIN)
    assert brightest_cells(browser) == [0, 1] and find(browser, "#layer-name")[0].text == "layer 1 (rewarded)"
    focus(browser, "#layer")
    press(browser, Keys.ARROW_LEFT)
    assert brightest_cells(browser) == [5, 3] and find(browser, "#layer-name")[0].text == "layer 0"
    assert find(browser, "#layer")[0].get_attribute("aria-valuetext") == "layer 0"
    alpha = "return document.querySelector('canvas').getContext('2d').getImageData(100, 60, 1, 1).data[3]"
    before = browser.execute_script(alpha)
    focus(browser, "#opacity")
    press(browser, Keys.HOME)
    assert before > 100 and browser.execute_script(alpha) == 0
    press(browser, Keys.END)
    assert browser.execute_script(alpha) > before
    find(browser, "#region")[0].click()
    visibility = "return getComputedStyle(document.querySelector('.stage svg')).visibility"
    assert browser.execute_script(visibility) == "hidden"


def test_cells_that_overlap_are_painted_as_paint_tokens_paints_them(show):
    """Tiles and a thumbnail: the page's pixels, turned back into numbers, are those of the picture in Python."""
    rng = np.random.default_rng(0)
    cells = np.array([*GRID, (0, 0, 60, 80), (60, 0, 120, 80), (10, 10, 50, 70)])
    maps, count = rng.random((2, 4, len(cells))), 4
    example = example_of("Overlap?", [looking_at(["a"] * count, [[0] * count] * 2, True)])
    example["pictures"][0]["cells"] = cells.flatten().tolist()
    example["answers"][0] |= map_parts(maps, np.ones(len(cells)), [0, 1], [(len(cells), None)])
    browser = show(report_of([example], ["base"]))
    focus(browser, "#opacity")
    press(browser, Keys.END)
    code = "return [...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 120, 80).data]"
    heat = paint_tokens(maps[1, 0], cells, (WIDTH, HEIGHT))
    alpha = np.array(browser.execute_script(code)).reshape(HEIGHT, WIDTH, 4)[..., 3]
    share = (1 - alpha / 255) / 0.3  # where attention is highest, most of the picture shows through
    assert abs(share - heat / heat.max()).max() < 0.02 and len(np.unique(alpha)) > 6


def test_the_filter_shows_what_changed(show):
    browser = show(PLAIN)
    choice = Select(find(browser, "#filter")[0])
    expected = {"all": 3, "base wrong": 1, "adapter right": 2, "wrong, then right": 1, "right, then wrong": 1}
    for name, count in expected.items():
        choice.select_by_visible_text(name)
        assert sum(entry.is_displayed() for entry in find(browser, ".entry")) == count
        assert find(browser, "#count")[0].text == f"{count} of 3"
    assert find(browser, "#question")[0].text == "Second?"
    find(browser, "#next")[0].click()  # there is no other
    assert find(browser, "#question")[0].text == "Second?"


def test_everything_that_is_seen_is_also_said(show):
    browser = show(PLAIN)
    focus(browser, ".tokens")
    press(browser, Keys.ARROW_RIGHT)
    time.sleep(0.4)  # it waits for the cursor to rest
    live = find(browser, "#live")[0]
    assert live.get_attribute("aria-live") == "polite"
    said = live.get_property("textContent")
    # Token 2 of the base looks with 0.4 of 0.45 at cell 4, below in the middle; the region is cell 0.
    assert "base. Token 2 of 3, “red”. On the picture: 45 % of its attention, most at the bottom." in said
    assert "On the region: 2.2 % of that; without a preference it would be 17 %. Entropy: 1.00 nats." in said
    assert "adapter. Token 2 of 5, “is”." in said
    tokens = find(browser, ".tokens")[0]
    assert tokens.get_attribute("role") == "listbox" and "3 tokens" in tokens.get_attribute("aria-label")
    active = tokens.get_attribute("aria-activedescendant")
    assert find(browser, f"#{active}")[0].get_attribute("aria-selected") == "true"
    last = tokens_of(browser, 0)[2]
    assert last.get_attribute("role") == "option" and last.get_attribute("aria-label") == "one, entropy 2.00, scored"
    (picture,) = find(browser, ".pane:first-child img.picture")
    assert picture.get_attribute("alt") == "Picture of the question “What color?”, region: 1 box and 1 polygon"
    assert find(browser, ".said")[0].text.endswith("✗ wrong") and find(browser, ".said")[1].text.endswith("✓ right")
    unnamed = """return [...document.querySelectorAll('button, select, input, img, [role=listbox]')].filter((node) =>
        !(node.labels && node.labels.length) && !node.ariaLabel && !node.hasAttribute('alt')).length"""
    assert browser.execute_script(unnamed) == 0


def test_one_policy_alone_and_an_empty_completion(show):
    empty = looking_at([], [[], []], False)
    browser = show(report_of([example_of("Empty?", [empty]), example_of("Full?", [ADAPTER])], ["base"]))
    assert "This completion is empty." in find(browser, ".where")[0].text and brightest_cells(browser) == [None]
    find(browser, "#next")[0].click()
    assert selected(browser) == ["It"] and len(find(browser, ".pane")) == 1
