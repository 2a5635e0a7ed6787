"""The report's page in a real Chromium: hostile text, small screens, light and dark, size and opening time."""

import re
import time
from contextlib import nullcontext, suppress
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from browser import find, focus, selected, text_of, tokens_of
from page_reports import ADAPTER, HOSTILE, PLAIN, example_of, looking_at, report_of
from PIL import Image

from evaluate import Answer
from sayo.model.loading import load_processor
from sayo.run.card import visible
from sayo.show import report
from sayo.show.report import collect, page
from visualize import VisualizeConfig


def test_hostile_text_is_shown_and_nothing_of_it_runs(show):
    long = "x" * 3000
    tokens = [*HOSTILE, long]
    hostile = looking_at(tokens, [[0] * len(tokens)] * 2, True) | {"answer": "<b onclick=hacked>"}
    examples = [example_of(text, [hostile, hostile]) | {"answer": text, "choices": [text]} for text in HOSTILE]
    data = report_of(examples, ["<i>base</i>", "</script><script>window.hacked=2</script>"])
    data |= {"about": HOSTILE[0], "terms": HOSTILE[1]}
    browser = show(data)
    for index, text in enumerate(HOSTILE):
        find(browser, ".entry")[index].click()
        shown = text_of(browser, find(browser, "#question")[0])
        plain = visible(text)  # as in a card
        assert shown == plain.replace("\ud800", "\ufffd")  # WebDriver cannot send a lone surrogate
    texts = [text_of(browser, token) for token in tokens_of(browser, 0)]
    assert texts[0] == HOSTILE[0] and texts[1] == HOSTILE[1] and texts[-1] == long
    assert "⟨U+202E⟩turned" in texts[6] and "nul⟨U+0000⟩bell⟨U+0007⟩" in texts
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.scripts.length") == 2
    foreign = "b, i:not(.ramp), a:not(.skip), iframe, object, img:not(.picture):not(.entry img), [onclick], [onerror]"
    assert [node.get_attribute("class") for node in find(browser, foreign)] == ["scored"]  # the legend's own <b>
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1200


def test_the_policy_stops_what_the_page_would_never_do(browser, tmp_path):
    """Were a way in found after all: inline scripts, handlers, markup from text and requests are all refused."""
    path = tmp_path / "report.html"
    path.write_text(page(PLAIN), encoding="utf-8")
    browser.get(path.as_uri())
    code = """
        window.violations = [];
        document.addEventListener('securitypolicyviolation', (event) => violations.push(event.violatedDirective));
        const script = document.createElement('script');
        try { script.text = 'window.hacked = 1'; document.body.append(script); } catch (error) {}
        try { document.body.innerHTML += '<img src=x onerror="window.hacked = 1">'; } catch (error) {}
        const image = document.createElement('img');
        image.src = 'https://example.org/x.png';
        document.body.append(image);
        fetch('https://example.org/').catch(() => {});
    """
    browser.execute_script(code)
    time.sleep(0.3)
    violations = set(browser.execute_script("return window.violations"))
    assert {"img-src", "connect-src", "require-trusted-types-for"} <= violations
    assert browser.execute_script("return window.hacked") is None
    for log in ("browser", "performance"):
        browser.get_log(log)  # what was refused is no other test's


CONTRAST = """
    const canvas = document.createElement('canvas'), context = canvas.getContext('2d', { willReadFrequently: true });
    const over = (colors) => {  // paints them one over the other
        context.clearRect(0, 0, 1, 1);
        for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const luminance = (color) => color.map((part) => part / 255).map((part) =>
        part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
    const found = [];
    for (const node of document.querySelectorAll('body *')) {
        const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
        if (!own || !node.checkVisibility() || node.closest('script, noscript, .hidden, .skip')) continue;
        const grounds = [];
        for (let at = node; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
        const back = over(grounds), front = over([`rgb(${back})`, getComputedStyle(node).color]);
        const [low, high] = [luminance(back), luminance(front)].sort((a, b) => a - b);
        found.push([(high + 0.05) / (low + 0.05), node.className || node.tagName, node.textContent.slice(0, 30)]);
    }
    return [found, getComputedStyle(document.body).backgroundColor];
"""


def test_all_text_has_contrast_in_both_color_schemes(show):
    backgrounds = []
    signs = looking_at(["say", "", "\n", "\x00"], [[0] * 4] * 2, True)  # the last are the most uncertain
    data = report_of([example_of("What?", [signs, ADAPTER | {"answer": None, "truncated": True}])])
    for dark in (False, True):
        browser = show(data, dark=dark)
        find(browser, "summary")[0].click()
        time.sleep(0.2)  # colors fade in
        found, background = browser.execute_script(CONTRAST)
        assert len(found) > 45
        assert [entry for entry in found if entry[0] < 4.5] == []  # WCAG AA
        backgrounds.append(sum(map(int, re.findall(r"\d+", background)[:3])))
    assert backgrounds[0] > 600 and backgrounds[1] < 150


