"""`custom_generate=fastvlm.speculative(...)`: everything that `generate` prepares is honoured."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TextIteratorStreamer, set_seed
from transformers.generation import logits_process as processing
from transformers.generation.stopping_criteria import (
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

import fastvlm
from fastvlm.drafting import ImitationConfig, ImitationNetwork
from fastvlm.drafting.fingerprint import fingerprint
from fastvlm.drafting.imitation import initialise_from
from fastvlm.functional.errors import CheckpointError, InputError
from fastvlm.language import split_decoder
from tests.families import FAMILIES, Inputs
from tests.models import small_vlm

LIMIT = 14


def block(model: PreTrainedModel) -> ImitationNetwork:
    """Return a draft that is sometimes right."""
    decoder = split_decoder(model)
    torch.manual_seed(2)
    config = ImitationConfig(
        kind="block",
        exit_layer=1,
        blocks=2,
        text_config=decoder.decoder.config.to_dict(),
        target=fingerprint(model),
        num_speculative_tokens=4,
        confidence=0,
    )
    network = ImitationNetwork(config)
    initialise_from(network, decoder.layers)
    return network.to(decoder.dtype).eval()


@pytest.fixture(scope="module")
def llava() -> tuple[PreTrainedModel, Inputs]:
    model, inputs = FAMILIES["llava"]()
    return model, inputs(3)


def both(model: PreTrainedModel, inputs: Inputs, method: Any, **options: Any) -> tuple[Any, Any]:
    """Return what `generate` gives ordinarily, and with our decoding method."""
    options = {"max_new_tokens": LIMIT, "do_sample": False, **options}
    return model.generate(**inputs, **options), model.generate(
        **inputs, **options, custom_generate=method
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_user_changes_one_argument(family: str) -> None:
    model, inputs = FAMILIES[family]()
    for method in (fastvlm.speculative(block(model)), fastvlm.speculative()):
        for rows in (1, 3):
            ordinary, sooner = both(model, inputs(rows), method)
            assert torch.equal(ordinary, sooner)
        assert sum(sum(request.proposed) for request in method.requests) > 0


def test_a_draft_is_loaded_from_its_directory(
    llava: tuple[PreTrainedModel, Inputs], tmp_path: Path
) -> None:
    model, inputs = llava
    block(model).save_pretrained(tmp_path / "draft")
    ordinary, sooner = both(model, inputs, fastvlm.speculative(tmp_path / "draft"))
    assert torch.equal(ordinary, sooner)
    other, given = FAMILIES["llama"]()
    with pytest.warns(UserWarning, match="other weights"):
        ordinary, sooner = both(other, given(1), fastvlm.speculative(tmp_path / "draft"))
    assert torch.equal(ordinary, sooner)
    other, given = FAMILIES["qwen2.5-vl"]()
    with pytest.raises(CheckpointError, match="doesn't fit this model"):
        both(other, given(1), fastvlm.speculative(tmp_path / "draft"))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": [[5], [7, 8]]},
        {"suppress_tokens": [3, 9, 11]},
        {"min_new_tokens": 10},
        {"forced_eos_token_id": 1},
        {"exponential_decay_length_penalty": (3, 1.6)},
        {"eos_token_id": [1, 20, 30, 40]},
        {"num_return_sequences": 1, "length_penalty": 2.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_logits_processors_see_what_generate_shows_them(
    llava: tuple[PreTrainedModel, Inputs], options: dict[str, Any]
) -> None:
    model, inputs = llava
    plain = model.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
    for method in (fastvlm.speculative(block(model)), fastvlm.speculative()):
        ordinary, sooner = both(model, inputs, method, **options)
        assert torch.equal(ordinary, sooner)
    if not options.keys() & {"length_penalty", "min_new_tokens"}:
        assert ordinary.shape != plain.shape or not torch.equal(ordinary, plain)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8])
def test_the_limit_is_exact_inside_a_draft(
    llava: tuple[PreTrainedModel, Inputs], limit: int
) -> None:
    model, inputs = llava
    options = {"max_new_tokens": limit, "eos_token_id": None}
    ordinary, sooner = both(model, inputs, fastvlm.speculative(block(model)), **options)
    assert torch.equal(ordinary, sooner)
    assert sooner.shape[1] == inputs["input_ids"].shape[1] + limit


class Sum(StoppingCriteria):
    """Ends a row whose last two tokens have an even sum: a user's own criterion."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        return (input_ids[:, -1] + input_ids[:, -2]) % 4 == 0


