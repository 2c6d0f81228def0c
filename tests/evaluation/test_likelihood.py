"""Likelihoods of given replies against a naive pass of the whole model for each."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import fastvlm
from fastvlm.evaluation.likelihood import likelihoods
from fastvlm.functional.errors import InputError
from fastvlm.vision.images import prepare
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from tests.families import END
from tests.models import small_vlm
from tests.processors import asked, sample_image, saved

REPLIES = ["red", "a large blue circle", "Red!", "a square is above a circle", "a"]


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return small_vlm()


def naive(vlm: VisionLanguageModel, prompt: str, image: object, reply: str) -> tuple[float, float]:
    """Return the log-likelihoods of a reply's tokens and of its end, in float64."""
    before = vlm.tokens(prompt, images=1)
    tokens = vlm.tokenizer.encode(reply, add_special_tokens=False)
    pixels = prepare(image, vlm.image_size).double()
    row = torch.tensor([[*before, *tokens]])
    logits = vlm.model(input_ids=row, pixel_values=pixels).logits[0].double()
    total = 0.0
    for place, token in enumerate(tokens, len(before) - 1):
        total += float(logits[place, token] - torch.logsumexp(logits[place], 0))
    end = sum(math.exp(float(logits[-1].log_softmax(0)[one])) for one in vlm.end_tokens)
    return total, math.log(end)


@pytest.mark.parametrize("batch", [1, 2, 20])
@torch.inference_mode()
def test_against_a_pass_for_each(vlm: VisionLanguageModel, batch: int) -> None:
    image = render(sample(5), 128)
    request = vlm.request("What is it?", image)
    found = likelihoods(vlm, request, REPLIES, batch)
    for reply, one in zip(REPLIES, found, strict=True):
        text, end = naive(vlm, "What is it?", image, reply)
        assert one.text == pytest.approx(text, abs=1e-9)
        assert one.end == pytest.approx(end, abs=1e-9)
        assert one.whole == pytest.approx(text + end, abs=1e-9)


def test_the_greedy_reply_is_greedy(vlm: VisionLanguageModel) -> None:
    image = render(sample(5), 128)
    reply = vlm.generate("What is it?", image, max_new_tokens=1)
    text = vlm.tokenizer.decode(reply.token_ids)
    assert vlm.tokenizer.encode(text, add_special_tokens=False) == reply.token_ids
    found = likelihoods(vlm, vlm.request("What is it?", image), [text, "red"])
    assert [one.greedy for one in found] == [True, False]


@pytest.mark.parametrize(("reply", "said"), [("", "An empty reply"), ("red " * 300, "context is")])
def test_replies_that_have_none(vlm: VisionLanguageModel, reply: str, said: str) -> None:
    request = vlm.request("What is it?", render(sample(5), 128))
    with pytest.raises(InputError, match=said):
        likelihoods(vlm, request, ["red", reply])


@pytest.mark.parametrize("family", ["florence2", "gemma3", "mllama", "paligemma", "qwen3-vl"])
def test_newer_families_against_their_own_logits(family: str, tmp_path: Path) -> None:
    model, processor = saved(family, tmp_path)
    known = fastvlm.load(tmp_path, dtype=torch.float64)
    inputs = asked(processor, ["What is it?"], [sample_image(0)])
    replies = ["red", "a word", "b"]
    found = likelihoods(known, known.request("What is it?", sample_image(0)), replies)
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    for reply, one in zip(replies, found, strict=True):
        tokens = known.tokenizer.encode(reply, add_special_tokens=False)

        def forced(_: int, so_far: torch.Tensor, tokens: list[int] = tokens) -> list[int]:
            place = len(so_far) - start
            return tokens[place : place + 1] or [END]

        logits = torch.cat(
            model.generate(
                **inputs,
                max_new_tokens=len(tokens) + 1,
                do_sample=False,
                prefix_allowed_tokens_fn=forced,
                output_logits=True,
                return_dict_in_generate=True,
            ).logits
        ).double()
        logs = logits.log_softmax(-1)
        expected = sum(float(logs[place, token]) for place, token in enumerate(tokens))
        # transformers hands on logits in float32.
        assert one.text == pytest.approx(expected, abs=1e-5)
        assert one.end == pytest.approx(float(logs[-1, END]), abs=1e-5)
