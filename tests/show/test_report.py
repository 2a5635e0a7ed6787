"""The report: maps are what attention_maps says, everything is scored as in training, and any text stays a text."""

import base64
import hashlib
import io
import json
import re

import hypothesis
import numpy as np
import pytest
import torch
from conftest import adapted
from hypothesis import given
from hypothesis import strategies as st
from page_reports import HOSTILE
from PIL import Image

import rollout
from evaluate import answer_examples, answers_by_policy, token_texts
from reward import select_uncertain
from sayo.examples.load import load_examples
from sayo.examples.regions import paint_region
from sayo.model.forward import attention_maps, token_statistics
from sayo.model.prompts import encode_prompt, joined_cells, region_coverage, token_cells
from sayo.settings import ConfigError
from sayo.show import report
from sayo.show.heat import paint_tokens
from sayo.show.report import collect, embedded, page
from visualize import VisualizeConfig, main


def settings(**more) -> VisualizeConfig:
    return VisualizeConfig(max_new_tokens=12, **more)


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="report">(.*?)</script>', html, re.DOTALL)[1])


def written(*arguments) -> dict:
    """The data in the page that collect's arguments, with room for all layers, lead to."""
    return data_of(page(collect(*arguments, 10_000_000)))


def levels_of(data: dict, example: int = 0, policy: int = 0) -> np.ndarray:
    """(layers, n, K) values that the page computes from the bytes of an answer."""
    answer = data["examples"][example]["answers"][policy]
    levels = np.frombuffer(base64.b64decode(answer["maps"]), np.uint8)
    levels = levels.reshape(len(data["layers"]), len(answer["tokens"]), -1)
    return np.array(answer["scales"])[..., None] * (levels / 255) ** 2


JSON = st.recursive(st.text() | st.none() | st.integers(), lambda at: st.lists(at) | st.dictionaries(st.text(), at))


@given(JSON)
@hypothesis.example({text: [text] for text in HOSTILE})
def test_any_json_survives_embedding_and_leaves_no_markup(value):
    embedding = embedded(value)
    assert json.loads(embedding) == value
    assert embedding.isascii() and not re.search(r"[<>&\x00-\x1f]", embedding)


@given(st.lists(st.text(alphabet=st.characters(codec=None) | st.sampled_from("<>/!-{}&;scriptdata "), max_size=30)))
def test_a_page_holds_its_data_once_and_no_element_more(texts):
    html = page({"examples": texts})
    assert data_of(html) == {"examples": texts}
    assert html.count("<script") == 2 and html.count("</script") == 2
    html.encode()  # a lone surrogate is no UTF-8; escaped, it is


def test_the_policy_names_exactly_the_style_and_the_script_that_are_there():
    html = page({})
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    for kind, text in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", html)
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
        assert sink not in script


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "smolvlm"])
def test_texts_of_tokens_join_to_the_whole(policies, family):
    tokenizer = policies[family][1].tokenizer
    ids = tokenizer("The cross é 🎉🎉 <answer>\nsmall</answer>  end").input_ids
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "🎉" in texts and "" in texts and "\ufffd" not in "".join(texts)
    cut = ids[: texts.index("🎉")]  # within a character: it still shows that there is something
    assert token_texts(tokenizer, cut)[-1].endswith("\ufffd")
    assert token_texts(tokenizer, []) == []


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=6))
def test_bytes_are_as_near_as_promised(rows):
    values = np.array(rows)
    levels, scales = report.quantize(values)
    back = scales[:, None] * (levels / 255) ** 2
    largest = np.where(scales > 0, scales, 1)[:, None]
    bound = scales[:, None] * (np.sqrt(values / largest) / 255 + 1 / 510**2)
    assert levels.dtype == np.uint8 and (abs(back - values) <= bound + 1e-12).all()
    assert (back.max(1) == values.max(1)).all()  # the scale itself is kept


def test_the_mean_and_each_layer_are_what_attention_maps_says(policy, examples):
    model, processor = policy
    prompt = encode_prompt(processor, examples[0])
    completion = processor.tokenizer("The red star is at the top.", return_tensors="pt").input_ids[0]
    layers = [0, 1, 2, 3]
    maps = attention_maps(model, prompt, completion, layers=layers, per_layer=True)  # (L, n, N)
    for layer in layers:
        torch.testing.assert_close(maps[layer], attention_maps(model, prompt, completion, layers=(layer,)))
    torch.testing.assert_close(maps.mean(0), attention_maps(model, prompt, completion, layers=layers))
    parts = report.map_parts(maps.numpy(), prompt.coverage.numpy(), [1, 3], [(maps.shape[-1], None)])
    statistics = token_statistics(model, prompt, [completion], layers=(3,))
    image = statistics.image_attention[0] * maps.shape[-1]
    region = statistics.target_attention[0] * prompt.coverage.sum() / image
    np.testing.assert_allclose(parts["on_picture"][2], image, rtol=1e-3)
    np.testing.assert_allclose(parts["on_region"][2], region, rtol=1e-3)