@pytest.mark.parametrize("width", [320, 360, 768])
def test_a_narrow_screen_has_no_horizontal_scroll(show, width):
    wide = looking_at(["verylong" * 200, "</answer>"], [[0, 1]] * 2, True)
    data = report_of([example_of("w" * 500, [wide, wide])] * 30)
    data["about"] = "a/very/long/path/of/a/model" * 20
    browser = show(data, width=width, height=740, phone=True)
    sizes = "const root = document.documentElement; return [root.scrollWidth, root.clientWidth, window.innerWidth]"
    assert browser.execute_script(sizes) == [width, width, width]
    outside = """return [...document.querySelectorAll('main *, .choose *')].filter((node) =>
        node.getBoundingClientRect().right > innerWidth + 1 && node.checkVisibility()).map((node) => node.outerHTML)"""
    assert browser.execute_script(outside) == []
    small = """return [...document.querySelectorAll('button, select, input[type=range]')].filter((node) =>
        node.getBoundingClientRect().height < 24).length"""
    assert browser.execute_script(small) == 0  # WCAG 2.2: targets of 24 pixels


def test_reduced_motion_is_respected(show):
    browser = show(PLAIN)
    duration = "return getComputedStyle(document.querySelector('.token')).transitionDuration"
    assert browser.execute_script(duration) != "0s"
    reduced = {"name": "prefers-reduced-motion", "value": "reduce"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [reduced]})
    assert browser.execute_script(duration) == "0s"


@pytest.fixture(scope="module")
def fifty(model_folders) -> dict:
    """Photographs of a megapixel, 110 tokens of two policies, 36 layers, as large as a report comes: ten times five."""
    _, processor = load_processor(model_folders["qwen3_vl"])
    generator = np.random.default_rng(0)
    examples = []
    for index in range(5):
        blurred = Image.fromarray(generator.normal(128, 40, (24, 32, 3)).clip(0, 255).astype(np.uint8))
        blurred = blurred.resize((1024, 768), Image.Resampling.BICUBIC)
        picture = Image.blend(blurred, Image.effect_noise((1024, 768), 24).convert("RGB"), 0.25)
        region = {"images": [picture], "boxes": [[100, 100, 300, 300]]}
        examples.append(region | {"question": f"What color is thing {index}?", "answer": "red"})
    count = len(report.token_cells(processor, picture))
    maps = torch.tensor(generator.gamma(0.3, 1, (36, 110, count)), dtype=torch.float32)
    scores = dict.fromkeys(("attention", "format", "accuracy", "total", "tas", "tas_selected"), 0.5)
    values = torch.rand(110)
    answer = Answer(values.long(), [" word"] * 110, *[values] * 3, [3, 50], scores, "text", False, torch.rand(count))
    answers, room = {name: [answer] * 5 for name in ("base", "adapter")}, 1_500_000 - len(page({})) // 10
    results = {"layer_types": ["full_attention"] * 36, "resolve_layers": [35], "attention_maps": maps}
    results |= {"encode_prompt": None, "switched_to": nullcontext()}
    with mock.patch.multiple(report, **{name: mock.Mock(return_value=result) for name, result in results.items()}):
        found = collect(None, processor, examples, answers, VisualizeConfig(adapter="a"), room)
    return found | {"examples": found["examples"] * 10}


def cpu_seconds(browser) -> float:
    """What all of the browser's processes have used of the processor: unlike a clock, whatever else is running."""
    total = 0.0
    for process in psutil.Process(browser.service.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a helper that has ended meanwhile
            total += sum(process.cpu_times()[:2])
    return total


def test_fifty_examples_are_small_and_open_fast(show, fifty):
    html = page(fifty)
    assert 8e6 < len(html.encode()) < 15e6
    assert len(fifty["layers"]) >= 4 and fifty["layers"][-1] == "layer 35 (rewarded)"
    drawn = """return new Promise((done) =>
        requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))"""
    browser, measured = show(PLAIN), []
    for _ in range(3):
        before = cpu_seconds(browser)
        seconds = show(html).execute_script(drawn) / 1000  # since the page was asked for
        measured.append((cpu_seconds(browser) - before, seconds))
    assert len(find(browser, ".entry")) == 50 and len(tokens_of(browser, 0)) == 110
    step = """const begin = performance.now(), press = { key: 'ArrowRight', bubbles: true };
        for (let count = 0; count < 100; count++)
            document.activeElement.dispatchEvent(new KeyboardEvent('keydown', press));
        return (performance.now() - begin) / 100"""
    focus(browser, ".tokens")
    before = cpu_seconds(browser)
    milliseconds = browser.execute_script(step)
    cpu = 10 * (cpu_seconds(browser) - before)
    opened = ", ".join(f"{wall:.2f} s ({used:.2f} s of the processor)" for used, wall in measured)
    print(f"{len(html.encode()) / 1e6:.1f} MB, drawn after {opened}; {milliseconds:.1f} ms for a step of the cursor")
    assert selected(browser)[0] == " word" and min(used for used, _ in measured) < 2 and cpu < 50
