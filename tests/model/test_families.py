"""Every model family, a tiny model of its real class with its real processor: are the covered tokens the right ones?

The oracle is the vision tower itself, with its attention switched off: then no position mixes with another, and what a
token's feature says of a picture is what stands in that token's cell.
"""

from functools import cache

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import FAMILIES, LAYOUTS, PACKED, adapted, ragged_completions
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import boxes_in, encoded, logps, plain_logprobs
from PIL import Image

from rollout import group_generator, sample_groups
from sayo.model import families
from sayo.model.families import PolicyError, pictures_of
from sayo.model.forward import group_logprobs, token_statistics
from sayo.model.loading import load_policy, load_processor
from sayo.model.prompts import base_model, encode_prompt, image_features, region_coverage, token_cells, vision_is_frozen
from sayo.model.sampling import samplers
from train_rl import Config, TrainState, train_step

ATTENTION_OUTPUT = ("attn.proj", "attn.out_proj", "attention.projection_layer")
# Side of a token's cell, and (columns, rows) of tokens, where a picture of whole cells is not resized.
CELLS = {"qwen3_vl": (32, 5, 3), "qwen2_5_vl": (28, 5, 3), "qwen3_5": (32, 5, 3)}
CELLS |= {"internvl": (28, 9, 6), "smolvlm": (16, 12, 8)}
TILE = {"internvl": 3, "smolvlm": 4}  # tokens along the side of a tile


@pytest.fixture(scope="module")
def towers(model_folders):
    """towers(family) -> (model, processor) whose vision tower mixes no positions."""

    @cache
    def load(family):
        model, processor = load_policy(model_folders[family], lora_rank=0, dtype="float32")
        language = {*model.model.get_decoder().modules()}
        vision = {name: module for name, module in model.named_modules() if module not in language}
        outputs = [module for name, module in vision.items() if name.endswith(ATTENTION_OUTPUT)]
        config = model.config.vision_config
        assert len(outputs) == (getattr(config, "depth", None) or config.num_hidden_layers)
        for module in outputs:
            module.weight.data.zero_()
            module.bias.data.zero_()
        return model, processor

    return load


@torch.no_grad()
def features(tower, pictures) -> torch.Tensor:
    """(N, D) features of the pictures' tokens, in the order in which the model puts them into the prompt."""
    model, processor = tower
    prompt = encode_prompt(processor, {"images": pictures, "question": "What?"})
    found = torch.cat([part.flatten(0, -2) for part in image_features(model, [prompt]).pooler_output])
    assert len(found) == len(prompt.image_token_index)
    return found


def painted(width, height, boxes=()) -> Image.Image:
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for x1, y1, x2, y2 in boxes:
        pixels[y1:y2, x1:x2] = 255
    return Image.fromarray(pixels)


