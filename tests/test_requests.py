"""What is asked of a model: options, seeds, batches, and the settings of its checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import fastvlm
from fastvlm.decoding import SamplingParams, StructuredOutput
from fastvlm.drafting import AdaptiveLength, FixedLength
from fastvlm.evaluation.reference import generate_greedily
from fastvlm.functional.errors import InputError
from fastvlm.prompts import TokenPrompt, question
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from tests.decoding.conftest import imitation
from tests.families import END, FAMILIES, NEWER, PAD, replies
from tests.models import IMAGE_SIZE, small_vlm
from tests.processors import asked, character_tokenizer, sample_image, saved

QUESTION = "Describe the picture."
SAMPLED: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return small_vlm()


@pytest.fixture(scope="module")
def images() -> list[Any]:
    return [render(sample(number), IMAGE_SIZE) for number in range(4)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": 3}, "max_new_tokens"),
        ({"temprature": 2.0}, "temperature"),
        ({"num_beams": 4}, "num_beams"),
        ({"do_sample": True}, "do_sample"),
        ({"image_sizes": 64}, "image_size"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"seed": -1, "temperature": 1.0}, "seed"),
        ({"seed": 10**20, "temperature": 1.0}, "seed"),
        ({"temperature": 1e-40}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0, "temperature": 1.0}, "top_p"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens"),
        ({"ignore_eos": True, "structured": StructuredOutput("regex", "a")}, "ignore_eos"),
        ({"strategy": "lookup"}, "prompt-lookup"),
    ],
)
def test_what_nobody_uses_is_refused_before_an_image_is_opened(
    vlm: VisionLanguageModel, options: dict[str, Any], named: str
) -> None:
    # There is no such image, which would be said first if it were opened first.
    for ask in (vlm.generate, vlm.stream, vlm.request):
        with pytest.raises(InputError, match=named):
            ask(QUESTION, "no/such.jpg", **options)
    with pytest.raises(InputError, match=named):
        vlm.generate_batch([QUESTION], ["no/such.jpg"], **options)


@pytest.mark.parametrize(
    ("strategy", "options", "named"),
    [
        (None, {"max_draft": 3}, "max_draft"),
        ("autoregressive", {"confidence": 0.5}, "confidence"),
        ("autoregressive", {"num_speculative_tokens": 3}, "num_speculative_tokens"),
        ("early-exit", {"skipped_layers": (1,)}, "skipped_layers"),
        ("layer-skip", {"exit_layer": 1}, "exit_layer"),
        ("prompt-lookup", {"num_speculative_tokens": 0}, "num_speculative_tokens"),
    ],
)
def test_a_strategy_refuses_what_it_does_not_take(
    vlm: VisionLanguageModel, strategy: str | None, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        vlm.strategy(strategy, **options)


def test_a_seed_decides_a_reply_and_nothing_else_does(
    vlm: VisionLanguageModel, images: list[Any]
) -> None:
    ways = [
        *("autoregressive", "prompt-lookup", "early-exit", "layer-skip"),
        vlm.strategy("layer-skip", confidence=0, num_speculative_tokens=2),
        imitation(vlm.model, length=AdaptiveLength(5)),
        imitation(vlm.model, kind="mlp", length=FixedLength(3)),
    ]
    one = {
        tuple(vlm.generate(QUESTION, images[0], strategy=way, seed=7, **SAMPLED).token_ids)
        for way in ways
    }
    assert len(one) == 1
    other = vlm.generate(QUESTION, images[0], seed=8, **SAMPLED).token_ids
    assert other not in map(list, one)
    # Rows of a batch are drawn each for itself, row r with the seed + r.
    rows = vlm.generate_batch([QUESTION] * 3, [images[0]] * 3, seed=7, **SAMPLED)
    assert tuple(rows[0].token_ids) in one
    assert rows[1].token_ids == other
    assert len({tuple(row.token_ids) for row in rows}) == 3


def test_without_a_seed_torchs_own_generator_decides(
    vlm: VisionLanguageModel, images: list[Any]
) -> None:
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append([vlm.generate(QUESTION, images[0], **SAMPLED).token_ids for _ in range(2)])
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]


def test_batches_of_nothing_and_with_an_image_that_can_not_be_read(
    vlm: VisionLanguageModel, images: list[Any], tmp_path: Path
) -> None:
    assert vlm.generate_batch([], []) == []
    with pytest.raises(InputError):
        vlm.generate([])
    with pytest.raises(InputError):
        vlm.generate_batch([QUESTION], [])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    shown: list[Any] = [*images[:2], broken, *images[2:], tmp_path / "none.png"]
    found = vlm.generate_batch([QUESTION] * 6, shown, max_new_tokens=8)
    for place, (reply, image) in enumerate(zip(found, shown, strict=True)):
        if place in (2, 5):
            assert reply.finish_reason == "error"
            assert Path(image).name in (reply.error or "")
            assert reply.token_ids == []
        else:
            expected = vlm.generate(QUESTION, image, max_new_tokens=8)
            assert reply.token_ids == expected.token_ids
            assert reply.error is None


def test_log_probabilities_are_the_targets(vlm: VisionLanguageModel, images: list[Any]) -> None:
    for options in ({}, {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.3}):
        reply = vlm.generate(
            QUESTION, images[1], max_new_tokens=9, logprobs=3, strategy="early-exit", **options
        )
        inputs = vlm.prompts.inputs(question(QUESTION, images[1]))
        prompt = inputs["input_ids"]
        assert reply.prompt_token_ids == prompt[0].tolist()
        whole = torch.cat((prompt, torch.tensor([reply.token_ids])), 1)
        with torch.no_grad():
            logits = vlm.model(input_ids=whole, pixel_values=inputs["pixel_values"]).logits[0]
        expected = logits[prompt.shape[1] - 1 : -1].log_softmax(-1)
        assert reply.logprobs is not None
        assert len(reply.logprobs) == len(reply.token_ids)
        for row, (found, token) in enumerate(zip(reply.logprobs, reply.token_ids, strict=True)):
            assert found.token_id == token
            assert found.logprob == pytest.approx(float(expected[row, token]), abs=1e-4)
            best = expected[row].topk(3)
            assert list(found.top) == best.indices.tolist()
            assert list(found.top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)
    assert vlm.generate(QUESTION, images[1], max_new_tokens=2).logprobs is None
    chosen = vlm.generate(QUESTION, images[1], max_new_tokens=2, logprobs=0).logprobs
    assert chosen is not None
    assert [one.top for one in chosen] == [{}, {}]


def test_a_model_is_taken_as_it_is(vlm: VisionLanguageModel, images: list[Any]) -> None:
    model = copy.deepcopy(vlm.model)
    tower = model.model.vision_tower
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: part.training for name, part in model.named_modules()}
    kinds = {name: type(part) for name, part in model.named_modules()}
    other = VisionLanguageModel(model, vlm.tokenizer)
    found = other.generate(QUESTION, images[0], max_new_tokens=6).token_ids
    assert found == vlm.generate(QUESTION, images[0], max_new_tokens=6).token_ids
    assert model.model.vision_tower is tower
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert {name: type(part) for name, part in model.named_modules()} == kinds
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.train()
    with pytest.warns(UserWarning, match="training mode"):
        VisionLanguageModel(model, vlm.tokenizer)
    assert model.training


PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [3, 9, 11, 20, 33],
    "begin_suppress_tokens": [40, 41],
    "min_new_tokens": 10,
    "bad_words_ids": [[5], [7, 8]],
    "forced_eos_token_id": END,
    "exponential_decay_length_penalty": (3, 1.6),
}


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava", "blip2-opt", "blip2-t5"])
@pytest.mark.parametrize("name", [*PENALTIES, "all"])
def test_a_checkpoints_generation_settings_are_honoured(
    family: str, name: str, tmp_path: Path
) -> None:
    model, processor = saved(family, tmp_path)
    generator = model.language_model if family.startswith("blip2") else model
    chosen = PENALTIES if name == "all" else {name: PENALTIES[name]}
    generator.generation_config = GenerationConfig(
        eos_token_id=END, pad_token_id=PAD, max_new_tokens=12, bos_token_id=2,
        decoder_start_token_id=PAD, **chosen,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    vlm = fastvlm.load(tmp_path, dtype=torch.float64)
    # A language model inside another has no file of its own for its settings.
    if family.startswith("blip2"):
        vlm.model.language_model.generation_config = generator.generation_config
    for number in range(2):
        inputs = asked(processor, ["What?"], [sample_image(number)])
        [expected] = replies(vlm.model, inputs, 12)
        for strategy in ("autoregressive", "early-exit", "prompt-lookup"):
            reply = vlm.generate("What?", sample_image(number), strategy=strategy)
            assert reply.token_ids == expected


@pytest.mark.parametrize("setting", [{"num_beams": 3}, {"guidance_scale": 2.0}])
def test_settings_that_can_not_be_done_are_refused(
    vlm: VisionLanguageModel, setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy.deepcopy(vlm.model.generation_config)
    config.update(**setting)
    monkeypatch.setattr(vlm.model, "generation_config", config)
    with pytest.raises(InputError, match=next(iter(setting))):
        vlm.generate(QUESTION)


def test_sampling_params_say_what_they_are() -> None:
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=2**64 - 1, stop="beach")
    assert params.stop_strings == ["beach"]
    assert params.for_row(0) is params
    assert params.for_row(3).seed == 2
    assert SamplingParams().for_row(5).seed is None


STRATEGIES = ("autoregressive", "prompt-lookup", "early-exit", "layer-skip")


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch, images: list[Any]) -> VisionLanguageModel:
    """Return a model whose greedy reply to the first image ends with its third token."""
    vlm = small_vlm()
    third = vlm.generate(QUESTION, images[0], max_new_tokens=3).token_ids[2]
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", third)
    assert len(vlm.generate(QUESTION, images[0]).token_ids) <= 3
    return vlm


@pytest.mark.parametrize("least", [0, 5, 12])
def test_replies_of_a_minimum_length_are_those_of_generate(
    ending: VisionLanguageModel, images: list[Any], least: int
) -> None:
    lengths = {"min_new_tokens": least, "max_new_tokens": 20}
    inputs = ending.prompts.inputs(question(QUESTION, images[0]))
    model: Any = ending.model
    whole = model.generate(**inputs, **lengths, do_sample=False)[0].tolist()
    expected = whole[inputs["input_ids"].shape[1] :]
    assert least <= len(expected)
    ways = [*STRATEGIES, imitation(model, length=FixedLength(4))]
    for way in ways:
        assert ending.generate(QUESTION, images[0], strategy=way, **lengths).token_ids == expected
    drawn = {
        tuple(
            ending.generate(
                QUESTION, images[0], strategy=way, temperature=1.5, seed=3, **lengths
            ).token_ids
        )
        for way in ways
    }
    assert len(drawn) == 1
    assert not ending.end_tokens & {*drawn.pop()[:least]}


@pytest.mark.parametrize("least", [None, 1, 4, 8])
def test_stop_strings_end_no_reply_before_the_minimum_length(
    images: list[Any], least: int | None
) -> None:
    vlm = small_vlm()
    sampling: dict[str, Any] = {"temperature": 0.8, "seed": 3, "max_new_tokens": 24}
    whole = vlm.generate(QUESTION, images[0], **sampling)
    letters = [{*vlm.tokenizer.decode([token])} for token in whole.token_ids]
    stop = [chr(code) for code in range(1, 127)]
    ends = [end for end, some in enumerate(letters, 1) if some & {*stop} and end > (least or 0)]
    assert len(ends) > 5
    for way in STRATEGIES:
        options: dict[str, Any] = {**sampling, "strategy": way, "stop": stop}
        found = vlm.generate(QUESTION, images[0], **options, min_new_tokens=least)
        pieces = vlm.stream(QUESTION, images[0], **options, min_new_tokens=least)
        assert found.token_ids == whole.token_ids[: ends[0]]
        assert found.finish_reason == "stop"
        assert whole.text.startswith(found.text)
        assert "".join(piece.text for piece in pieces) == found.text


def test_a_reply_goes_on_behind_an_end_token(
    ending: VisionLanguageModel, images: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        ending.generate(
            QUESTION, images[0], strategy=way, ignore_eos=True, max_new_tokens=20
        ).token_ids
        for way in STRATEGIES
    ]
    [end] = ending.end_tokens
    monkeypatch.setattr(ending.model.generation_config, "eos_token_id", None)
    inputs = ending.prompts.inputs(question(QUESTION, images[0]))
    [expected] = replies(ending.model, inputs, 20)
    assert len(expected) == 20
    assert end in expected
    assert found == [expected] * len(STRATEGIES)


def text_model(family: str, tmp_path: Path) -> VisionLanguageModel:
    """Return a model of a family, with whatever reads text for it."""
    if family == "fast-vlm":
        return small_vlm()
    if family in ("llama", "opt-350m", "bart", "t5gemma"):
        model, _ = {**FAMILIES, **NEWER}[family]()
        return VisionLanguageModel(model, character_tokenizer())
    saved(family, tmp_path)
    return fastvlm.load(tmp_path, dtype=torch.float64)


@pytest.mark.parametrize(
    "family", ["fast-vlm", "qwen2.5-vl", "llava", "llama", "opt-350m", "bart", "t5gemma"]
)
def test_tokens_are_a_prompt_as_they_are(family: str, tmp_path: Path) -> None:
    vlm = text_model(family, tmp_path)
    prompt = TokenPrompt([40, 7, 9, 41, 40, 7, 9])
    inputs = torch.tensor([[*prompt.token_ids]])
    [expected] = generate_greedily(vlm, {"input_ids": inputs}, 12)
    for way in ("autoregressive", "prompt-lookup", "early-exit") * 2:
        # The second time its beginning is known.
        assert vlm.generate(prompt, strategy=way, max_new_tokens=12).token_ids == expected
    with pytest.raises(InputError, match="at least one token"):
        vlm.generate(TokenPrompt([]))
    for wrong in (-1, 10**6):
        with pytest.raises(InputError, match=f"{wrong}"):
            vlm.generate(TokenPrompt([5, wrong]))


def test_tokens_have_no_image(vlm: VisionLanguageModel, images: list[Any]) -> None:
    with pytest.raises(InputError, match="image"):
        vlm.generate(TokenPrompt([5]), images[0])
    with pytest.raises(InputError, match="placeholder"):
        vlm.generate(TokenPrompt([5, vlm.model.config.image_token_id]))
