"""The one shared module: load a policy, encode a prompt, log-probs, entropies and attention of a group's tokens.

This is the face of sayo/model/. A group is one sequence: GRPO samples G completions of one prompt, and a prompt with
a picture is far longer than a completion, so a group is the prompt once and every completion behind it, under a tree
mask, instead of a padded batch of G copies.
"""

from sayo.model.forward import attention_maps, group_logprobs, token_statistics
from sayo.model.loading import load_policy
from sayo.model.prompts import encode_prompt, region_coverage

__all__ = [
    "attention_maps",
    "encode_prompt",
    "group_logprobs",
    "load_policy",
    "region_coverage",
    "token_statistics",
]