def changed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(N,) which features differ."""
    return ((first - second).abs() > 1e-6 * first.abs().max()).any(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_of_one_cell_change_that_token_and_no_other(towers, family):
    """The expected token by arithmetic: row by row, in tiles tile by tile, and a thumbnail behind them."""
    side, columns, rows = CELLS[family]
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (rows * side, columns * side, 3)).astype(np.uint8)
    before = features(towers(family), [Image.fromarray(pixels)])
    num_cells, tile = rows * columns, TILE.get(family)
    for cell in generator.permutation(num_cells)[:12]:
        row, column = divmod(int(cell), columns)
        token = int(cell)
        if tile:
            number = (row // tile) * (columns // tile) + column // tile
            token = number * tile**2 + (row % tile) * tile + column % tile
        box = [column * side + 3, row * side + 2, (column + 1) * side - 1, (row + 1) * side - 4]
        other = pixels.copy()
        other[box[1] : box[3], box[0] : box[2]] ^= 255
        different = changed(before, features(towers(family), [Image.fromarray(other)]))
        assert different[:num_cells].nonzero().flatten().tolist() == [token]
        coverage = region_coverage(towers(family)[1], [Image.fromarray(pixels)], [box])
        assert coverage[:num_cells].nonzero().flatten().tolist() == [token]
        expected = (box[2] - box[0]) * (box[3] - box[1]) / side**2
        assert coverage[token].item() == pytest.approx(expected, abs=1e-3)
        if tile:  # the thumbnail sees it as well, shrunk, so perhaps at the edge of a second token
            assert different[num_cells:].any() and coverage[num_cells:].any()
            cells = token_cells(towers(family)[1], Image.fromarray(pixels))[num_cells:]
            middle = torch.tensor([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
            inside = ((cells[:, :2] <= middle) & (middle <= cells[:, 2:])).all(-1)
            assert coverage[num_cells:].argmax() == inside.nonzero().item()


def check_against_tower(tower, sizes, boxes) -> None:
    """Coverage 0 where the tower sees what it sees of a black picture, 1 of a white one, between in between."""
    pictures = [painted(*size, own) for size, own in zip(sizes, boxes, strict=True)]
    seen = features(tower, pictures)
    black = features(tower, [painted(*size) for size in sizes])
    white = features(tower, [painted(*size, [(0, 0, *size)]) for size in sizes])
    coverage = region_coverage(tower[1], [painted(*size) for size in sizes], boxes)
    assert torch.equal(changed(seen, black), coverage > 0)
    assert torch.equal(changed(seen, white), coverage < 1)


SIZES = [(1, 1), (1, 100), (100, 1), (37, 211), (640, 480), (479, 641), (1000, 300), (300, 1000), (84, 84), (85, 83)]
SIZES += [(2000, 1500), (33, 200), (64, 64), (192, 128), (500, 90)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", (*FAMILIES, "smolvlm_2b"))
def test_coverage_is_what_the_tower_sees_at_many_sizes(towers, family, size):
    width, height = size
    boxes = [(width // 5, height // 4, max(width // 2, width // 5 + 1), max(height // 2, height // 4 + 1))]
    check_against_tower(towers(family), [size], [boxes])
    check_against_tower(towers(family), [size], [[(0, 0, width, max(1, height // 3)), (width // 2, 0, width, height)]])


@pytest.mark.parametrize("family", (*FAMILIES, "smolvlm_2b"))
@settings(max_examples=15)
@given(data=st.data())
def test_coverage_is_what_the_tower_sees_of_any_pictures(towers, family, data):
    sizes, boxes = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        sizes.append((data.draw(st.integers(2, 260)), data.draw(st.integers(2, 260))))
        boxes.append(data.draw(boxes_in(*sizes[-1], most=2)))
    check_against_tower(towers(family), sizes, boxes)


@pytest.mark.parametrize("family", FAMILIES)
def test_max_pixels_bounds_the_tokens_and_the_region_follows(model_folders, family):
    _, processor = load_policy(model_folders[family], lora_rank=0)
    pictures, num_tokens = pictures_of(processor), []
    messages = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    num_text_tokens = len(processor.tokenizer(text).input_ids)
    for max_pixels in (None, 170 * 170, 85 * 85):
        if max_pixels:
            pictures.set_max_pixels(processor, max_pixels)
        for size in [(700, 500), (300, 900), (100, 100), (2000, 40)]:
            prompt = encode_prompt(processor, {"image": painted(*size), "question": "?"})
            assert len(prompt.input_ids) - num_text_tokens <= pictures.max_image_tokens(processor) + 2
        coverage = region_coverage(processor, [painted(700, 500)], [[0, 0, 350, 500]])
        assert coverage.mean().item() == pytest.approx(0.5, abs=0.02)
        num_tokens.append(len(coverage))
    assert num_tokens[0] > num_tokens[1] > num_tokens[2]
    with pytest.raises(ValueError, match="max_pixels=50: give .*one token or tile"):
        pictures.set_max_pixels(processor, 50)


@pytest.mark.parametrize("size", [(64, 96), (333, 222), (50, 400)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_cells_are_where_the_coverage_is(policies, family, size):
    """token_cells against region_coverage: a box around a cell covers that token, wholly."""
    processor, picture = policies[family][1], painted(*size)
    cells = token_cells(processor, picture)
    assert (cells[:, 2:] > cells[:, :2]).all() and (cells[:, :2] >= 0).all()
    for token in range(0, len(cells), max(1, len(cells) // 8)):
        x1, y1, x2, y2 = cells[token].tolist()
        around = [int(max(0, x1 - 6)), int(max(0, y1 - 6)), min(size[0], int(x2 + 7)), min(size[1], int(y2 + 7))]
        assert region_coverage(processor, [picture], [around])[token] > 0.99
        middle = [int((x1 + x2) / 2), int((y1 + y2) / 2)]
        coverage = region_coverage(processor, [picture], [[*middle, middle[0] + 1, middle[1] + 1]])
        assert coverage[token] > 0


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_several_pictures_in_one_prompt(policies, examples, family, layout):
    model, processor = policies[family]
    first, second = examples[0], examples[3]
    example = {"images": [first["image"], second["image"]], "question": "?", "boxes": [[], second["boxes"]]}
    prompt, completions = encoded(processor, example)
    num_first = len(encode_prompt(processor, first).image_token_index)
    assert prompt.coverage[:num_first].sum() == 0
    torch.testing.assert_close(prompt.coverage[num_first:], encode_prompt(processor, second).coverage)
    expected = [plain_logprobs(model, prompt, completion) for completion in completions]
    found = logps(model, prompt, completions, layout=layout)
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", PACKED)
def test_sampling_is_the_same_with_a_tree_and_with_rows(policies, examples, family, monkeypatch):
    """The two caches, drawn from with the same random numbers; completions end at different steps."""
    model, processor = policies[family]
    ordinary = torch.cat(ragged_completions(processor, (400,)))
    monkeypatch.setattr("rollout.eos_token_ids", lambda *_: set(ordinary[:40].tolist()))
    made, make_sampler = [], samplers.make_sampler
    monkeypatch.setattr("rollout.make_sampler", lambda *some: made.append(make_sampler(*some)) or made[-1])
    found, options = {}, {"num_generations": 5, "max_new_tokens": 12}
    for layout in ("packed", "padded"):
        monkeypatch.setattr(samplers, "model_layout", lambda *_, layout=layout: layout)
        generators = [group_generator("tree and rows", number) for number in range(2)]
        groups = sample_groups(model, processor, examples[:2], **options, generators=generators)
        found[layout] = [completion.tolist() for group in groups for completion in group.completions]
    assert found["packed"] == found["padded"]
    assert {type(sampler).__name__ for sampler in made} == {"TreeSampler", "RowSampler"}
    assert len({len(completion) for completion in found["packed"]}) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_one_update_changes_the_adapter_and_nothing_else_and_it_comes_back(model_folders, examples, family, tmp_path):
    model, processor = adapted(model_folders[family], lora_rank=2)
    sizes = {"groups_per_step": 2, "num_generations": 3, "max_new_tokens": 10}
    config = Config(**sizes, learning_rate=1e-2, max_grad_norm=100.0, warmup_steps=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics, _ = train_step(model, processor, TrainState(model, config), examples, 0, config, Accelerator(cpu=True))
    assert metrics["reward_std/attention"] > 0 and metrics["grad_norm"] > 0
    different = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert different == {name for name in before if "lora_" in name}

    group = encoded(processor, examples[0])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again, _ = load_policy(model_folders[family], adapter=str(tmp_path / "adapter"), lora_rank=0, dtype="float32")
    plain, _ = load_policy(model_folders[family], lora_rank=0, dtype="float32")
    with torch.no_grad():
        expected, found = (token_statistics(one, *group) for one in (model, again))
    base = logps(plain, *group)
    assert torch.equal(torch.cat(found.logps), torch.cat(expected.logps))
    assert torch.equal(torch.cat(found.target_attention), torch.cat(expected.target_attention))
    with again.disable_adapter():
        assert torch.equal(logps(again, *group), base)
    assert not torch.allclose(base, torch.cat(expected.logps))
    assert vision_is_frozen(again) and not vision_is_frozen(plain)


def test_linear_attention_has_no_packed_layout_and_no_attention_rows(policies, group_of):
    model, _, prompt, completions = group_of("qwen3_5")
    with pytest.raises(ValueError, match="packed.*linear_attention.*padded"):
        group_logprobs(model, prompt, completions, layout="packed")
    with pytest.raises(ValueError, match=r"attention_layers=\[0\].*in its layers 3 \(or -1 to -1"):
        token_statistics(model, prompt, completions, layers=(0,))
    assert base_model(model).config.get_text_config().layer_types[-1] == "full_attention"
    negative = token_statistics(model, prompt, completions, layers=(-1,)).image_attention
    positive = token_statistics(model, prompt, completions, layers=(3,)).image_attention
    assert torch.equal(torch.cat(negative), torch.cat(positive))


def test_a_processor_of_no_known_family_is_named(policy):
    class OtherProcessor:
        image_token = "<image>"

    with pytest.raises(ValueError, match=r"OtherProcessor.*smolvlm.*FAMILIES in families\.py"):
        region_coverage(OtherProcessor(), [painted(4, 4)], [[0, 0, 2, 2]])


def test_an_entry_that_does_not_fit_its_processor_is_named(policies, examples, monkeypatch):
    """A family whose tokens are counted wrongly would shift every region without a word."""

    class OneShort(pictures_of(policies["qwen3_vl"][1])):
        @staticmethod
        def token_pixels(processed, processor):
            return families.PatchRows.token_pixels(processed, processor)[:-1]

    monkeypatch.setitem(families.FAMILIES, "qwen3_vl", ("Qwen3VLProcessor", OneShort))
    with pytest.raises(ValueError, match=r"23 tokens by FAMILIES.*24 in the prompt.*Qwen3VLProcessor"):
        encode_prompt(policies["qwen3_vl"][1], examples[0])


def test_smolvlm_names_the_torchvision_that_it_needs(model_folders, monkeypatch):
    """With torchvision 0.26 its cells could not be measured, and the message was about pixels outside of [0, 1]."""
    monkeypatch.setattr("transformers.utils.import_utils.is_torchvision_greater_or_equal", lambda version: False)
    with pytest.raises(PolicyError, match=r"'smolvlm', which needs torchvision 0\.27 or newer: pip install -U"):
        load_processor(model_folders["smolvlm"])
    load_processor(model_folders["qwen3_vl"])  # the other families do not
