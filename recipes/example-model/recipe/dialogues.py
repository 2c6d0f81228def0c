"""What a model's tasks are made of: a prompt about an image, and the reply to be learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import FastVlmForConditionalGeneration, PreTrainedTokenizerFast

from fastvlm.training.rows import IGNORED
from fastvlm_example import DESCRIPTION_PROMPT, SCENE_PROMPT, SENTENCE_PROMPT
from fastvlm_example.tokenizer import IMAGE

PROMPTS = {
    "scene": (SCENE_PROMPT, "Describe the scene.", "What is in the scene? Describe all of it."),
    "sentence": (SENTENCE_PROMPT, "Describe the picture.", "What is in this picture?"),
    "description": (
        DESCRIPTION_PROMPT,
        "Describe the picture in detail.",
        "What is in this picture? Write several sentences.",
    ),
}


@dataclass(slots=True)
class Dialogue:
    """A prompt about an image and the reply to be learnt.

    Args:
        kind: A key of `PROMPTS`.
        tokens: Prompt and reply.
        labels: The reply's tokens, `IGNORED` elsewhere.
        features: The image's projected features, (visual tokens, d_model).
    """

    kind: str
    tokens: Tensor
    labels: Tensor
    features: Tensor


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str, visual: int) -> list[int]:
    """Return a prompt's tokens, the image first."""
    chat = [{"role": "user", "content": f"{IMAGE * visual}{prompt}"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text)


def encode_dialogue(
    tokenizer: PreTrainedTokenizerFast, prompt: str, reply: str, visual: int
) -> tuple[Tensor, Tensor]:
    """Return one dialogue's tokens, the image first, and the labels of its reply."""
    before = encode_prompt(tokenizer, prompt, visual)
    after = [*tokenizer.encode(reply), tokenizer.eos_token_id]
    tokens = torch.tensor(before + after)
    return tokens, torch.tensor([IGNORED] * len(before) + after)


def embed_dialogue(
    model: FastVlmForConditionalGeneration, tokens: Tensor, features: Tensor
) -> Tensor:
    """Return the embeddings of tokens, the images' features in their places.

    Args:
        model: The model.
        tokens: (batch, length).
        features: (batch, visual tokens, d_model).
    """
    embeddings = model.model.language_model.embed_tokens(tokens)
    images = tokens == model.config.image_token_id
    return embeddings.masked_scatter(images[..., None], features)


def token_losses(
    model: FastVlmForConditionalGeneration, dialogues: Sequence[Dialogue]
) -> list[Tensor]:
    """Return the cross-entropy at every labelled position of each dialogue, from one pass."""
    tokens = pad_sequence([d.tokens for d in dialogues], batch_first=True)
    labels = pad_sequence([d.labels for d in dialogues], batch_first=True, padding_value=IGNORED)
    features = torch.stack([d.features for d in dialogues])
    embeddings = embed_dialogue(model, tokens, features)
    targets = labels[:, 1:]
    learnt = targets != IGNORED
    # Padding stands on the right, so the causal mask alone keeps it out of sight.
    decoder = model.model.language_model
    states = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, :-1]
    losses = F.cross_entropy(model.lm_head(states[learnt]), targets[learnt], reduction="none")
    return list(losses.split(learnt.sum(1).tolist()))
