"""References to compare strategies with: `transformers`' own `generate`, and logits in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from fastvlm.data.questions import Question
from fastvlm.decoding.sampler import noisy
from fastvlm.functional.messages import Message
from fastvlm.language import capture_decoder_inputs, split_decoder
from fastvlm.prompts import FastViTHDPromptBuilder, question
from fastvlm.vision.loading import ImageInput
from fastvlm.vlm import VisionLanguageModel

SCENE_PIXELS = 512
"""Side in pixels of the scenes for a model whose processor resizes images."""
MAX_TIE_GAPS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.25}
"""Two best logits that lie closer than this may change places by rounding alone. In the short
precisions it is two steps of a number between 16 and 32, where the best logits of language models
often lie."""


def image_of(vlm: VisionLanguageModel, asked: Question) -> ImageInput | None:
    """Return a question's image, a scene drawn in the model's image size."""
    if asked.image is None:
        return None
    own = isinstance(vlm.prompts, FastViTHDPromptBuilder)
    return asked.open(vlm.image_size if own else SCENE_PIXELS)


def dialogue_of(vlm: VisionLanguageModel, asked: Question) -> list[Message]:
    """Return a question and its image as a dialogue."""
    return question(asked.prompt, image_of(vlm, asked))


@torch.inference_mode()
def generate_greedily(
    vlm: VisionLanguageModel,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Return the replies of `transformers`' own `generate`, each up to its end token.

    Args:
        vlm: The model.
        inputs: Rows as `PromptBuilder.inputs` returns them, without padding.
        max_new_tokens: The maximum number of tokens in a reply.
        streamer: Receives the tokens of a single row as they are decoded.
    """
    model: Any = vlm.model
    out: Tensor = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer
    )
    if is_encoder_decoder(vlm.model):
        start = 1
    else:
        # A model that hands embeddings to the language model in it may return the reply alone.
        prompt = inputs["input_ids"]
        length = prompt.shape[1]
        start = length if out[:, :length].equal(prompt) else 0
    return [up_to_end(reply, vlm.end_tokens) for reply in out[:, start:].tolist()]


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Return whether a model encodes the prompt with an encoder of text."""
    config: Any = model.config
    return bool(config.is_encoder_decoder or config.get_text_config().is_encoder_decoder)


def reference_replies(
    vlm: VisionLanguageModel, dialogues: Sequence[Sequence[Message]], max_new_tokens: int
) -> list[list[int]]:
    """Return `transformers`' greedy replies to dialogues.

    Dialogues whose inputs have the same shapes are decoded in one batch, so nothing is padded.

    Args:
        vlm: The model.
        dialogues: The dialogues, the last turn of each the user's.
        max_new_tokens: The maximum number of tokens in a reply.

    Returns:
        Each reply's tokens, up to its end token.
    """
    made = [vlm.prompts.inputs(messages) for messages in dialogues]
    groups: dict[Any, list[int]] = {}
    for row, inputs in enumerate(made):
        shapes = tuple((name, value.shape) for name, value in inputs.items())
        groups.setdefault(shapes, []).append(row)
    replies: dict[int, list[int]] = {}
    for rows in groups.values():
        inputs = {name: torch.cat([made[row][name] for row in rows]) for name in made[rows[0]]}
        replies.update(zip(rows, generate_greedily(vlm, inputs, max_new_tokens), strict=True))
    return [replies[row] for row in range(len(made))]


def up_to_end(reply: list[int], end_tokens: frozenset[int]) -> list[int]:
    """Return a reply up to its end token, without the padding behind it."""
    for index, token in enumerate(reply):
        if token in end_tokens:
            return reply[: index + 1]
    return reply


class ExactModel:
    """A model's logits in float64, from a copy that is made when it is first needed.

    It is a context manager, at whose end the copy is freed.

    Args:
        vlm: The model, which is not changed.
    """

    def __init__(self, vlm: VisionLanguageModel) -> None:
        self.vlm = vlm
        self._copy: PreTrainedModel | None = None

    def __enter__(self) -> ExactModel:
        """Return the model itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the copy."""
        self._copy = None

    @torch.inference_mode()
    def logits(self, inputs: Mapping[str, Tensor], reply: Sequence[int]) -> Tensor:
        """Return the logits after a reply so far, computed from scratch: (vocabulary,).

        Args:
            inputs: The prompt, one row as `PromptBuilder.inputs` returns it.
            reply: The reply's tokens; an image's placeholder in it counts as an ordinary token.
        """
        if self._copy is None:
            self._copy = copy.deepcopy(self.vlm.model).double()
        exact = {
            name: value.double() if value.is_floating_point() else value
            for name, value in inputs.items()
        }
        [prompt] = capture_decoder_inputs(self._copy, exact)
        decoder = split_decoder(self._copy)
        tokens = torch.tensor([list(reply)], dtype=torch.long, device=decoder.device)
        x = torch.cat((prompt.embeddings[None], decoder.embed(tokens)), 1)
        cache = decoder.cache(1, x.shape[1])
        cache.assign(0, prompt)
        positions = cache.positions([0], x.shape[1])
        x = decoder.forward_layers(x, positions, cache, range(decoder.depth))
        return decoder.head(x[:, -1:])[0, 0]


@torch.inference_mode()
def best_gap(
    exact: ExactModel,
    messages: Sequence[Message],
    one: Sequence[int],
    other: Sequence[int],
    **options: Any,
) -> tuple[int, float]:
    """Return where two replies first differ, and the gap between the two best tokens there.

    Args:
        exact: The model.
        messages: The dialogue replied to.
        one: A reply's tokens.
        other: Another reply's tokens.
        options: The options of the replies, see `VisionLanguageModel.request`.

    Returns:
        The position, and there the difference between the two highest scores in float64: logits
        after the logits processors, with their noise for a sampled reply.
    """
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    vlm, before = exact.vlm, one[:same]
    sampler = vlm.request(messages, strategy="autoregressive", **options).sampler
    logits = exact.logits(vlm.prompts.inputs(messages), before)
    scores = sampler.apply_processors(before, logits)
    best, second = noisy(scores[None], [sampler.seed], [same])[0].topk(2).values.tolist()
    return same, best - second
