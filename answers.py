"""What policies say about examples, greedily, and all that is measured about it: for the report and the plots."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from evaluate import answered
from reward import scored_tokens


@dataclass
class Answer:
    """What a policy said about an example and all that was measured about it; n tokens, the closing EOS left out."""

    completion: Tensor  # (n,) ids
    tokens: list[str]  # n texts, which join to all that was said
    entropies: Tensor  # (n,) nats
    target_attention: Tensor  # (n,) mean over heads, layers and covered image tokens
    image_attention: Tensor  # (n,) mean over heads, layers and all image tokens
    scored: list[int]  # the tokens that the attention reward looks at
    scores: dict[str, float]  # the rewards and TAS of reward.score_group
    text: str
    truncated: bool
    coverage: Tensor  # (N,) of the example's image tokens


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; together they are the text of all.

    Where a character is several tokens, the last of them has it and the others have nothing.
    """
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        unfinished = text.endswith("\ufffd") and end < len(ids)
        texts.append("" if unfinished else text[len(done) :])
        done = done if unfinished else text
    return texts


@torch.no_grad()
def ask(model, processor, examples: Sequence[dict], config, description: str = "answers") -> list[Answer]:
    """The greedy completion of every example, scored as in training.

    Args:
        config: anything with the fields of RewardConfig and PolicyConfig, and max_new_tokens.
    """
    answers, progress = [], tqdm(total=len(examples), desc=description, unit="example")
    for group, values in answered(model, processor, examples, config):
        scores = {name: float(value[0]) for name, value in values.items()}
        length, statistics = len(group.completions[0]) - (not group.truncated[0]), group.statistics
        entropies = statistics.entropies[0][:length].cpu()
        completion = group.completions[0][:length]
        answers.append(
            Answer(
                completion=completion,
                tokens=token_texts(processor.tokenizer, completion.tolist()),
                entropies=entropies,
                target_attention=statistics.target_attention[0][:length].cpu(),
                image_attention=statistics.image_attention[0][:length].cpu(),
                scored=scored_tokens(completion, entropies, config).tolist() if length else [],
                scores=scores,
                text=group.texts[0],
                truncated=group.truncated[0],
                coverage=group.prompt.coverage,
            )
        )
        progress.update()
    progress.close()
    return answers


def ask_all(model, processor, examples: Sequence[dict], config) -> dict[str, list[Answer]]:
    """Answers by policy: those of the base, and of the adapter if there is one."""
    answers = {}
    for name in ("base", "adapter")[: 1 + bool(config.adapter)]:
        with switched_to(model, name, config):
            answers[name] = ask(model, processor, examples, config, name)
    return answers


def switched_to(model, name: str, config):
    """A context in which the model is the base or the adapter."""
    return model.disable_adapter() if config.adapter and name == "base" else nullcontext()
