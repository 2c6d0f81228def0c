"""Faults that users reported: each decodes as generate does, or is refused in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import fastvlm
from fastvlm.decoding import Engine, Request
from fastvlm.decoding.prefix_cache import PrefixCache
from fastvlm.functional.errors import InputError
from fastvlm.functional.lru import LruBytes
from fastvlm.language import SplitDecoder, split_decoder
from tests.families import FAMILIES, Inputs, text
from tests.families.phi import phi4_multimodal
from tests.families.text_only import LONG, experts
from tests.language.decoding import STRATEGIES, strategy
from tests.language.test_positions import check, decoded, generated, inputs_of, model_of, prompt

SWITCH = 24
"""Positions of the small Phi-3 from which on it rotates with its long factors."""
REWOUND = ("autoregressive", "early-exit", "block")


def long_model() -> PreTrainedModel:
    """Return Phi-3 with LongRoPE, as it is released."""
    model, _ = text(
        "phi3",
        rope_parameters={**LONG, "original_max_position_embeddings": SWITCH},
        original_max_position_embeddings=SWITCH,
        max_position_embeddings=96,
        eos_token_id=None,
    )
    model.generation_config.eos_token_id = None
    return model


def longrope(**more: float) -> dict[str, Any]:
    """Return the fields of a configuration with LongRoPE.

    Args:
        more: What else stands among its `rope_parameters`.
    """
    return {
        "rope_parameters": {**LONG, "original_max_position_embeddings": SWITCH, **more},
        "original_max_position_embeddings": SWITCH,
        "max_position_embeddings": 96,
    }


def replies_with_prefixes(
    decoder: SplitDecoder, name: str, prompts: list[list[int]], limit: int
) -> tuple[list[list[int]], list[int]]:
    """Decode prompts one after another, each with what those before it have left.

    Returns:
        The replies, and how many positions of each prompt were known.
    """
    prefixes, engine = PrefixCache(LruBytes(1 << 24)), Engine(decoder)
    drafts = strategy(name, decoder)
    found, known = [], []
    for tokens in prompts:
        hit = prefixes.match(decoder.position_keys(tokens, len(tokens)))
        known.append(0 if hit is None else hit.length)
        request = Request(inputs_of(decoder, tokens), drafts, limit, prefix_cache=prefixes)
        [done] = engine.run([request])
        if done.error is not None:
            raise done.error
        found.append(done.output_token_ids)
    return found, known


def check_at_switch(model: PreTrainedModel, name: str) -> None:
    """Compare replies on both sides of the switch with those of transformers.

    There generate empties its cache. Some releases then hand some models all tokens, and some the
    last one alone, with which no reply makes sense: it ends.
    """
    lengths, limit = [12, 20, 21, 22, 23, 24, 25, 26, 40], 20
    short = prompt(lengths[0])
    if generated(model, short, limit) == generated(model, short, limit, use_cache=False):
        check(model, name, lengths, limit)
        return
    expected = [generated(model, prompt(length), limit) for length in lengths]
    rooms = [SWITCH + 1 - length if length <= SWITCH else limit for length in lengths]
    with pytest.warns(UserWarning, match="at 24 positions, beyond which"):
        found = decoded(model, name, [prompt(length) for length in lengths], limit)
    assert [request.output_token_ids for request in found] == [
        reply[:room] for reply, room in zip(expected, rooms, strict=True)
    ]


@pytest.mark.parametrize("name", STRATEGIES)
def test_phi_3_computes_all_anew_where_long_factors_begin(name: str) -> None:
    check_at_switch(long_model(), name)


def long_experts() -> PreTrainedModel:
    """Return PhiMoE, whose rotations are also scaled by the longest position of a pass."""
    scales = longrope(short_mscale=1.1, long_mscale=1.6)
    model, _ = experts("phimoe", seed=23, num_local_experts=4, eos_token_id=None, **scales)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", STRATEGIES)
def test_phimoe_scales_as_the_longest_position_of_a_row_asks(name: str) -> None:
    check_at_switch(long_experts(), name)


def test_phimoe_scales_all_of_a_prompt_that_is_computed_in_chunks() -> None:
    model = long_experts()
    decoder = split_decoder(model)
    drafts = strategy("block", decoder)
    requests = [Request(inputs_of(decoder, prompt(40)), drafts, 12) for _ in range(2)]
    engine = Engine(decoder, prefill_positions=5)
    engine.add(requests[0])
    engine.step()
    engine.add(requests[1])
    while not all(request.finished for request in requests):
        engine.step()
    expected = generated(model, prompt(40), 12)
    assert [request.output_token_ids for request in requests] == [expected] * 2


@pytest.mark.parametrize(
    "options", [longrope(partial_rotary_factor=1.0), {"original_max_position_embeddings": SWITCH}]
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_phi_4_multimodal_ends_where_generate_loses_the_prompt(
    name: str, options: dict[str, Any]
) -> None:
    model, _ = phi4_multimodal(**options)
    check_at_switch(model, name)


@pytest.mark.parametrize("name", REWOUND)
def test_a_prefix_of_a_short_prompt_serves_no_long_one(name: str) -> None:
    """Its keys were rotated with the short factors, and generate uses the long ones throughout."""
    model = long_model()
    decoder = split_decoder(model)
    whole = prompt(60)
    prompts = [whole[:10], whole[:40], whole[:11], whole[:44]]
    expected = [generated(model, tokens, 12) for tokens in prompts]
    found, known = replies_with_prefixes(decoder, name, prompts, 12)
    assert found == expected
    assert known[1] == 0
    assert known[2] >= 10
    assert known[3] >= 40


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_window_that_only_the_cache_has(name: str) -> None:
    """Llama's layers see everything; generate's cache forgets what lies before the window."""
    window = 9
    model = model_of(sliding_window=window)
    lengths = [5, 8, 9, 10, 14, 21]
    check(model, name, lengths, 16)
    whole = model_of()
    assert any(generated(whole, prompt(n), 16) != generated(model, prompt(n), 16) for n in lengths)


def tuned() -> tuple[Any, Inputs]:
    """Return a model with tuned prompts, and a padded batch for it."""
    peft = pytest.importorskip("peft")
    model, inputs = FAMILIES["llama"]()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    torch.manual_seed(5)
    return peft.get_peft_model(model, config).double().eval(), inputs


def test_tuned_prompts_before_padding_are_refused() -> None:
    model, inputs = tuned()
    with pytest.raises(InputError, match="padding stands between"):
        model.generate(
            **inputs(4),
            max_new_tokens=8,
            custom_generate=fastvlm.speculative(strategy="early-exit"),
        )


def test_tuned_prompts_of_one_row() -> None:
    model, inputs = tuned()
    given = inputs(1)
    # PEFT's own generate asks for past_key_values, which transformers 5.24 calls cache: there it
    # begins each step without one.
    expected = given["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            logits = model(
                input_ids=expected, attention_mask=torch.ones_like(expected), use_cache=False
            ).logits
        expected = torch.cat((expected, logits[:, -1:].argmax(-1)), 1)
    found = model.generate(
        **given,
        max_new_tokens=8,
        do_sample=False,
        custom_generate=fastvlm.speculative(strategy="early-exit"),
    )
    assert torch.equal(found, expected)


def test_a_static_cache_is_refused_with_its_cure() -> None:
    model, inputs = FAMILIES["llama"]()
    with pytest.raises(InputError) as caught:
        model.generate(
            **inputs(4),
            max_new_tokens=8,
            cache_implementation="static",
            custom_generate=fastvlm.speculative(strategy="early-exit"),
        )
    assert "cache_implementation='static', leave that out" in str(caught.value)


def test_padding_on_the_right_is_warned_of_in_generate() -> None:
    model, inputs = FAMILIES["llama"]()
    given = {name: tensor.flip(1) for name, tensor in inputs(4).items()}
    with pytest.warns(UserWarning, match="padded on the right"):
        model.generate(
            **given, max_new_tokens=4, custom_generate=fastvlm.speculative(strategy="early-exit")
        )
