"""Tiny random models of the real classes with their real processor classes, one builder for each family."""

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

from sayo.run.config import EMBEDDED_POLICY

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 4096, "sliding_window": None, "initializer_range": 0.1}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False}
TEXT |= {"bos_token_id": None, "pad_token_id": None}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CHAT = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


def build(family: str, folder) -> str:
    """A random model of a family and its processor, saved to a folder that load_policy reads."""
    return BUILDERS[family](folder) if family in BUILDERS else EMBEDDED_POLICY


def _tokenizer(**named_tokens: str) -> PreTrainedTokenizerFast:
    """The embedded policy's tokenizer with further special tokens, the named ones as attributes."""
    words = AutoProcessor.from_pretrained(EMBEDDED_POLICY).tokenizer
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer, extra_special_tokens=named_tokens, model_max_length=4096, **tokens
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(named_tokens.values())}, False)
    return tokenizer


def _save(config: dict, processor, folder) -> str:
    text = {"vocab_size": len(processor.tokenizer), "eos_token_id": processor.tokenizer.eos_token_id}
    config["text_config"] = TEXT | text | config["text_config"]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():  # the classes' own scale makes vision features that hardly differ from place to place
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not any(part in name for part in ("language_model", "text_model", "lm_head")):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _qwen_ids(tokenizer) -> dict:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def build_qwen2_5_vl(folder) -> str:
    qwen3 = AutoProcessor.from_pretrained(EMBEDDED_POLICY)
    patches = {"patch_size": 14, "merge_size": 2}
    area = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 200}
    pictures = transformers.Qwen2VLImageProcessor(**patches, size=area)
    videos, chat = transformers.Qwen2VLVideoProcessor(**patches), qwen3.chat_template
    processor = transformers.Qwen2_5_VLProcessor(pictures, qwen3.tokenizer, videos, chat_template=chat)
    vision = QWEN_VISION | {"patch_size": 14, "spatial_merge_size": 2, "window_size": 56, "fullatt_block_indexes": [1]}
    rope = TEXT["rope_parameters"] | {"mrope_section": [2, 3, 3]}
    config = {"model_type": "qwen2_5_vl", "text_config": {"rope_parameters": rope}, "vision_config": vision}
    return _save(config | _qwen_ids(qwen3.tokenizer), processor, folder)


def build_qwen3_5(folder) -> str:
    """Three layers of linear attention and one of softmax attention, as in the released models."""
    processor = AutoProcessor.from_pretrained(EMBEDDED_POLICY)
    vision = QWEN_VISION | {"patch_size": 16, "spatial_merge_size": 2, "num_position_embeddings": 16**2}
    rope = TEXT["rope_parameters"] | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
    text = {"num_hidden_layers": 4, "rope_parameters": rope, "linear_num_value_heads": 4} | linear
    config = {"model_type": "qwen3_5", "text_config": text, "vision_config": vision}
    return _save(config | _qwen_ids(processor.tokenizer), processor, folder)


def build_internvl(folder) -> str:
    """Tiles of 84 x 84 pixels, nine tokens each, and a thumbnail; the language model is Qwen3, as in InternVL3.5."""
    tokenizer = _tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    tile, chat = {"height": 84, "width": 84}, CHAT.replace("IMAGE", "<IMG_CONTEXT>\n")
    pictures = GotOcr2ImageProcessor(size=tile, crop_to_patches=True, min_patches=1, max_patches=6)
    videos, options = InternVLVideoProcessor(size=tile), {"image_seq_length": 9, "chat_template": chat}
    processor = transformers.InternVLProcessor(pictures, tokenizer, videos, **options)
    vision = VISION | {"image_size": [84, 84], "patch_size": [14, 14]}
    config = {"model_type": "internvl", "text_config": {"model_type": "qwen3"}, "vision_config": vision}
    config |= {"image_seq_length": 9, "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")}
    return _save(config | {"tie_word_embeddings": False}, processor, folder)


def build_smolvlm(folder, tile: int = 64, patch: int = 8, scale_factor: int = 2) -> str:
    """Tiles of 64 x 64 pixels, sixteen tokens each, at most 3 x 3 of them and a thumbnail."""
    num_tokens = (tile // patch // scale_factor) ** 2
    markers = {f"row_{row}_col_{column}": f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)}
    names = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    names |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    tokenizer = _tokenizer(**names, **markers)
    sizes = {"size": {"longest_edge": 3 * tile}, "max_image_size": {"longest_edge": tile}}
    parts = SmolVLMImageProcessor(**sizes), tokenizer, SmolVLMVideoProcessor(**sizes)
    chat = CHAT.replace("IMAGE", "<image>")
    processor = transformers.SmolVLMProcessor(*parts, image_seq_len=num_tokens, chat_template=chat)
    vision = VISION | {"image_size": tile, "patch_size": patch}
    config = {"model_type": "smolvlm", "text_config": {"model_type": "llama"}, "vision_config": vision}
    config |= {"scale_factor": scale_factor, "image_token_id": tokenizer.convert_tokens_to_ids("<image>")}
    return _save(config, processor, folder)


def build_smolvlm_2b(folder) -> str:
    """As in SmolVLM2-2.2B, patches do not fill a tile: 27 of them, and a rest of 2 pixels that no token sees."""
    return build_smolvlm(folder, tile=83, patch=3, scale_factor=3)


BUILDERS = {"qwen2_5_vl": build_qwen2_5_vl, "qwen3_5": build_qwen3_5, "internvl": build_internvl}
BUILDERS |= {"smolvlm": build_smolvlm, "smolvlm_2b": build_smolvlm_2b}