def test_per_layer_maps_come_in_rising_order(policies, examples):
    """Also where only some layers have attention rows (Qwen3.5), and in the padded layout."""
    model, processor = policies["qwen3_5"]
    prompt = encode_prompt(processor, examples[0])
    completion = torch.tensor([40, 41, 42])
    maps = attention_maps(model, prompt, completion, layers=(-1,), per_layer=True)
    assert maps.shape == (1, 3, len(prompt.image_token_index))
    torch.testing.assert_close(maps[0], attention_maps(model, prompt, completion, layers=(3,)))


def test_merged_cells_keep_all_attention_and_its_place():
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(0, 640, 16), np.arange(0, 480, 16))
    cells = np.stack([x, y, x + 16, y + 16], -1).reshape(-1, 4).astype(float)  # (1200, 4)
    kept, weights = report.merged_cells(cells, (640, 480), 1200)
    assert weights is None and kept is cells
    merged, weights = report.merged_cells(cells, (640, 480), 64)
    assert len(merged) <= 64 and weights.shape == (1200, len(merged))
    np.testing.assert_allclose(weights.sum(1), 1)
    values = rng.random(1200)
    # The same picture, painted from both and looked at through large windows, is the same.
    fine, coarse = paint_tokens(values, cells, (640, 480)), paint_tokens(values @ weights, merged, (640, 480))
    middle = fine.shape[0] // 2, fine.shape[1] // 2
    assert coarse[: middle[0], : middle[1]].sum() == pytest.approx(fine[: middle[0], : middle[1]].sum(), rel=0.03)
    area = (merged[:, 2] - merged[:, 0]) * (merged[:, 3] - merged[:, 1])
    assert area.sum() == pytest.approx(640 * 480)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "internvl", "smolvlm"])
def test_cells_without_seams(policies, family):
    """Between a picture's cells a gap of one pixel showed, where the ramps of token_cells had been rounded."""
    for size in ((118, 178), (333, 97), (512, 384)):
        cells = token_cells(policies[family][1], Image.new("RGB", size)).numpy()
        joined = joined_cells(cells)
        assert abs(joined - cells).max() <= (cells[:, 2:] - cells[:, :2]).min() / 2
        assert (paint_tokens(np.ones(len(cells)), np.round(joined), size) > 0).all()


def test_layers_are_chosen_to_fit():
    small = [(40, [30])] * 50
    assert report.choose_layers(small, 4, 15_000_000) == (10_000, 4)
    large = [(220, [1024])] * 50  # 220 tokens of two completions, a megapixel of Qwen3-VL
    most, count = report.choose_layers(large, 36, 12_000_000)
    assert most < 1024 and 3 <= count < 36
    assert 50 * 220 * (1 + count) * most * 4 / 3 < 12_000_000
    assert report.choose_layers(large, 36, 1000) == (64, 1)  # nothing fits: the least
    assert report.choose_layers([(220, [300, 300])] * 5, 36, 15_000_000)[0] == 10_000


def test_layers_are_spread_and_the_rewarded_one_is_there():
    assert report.spread_layers(range(36), [35], 4) == [0, 12, 23, 35]
    assert report.spread_layers(range(36), [20], 3) == [18, 20, 35]
    assert report.spread_layers(range(36), [20, 21], 1) == [21]
    assert report.spread_layers([3, 7, 11], [11], 3) == [3, 7, 11]


def test_the_edge_of_a_mask_is_where_the_mask_ends():
    mask = paint_region((60, 40), [(10, 10, 40, 30)], [], None)
    edge = np.asarray(report.mask_edge(mask, (60, 40)))[..., 3]
    assert edge[20, 25] == 0 and edge[2, 2] == 0 and edge[9, 20] == 255 and edge[20, 40] == 255
    assert report.mask_edge(mask, (120, 80)).size == (120, 80)


def test_pictures_are_drawn_anew_and_shrunk():
    picture = Image.effect_noise((2000, 1000), 60).convert("RGB")
    picture.info["comment"] = b"<script>"
    parts = report.picture_parts(picture, ([(0, 0, 10, 20), (5, 5, 9, 9)], [[[1, 2], [3, 4], [5, 6]]], None))
    raw = base64.b64decode(parts["src"].removeprefix("data:image/webp;base64,"))
    assert Image.open(io.BytesIO(raw)).size == (512, 256) and b"<script>" not in raw
    assert (parts["width"], parts["height"], parts["mask"]) == (2000, 1000, None)
    assert parts["region"] == "region: 2 boxes and 1 polygon"
    assert report.picture_parts(picture, ([], [], None))["region"] == "no region"


