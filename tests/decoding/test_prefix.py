"""What is kept of an image makes a second question cheaper, and changes no token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fastvlm.decoding import Autoregressive, PromptLookup, SelfSpeculative, Strategy
from fastvlm.functional.errors import InputError
from fastvlm.vision.images import prepare
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from tests.decoding.conftest import imitation
from tests.models import IMAGE_SIZE, VISUAL_TOKENS, small_vlm

QUESTIONS = ("Describe the scene.", "What is at the top left? Say it.", "The?")
DRAFTERS = ("autoregressive", "prompt-lookup", "early exit", "block", "mlp")


@pytest.fixture(scope="module")
def fresh() -> VisionLanguageModel:
    """A model that keeps nothing."""
    vlm = small_vlm()
    vlm.lru.limit = 0
    return vlm


def drafter(name: str, vlm: VisionLanguageModel) -> Strategy:
    return {
        "autoregressive": Autoregressive,
        "prompt-lookup": PromptLookup,
        "early exit": lambda: SelfSpeculative(vlm.decoder, 2),
        "block": lambda: imitation(vlm.model),
        "mlp": lambda: imitation(vlm.model, kind="mlp"),
    }[name]()


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """Collect how many positions (or images) each call of a module computes."""
    calls: list[int] = []

    def seen(_: nn.Module, given: tuple, named: dict) -> None:
        x = given[0] if given else named["pixel_values"]
        calls.append(x.shape[1] if x.dim() == 3 else x.shape[0])

    hook = module.register_forward_pre_hook(seen, with_kwargs=True)
    yield calls
    hook.remove()


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_second_question_costs_its_own_text(name: str, fresh: VisionLanguageModel) -> None:
    vlm = small_vlm()
    image = render(sample(1), 192)
    speculative = drafter(name, vlm)
    before: list[list[int]] = []
    with (
        counted(vlm.model.model.vision_tower) as images,
        counted(vlm.model.get_decoder().layers[-1]) as positions,
    ):
        for number, question in enumerate(QUESTIONS):
            positions.clear()
            found = vlm.generate(question, image, max_new_tokens=12, strategy=speculative)
            alone = fresh.generate(
                question, image, max_new_tokens=12, strategy=drafter(name, fresh)
            )
            assert found.token_ids == alone.token_ids
            assert found.statistics.accepted == alone.statistics.accepted
            whole = vlm.tokens(question, images=1)
            kept = shared(whole, before)
            assert not number or kept > whole.index(vlm.model.config.image_token_id)
            assert positions[0] == len(whole) - kept
            before.append(whole + found.token_ids[:-1])
    assert images == [1]


def shared(tokens: list[int], before: list[list[int]]) -> int:
    """Return how many positions at the beginning were computed before, the naive way."""
    lengths = [
        next(
            (n for n, (a, b) in enumerate(zip(tokens, known, strict=False)) if a != b),
            min(len(tokens), len(known)),
        )
        for known in before
    ]
    return min(max(lengths, default=0), len(tokens) - 1)


@pytest.mark.parametrize("name", ["autoregressive", "block"])
def test_ten_rounds_about_one_image_encode_it_once(name: str, fresh: VisionLanguageModel) -> None:
    vlm = small_vlm()
    speculative = drafter(name, vlm)
    show = {"type": "image", "image": render(sample(7), 192)}
    messages: list[dict] = []
    before: list[list[int]] = []
    with (
        counted(vlm.model.model.vision_tower) as images,
        counted(vlm.model.get_decoder().layers[-1]) as positions,
    ):
        for number in range(10):
            text = {"type": "text", "text": f"The {number}?"}
            messages.append({"role": "user", "content": [text] if number else [show, text]})
            positions.clear()
            found = vlm.generate(messages, max_new_tokens=5, strategy=speculative)
            alone = fresh.generate(messages, max_new_tokens=5, strategy=drafter(name, fresh))
            assert found.token_ids == alone.token_ids
            whole = vlm.prompts.tokens(messages, [VISUAL_TOKENS])
            kept = shared(whole, before)
            assert positions[0] == len(whole) - kept
            # What an earlier round was asked and answered is not computed again, but for text
            # that the tokenizer now cuts otherwise.
            assert not number or kept >= len(before[-1]) - 5
            before.append(whole + found.token_ids[:-1])
            messages.append({"role": "assistant", "content": found.text})
    assert images == [1]


def test_images_in_any_turn() -> None:
    vlm = small_vlm()
    one, other = ({"type": "image", "image": render(sample(n), 192)} for n in (8, 9))
    text = {"type": "text", "text": QUESTIONS[0]}
    messages = [
        {"role": "user", "content": [one, text]},
        {"role": "assistant", "content": "A red circle."},
        {"role": "user", "content": [text, other, one]},
    ]
    tokens = torch.tensor([vlm.prompts.tokens(messages, [VISUAL_TOKENS] * 3)])
    views = [prepare(part["image"], IMAGE_SIZE) for part in (one, other, one)]
    expected = vlm.model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        pixel_values=torch.cat(views).double(),
        max_new_tokens=9,
        do_sample=False,
    )[0, tokens.shape[1] :].tolist()
    with counted(vlm.model.model.vision_tower) as images:
        assert vlm.generate(messages, max_new_tokens=9).token_ids == expected
    # The first once, and both in one pass.
    assert images == [2]
    with pytest.raises(InputError, match="leave out the image"):
        vlm.generate(messages, render(sample(1), 192))
    with pytest.raises(InputError, match="A part of a message is"):
        vlm.generate([{"role": "user", "content": [{"type": "video"}]}])


def test_rows_of_known_and_of_new_images(fresh: VisionLanguageModel) -> None:
    vlm = small_vlm()
    known, new = render(sample(2), 192), render(sample(3), 192)
    block = drafter("block", vlm)
    vlm.generate(QUESTIONS[0], known, max_new_tokens=3, strategy=block)
    asked = [(QUESTIONS[1], known), (QUESTIONS[2] * 9, new), (QUESTIONS[0], known)]
    prompts, images = zip(*asked, strict=True)
    found = vlm.generate_batch(prompts, images, max_new_tokens=9, strategy=block)
    for reply, (prompt, image) in zip(found, asked, strict=True):
        alone = fresh.generate(prompt, image, max_new_tokens=9)
        assert reply.token_ids == alone.token_ids


def test_another_network_finds_the_targets_layers_only(fresh: VisionLanguageModel) -> None:
    vlm = small_vlm()
    image = render(sample(4), 192)
    expected = fresh.generate(QUESTIONS[0], image, max_new_tokens=9).token_ids
    for name in ("block", "autoregressive", "block", "mlp"):
        reply = vlm.generate(QUESTIONS[0], image, max_new_tokens=9, strategy=drafter(name, vlm))
        assert reply.token_ids == expected


def test_other_words_before_the_image_keep_its_features_only() -> None:
    vlm = small_vlm()
    image = render(sample(5), 192)
    with counted(vlm.model.model.vision_tower) as images:
        vlm.generate(QUESTIONS[0], image, max_new_tokens=3)
        template = "Look: " + vlm.tokenizer.chat_template
        vlm.tokenizer.chat_template = template
        found = vlm.generate(QUESTIONS[0], image, max_new_tokens=9)
    assert images == [1]
    other = small_vlm()
    other.tokenizer.chat_template = template
    assert found.token_ids == other.generate(QUESTIONS[0], image, max_new_tokens=9).token_ids


def test_what_is_kept_is_bounded_in_bytes() -> None:
    vlm = small_vlm()
    images = [render(sample(seed), 192) for seed in range(4)]
    vlm.generate(QUESTIONS[0], images[0], max_new_tokens=2)
    one = vlm.lru.nbytes
    layers, heads, size = 5, 2, 16
    # The prompt, and the first of the reply's two tokens.
    length = len(vlm.tokens(QUESTIONS[0], images=1)) + 1
    assert one == 8 * (2 * layers * heads * size * length + VISUAL_TOKENS * vlm.decoder.width)
    vlm.lru.clear()
    vlm.lru.limit = 2 * one
    with counted(vlm.model.model.vision_tower) as encoded:
        for shown in (0, 1, 0, 2, 0, 1):
            vlm.generate(QUESTIONS[0], images[shown], max_new_tokens=2)
            assert vlm.lru.nbytes <= 2 * one
    # The second was used longest ago when the third came.
    assert len(encoded) == 4
    vlm.lru.clear()
    vlm.lru.limit = 1000
    vlm.generate(QUESTIONS[0], images[0], max_new_tokens=2)
    assert vlm.lru.nbytes == 0


@pytest.mark.parametrize(
    ("options", "visual"),
    [({"image_size": 192}, 9), ({"tiles": 2}, 5 * VISUAL_TOKENS), ({"fit": "crop"}, VISUAL_TOKENS)],
)
def test_a_image_is_shown_as_it_is_asked_for(options: dict, visual: int) -> None:
    vlm = small_vlm()
    image = render(sample(6), 192).crop((0, 0, 192, 100))
    found = vlm.generate(QUESTIONS[0], image, max_new_tokens=9, **options)
    tokens = torch.tensor([vlm.tokens(QUESTIONS[0], images=1, visual=visual)])
    size = options.get("image_size", IMAGE_SIZE)
    views = prepare(image, size, options.get("fit", "pad"), options.get("tiles", 1))
    expected = vlm.model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        pixel_values=views.double(),
        max_new_tokens=9,
        do_sample=False,
    )
    assert found.token_ids == expected[0, tokens.shape[1] :].tolist()
    with pytest.raises(InputError, match="multiple of 64; got 100"):
        vlm.generate(QUESTIONS[0], image, image_size=100)


def test_a_request_may_bypass_the_caches() -> None:
    vlm, image = small_vlm(), render(sample(1), 192)
    known = vlm.generate(QUESTIONS[0], image, max_new_tokens=8)
    kept = dict(vlm.lru)
    with counted(vlm.model.base_model.vision_tower) as encoded:
        request = vlm.request(QUESTIONS[0], image, max_new_tokens=8, cache=False)
        vlm.engine.run_all([request])
    assert encoded
    assert request.cached == 0
    assert request.output_token_ids == known.token_ids
    assert dict(vlm.lru) == kept
    for wrong in ({"cache": 1}, {"priority": 1.5}, {"priority": True}):
        with pytest.raises(InputError):
            vlm.request(QUESTIONS[0], image, **wrong)


def test_prompts_are_told_apart_without_a_look_at_the_weights() -> None:
    vlm = small_vlm()
    keys = [vlm.request(QUESTIONS[0], render(sample(n), 128)).inputs.keys for n in range(2)]
    assert keys[0] != keys[1]
    # What stands for all of the weights is one object, which equals itself at once.
    assert keys[0][0][0] is keys[1][0][0]
