"""Passes of one width: in bfloat16 drafting then changes not one bit of one logit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastvlm.decoding import Autoregressive, Engine, LayerSkip, Request, Strategy
from fastvlm.drafting import FixedLength
from fastvlm.functional.errors import InputError
from fastvlm.language import split_decoder
from tests.decoding.conftest import finish, inputs_of, text_model
from tests.decoding.test_cycle import PROMPTS, STRATEGIES, strategy

WIDTH = 8


def logits(
    model: PreTrainedModel, drafter: Strategy, prompt: list[int], width: int | None
) -> tuple[list[int], Tensor]:
    """Decode a prompt; return its reply and the target's logits, (tokens, vocabulary)."""
    request = Request(inputs_of(model, prompt), drafter, 24, keeps_logits=True)
    finish(Engine(split_decoder(model), verify_width=width), [request])
    return request.output_token_ids, torch.stack(request.logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral-sliding"])
@pytest.mark.parametrize("name", [*STRATEGIES, "layer-skip"])
def test_every_logit_has_the_bits_of_ordinary_decoding(family: str, name: str) -> None:
    model = text_model(family).bfloat16()
    if name == "layer-skip":
        drafter: Strategy = LayerSkip(split_decoder(model), (1,), FixedLength(3))
    else:
        drafter = strategy(name, model)
    for prompt in PROMPTS:
        reply, found = logits(model, drafter, prompt, WIDTH)
        ordinary, expected = logits(model, Autoregressive(drafter.exit_layer), prompt, WIDTH)
        assert reply == ordinary
        assert torch.equal(found, expected)


def test_in_float64_a_width_changes_no_token() -> None:
    model = text_model("qwen2")
    for prompt in PROMPTS:
        narrow, expected = logits(model, strategy("block", model), prompt, None)
        wide, found = logits(model, strategy("block", model), prompt, WIDTH)
        assert wide == narrow
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_passes_of_their_own_width_round_otherwise() -> None:
    """What the tests above would see if the width did nothing."""
    model = text_model("llama").bfloat16()
    drafter = strategy("perfect", model)
    found = [logits(model, drafter, prompt, None)[1] for prompt in PROMPTS]
    expected = [logits(model, Autoregressive(), prompt, None)[1] for prompt in PROMPTS]
    assert not all(map(torch.equal, found, expected))


def test_drafts_must_fit_into_the_width() -> None:
    model = text_model("llama")
    with pytest.raises(InputError, match="up to 6 tokens are verified 7 wide, but the width is 6"):
        logits(model, strategy("perfect", model), PROMPTS[0], 6)