@torch.no_grad()
def test_a_report_says_what_was_measured(model_folders):
    (model, processor), config = adapted(model_folders["qwen3_vl"], scale=0.2), settings(adapter="an adapter")
    examples = load_examples("scenes:heldout", limit=3)[:]
    answers = answers_by_policy(model, processor, examples, config)
    data = written(model, processor, examples, answers, config)
    assert data["policies"] == ["base", "adapter"] and data["layers"][0] == "mean of all 4"
    assert data["layers"][data["first_layer"]] == "layer 3 (rewarded)"
    assert [answer.text for answer in answers["base"]] != [answer.text for answer in answers["adapter"]]
    for place, name in enumerate(answers):
        for number, (example, answer) in enumerate(zip(examples, answers[name], strict=True)):
            shown = data["examples"][number]["answers"][place]
            assert shown["tokens"] == answer.tokens and len(answer.tokens) == len(answer.completion)
            expected = select_uncertain(answer.entropies, config.top_fraction)
            assert shown["scored"] == expected.tolist()
            with report.switched_to(model, name, config):
                prompt = encode_prompt(processor, example, config.system_prompt)
                maps = attention_maps(model, prompt, answer.completion, layers=(3,)).numpy()
                statistics = token_statistics(model, prompt, [answer.completion])
            np.testing.assert_allclose(shown["entropies"], statistics.entropies[0], rtol=1e-3, atol=1e-5)
            back = levels_of(data, number, place)[data["first_layer"]]
            step = maps.max(-1, keepdims=True)
            assert (abs(back - maps) <= step * (np.sqrt(maps / step) / 255 + 1 / 510**2) + 1e-6).all()
            assert shown["correct"] == bool(answer.scores["accuracy"])
    ratios = [entry["region_share"] for entry in data["examples"]]
    covered = [float(region_coverage(processor, example["images"], [example["boxes"]]).mean()) for example in examples]
    assert ratios == pytest.approx(covered, rel=1e-3)


@pytest.mark.parametrize("family", ["internvl", "smolvlm", "qwen3_5"])
def test_tiles_and_several_pictures_and_every_kind_of_region(policies, family, folder):
    model, processor = policies[family]
    mask = Image.new("L", (20, 50))
    mask.paste(255, (2, 2, 12, 30))
    mask.save(folder / "mask.png")
    regions = {"boxes": [[[1, 2, 30, 20]], []], "polygons": [[[[1, 1], [20, 1], [10, 20]]], []]}
    regions |= {"images": ["a.png", "b.png"], "masks": [None, "mask.png"]}
    rows = [{"question": "Which?", "answer": "red", "choices": ["red", "blue"]} | regions]
    rows.append({"image": "a.png", "question": "No region?", "answer": "red"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    examples = load_examples(str(folder / "rows.jsonl"), require_boxes=False)
    config = settings(system_prompt="")
    answers = {"base": answer_examples(model, processor, examples, config)}
    data = written(model, processor, examples, answers, config)
    first, second = data["examples"]
    assert [picture["region"] for picture in first["pictures"]] == ["region: 1 box and 1 polygon", "region: a mask"]
    assert first["pictures"][1]["mask"].startswith("data:image/png;base64,") and first["choices"] == ["red", "blue"]
    assert second["region_share"] == 0 and second["answers"][0]["scores"]["tas"] is None
    for number, entry in enumerate(data["examples"]):
        cells = sum(len(picture["cells"]) for picture in entry["pictures"]) / 4
        assert levels_of(data, number).shape[-1] == cells == len(answers["base"][number].coverage)


def test_an_empty_completion_has_an_empty_map(policy, examples, monkeypatch):
    model, processor = policy
    monkeypatch.setattr(rollout, "eos_token_ids", lambda *_: set(range(len(processor.tokenizer))))
    shown = [examples[0] | {"images": [examples[0]["image"]]}]
    answers = {"base": answer_examples(model, processor, shown, settings())}
    data = written(model, processor, shown, answers, settings())
    (answer,) = data["examples"][0]["answers"]
    assert answer["tokens"] == answer["scored"] == [] and answer["maps"] == "" and answer["scores"]["tas"] is None


def test_the_command_writes_a_report_of_the_examples_it_is_given(tmp_path, capsys):
    output = tmp_path / "new" / "report.html"
    main(settings(output=str(output), index=[3, 1]))
    data = data_of(output.read_text(encoding="utf-8"))
    expected = load_examples("scenes:heldout")
    assert [entry["question"] for entry in data["examples"]] == [expected[3]["question"], expected[1]["question"]]
    assert data["policies"] == ["base"] and "report.html" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"index=\[100000\].*0 to"):
        main(settings(output=str(output), index=[100_000]))


def test_a_report_that_cannot_fit_is_written_and_says_so(tmp_path, capsys):
    output = tmp_path / "report.html"
    main(settings(output=str(output), limit=1, megabytes=0.001))
    assert "more than megabytes=0.001" in capsys.readouterr().err
    assert len(data_of(output.read_text(encoding="utf-8"))["layers"]) == 2
