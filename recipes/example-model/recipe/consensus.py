"""Self-critical training: sentences of the model's own, rewarded by what people say.

Teacher forcing teaches to imitate people's captions word by word, whatever is unsure of them. Here
the model samples sentences, and those that agree better with a photo's human captions than its
other samples become likelier (Rennie et al. 2017, arXiv 1612.00563; the mean of the other samples
as baseline: Luo 2020, arXiv 2003.09971).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    FastVlmForConditionalGeneration,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from fastvlm.data.captioned import CaptionedImage
from fastvlm.metrics.captions import CiderD
from fastvlm.metrics.tokenization import tokenize_caption
from fastvlm.training.rows import IGNORED
from recipe.dialogues import Dialogue, embed_dialogue, encode_prompt

SAMPLES = 5
"""Sentences sampled of a photo."""
LONGEST = 24
"""Tokens of the longest sentence."""
END = "</s>"
"""Stands after each caption in the reward, or a sentence that breaks off would be as good."""


class Consensus:
    """CIDEr-D of sentences, by the captions of a set of photos.

    Args:
        photos: They give the references and the document frequencies.
    """

    def __init__(self, photos: Sequence[CaptionedImage]) -> None:
        self.references = [
            [[*tokenize_caption(caption), END] for caption in shown.captions] for shown in photos
        ]
        self.scorer = CiderD(self.references)

    def reward(self, row: int, sentence: str, *, ended: bool) -> float:
        """Score a sentence about a photo, given by its index.

        Args:
            row: The photo.
            sentence: The sentence.
            ended: Whether it came to its end, or ran into the limit.
        """
        tokens = [*tokenize_caption(sentence), *([END] if ended else [])]
        return self.scorer.score(tokens, self.references[row])


def sample_sentences(
    model: FastVlmForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    features: Tensor,
) -> list[list[Dialogue]]:
    """Return `SAMPLES` dialogues for each image, whose replies the model drew at temperature 1.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: What is asked of every image.
        features: (images, visual tokens, d_model).
    """
    asked = encode_prompt(tokenizer, prompt, features.shape[1])
    tokens = torch.tensor([asked] * len(features), device=features.device)
    end = tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        num_return_sequences=SAMPLES,
        max_new_tokens=LONGEST,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[model.config.image_token_id],
    )
    with torch.no_grad():
        embeddings = embed_dialogue(model, tokens, features)
        replies: Tensor = cast(Any, model).generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones_like(tokens),
            generation_config=config,
        )
    drawn = []
    for row, seen in zip(replies.view(len(features), SAMPLES, -1).tolist(), features, strict=True):
        dialogues = []
        for reply in row:
            kept = reply[: reply.index(end) + 1] if end in reply else reply
            labels = [IGNORED] * tokens.shape[1] + kept
            whole = torch.cat((tokens[0], tokens.new_tensor(kept)))
            dialogues.append(Dialogue("sampled", whole, tokens.new_tensor(labels), seen))
        drawn.append(dialogues)
    return drawn


def advantages(rewards: Tensor) -> Tensor:
    """Return by how much each sample is better than the mean of the others of its photo.

    Args:
        rewards: (photos, samples).

    Returns:
        The same shape, in standard deviations of the step's advantages, so that the loss weighs as
        much as teacher forcing's, however good the model is.
    """
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    better = rewards - others
    return better / better.std().clamp(min=1e-3)