def test_a_users_stopping_criterion_is_asked_after_each_token(
    llava: tuple[PreTrainedModel, Inputs],
) -> None:
    model, inputs = llava
    options = {"stopping_criteria": StoppingCriteriaList([Sum()]), "max_new_tokens": 40}
    ordinary, sooner = both(model, inputs, fastvlm.speculative(block(model)), **options)
    assert torch.equal(ordinary, sooner)
    assert sooner.shape[1] < inputs["input_ids"].shape[1] + 40


def test_stop_strings_and_streamers_work_as_ever() -> None:
    vlm = small_vlm()
    tokens = torch.tensor([vlm.tokens("Describe the picture.", 0)])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    method = fastvlm.speculative(strategy="early-exit", num_speculative_tokens=5)
    whole, sooner = both(vlm.model, inputs, method, max_new_tokens=30)
    assert torch.equal(whole, sooner)
    text = vlm.tokenizer.decode(whole[0, tokens.shape[1] :], skip_special_tokens=True)
    stop = StopStringCriteria(vlm.tokenizer, [text[len(text) // 2 :][:3]])
    ordinary, sooner = both(
        vlm.model, inputs, method, max_new_tokens=30, stopping_criteria=StoppingCriteriaList([stop])
    )
    assert torch.equal(ordinary, sooner)
    assert sooner.shape[1] < whole.shape[1]
    streamer = TextIteratorStreamer(
        vlm.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True
    )
    options = {**inputs, "max_new_tokens": 30, "do_sample": False, "streamer": streamer}
    thread = Thread(target=vlm.model.generate, kwargs={**options, "custom_generate": method})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == text
    assert len(pieces) > 2


def test_a_dictionary_holds_scores_and_logits(llava: tuple[PreTrainedModel, Inputs]) -> None:
    model, inputs = llava
    options = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.3,
        "eos_token_id": None,
    }
    ordinary, sooner = both(model, inputs, fastvlm.speculative(block(model)), **options)
    assert type(ordinary) is type(sooner)
    assert torch.equal(ordinary.sequences, sooner.sequences)
    for one, other in ((ordinary.scores, sooner.scores), (ordinary.logits, sooner.logits)):
        assert len(one) == len(other) == LIMIT
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


def test_a_seed_reproduces_samples(llava: tuple[PreTrainedModel, Inputs]) -> None:
    model, inputs = llava
    method = fastvlm.speculative(block(model))

    def sample(seed: int) -> Tensor:
        set_seed(seed)
        return model.generate(
            **inputs, max_new_tokens=LIMIT, do_sample=True, top_p=0.9, custom_generate=method
        )

    assert torch.equal(sample(1), sample(1))
    first, other = sample(1), sample(2)
    assert first.shape != other.shape or not torch.equal(first, other)


class Counting(processing.LogitsProcessor):
    """Remembers how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        self.calls += 1
        return scores


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_beams": 3}, "one reply at a time"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "hidden states"),
        ({"logits_processor": processing.LogitsProcessorList([Counting()])}, "Counting remembers"),
        ({"prefix_allowed_tokens_fn": lambda row, _: [row + 4]}, "one row at a time"),
        ({"encoder_repetition_penalty": 1.2}, "one row at a time"),
    ],
    ids=["beams", "hidden states", "a stateful processor", "by row", "encoder"],
)
def test_what_can_not_be_exact_is_refused(
    llava: tuple[PreTrainedModel, Inputs], options: dict[str, Any], told: str
) -> None:
    model, inputs = llava
    with pytest.raises(InputError, match=told):
        model.generate(**inputs, max_new_tokens=5, custom_generate=fastvlm.speculative(), **options)
