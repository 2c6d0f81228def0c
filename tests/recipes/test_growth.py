"""A grown decoder computes what the small one did, and each of its channels learns on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastvlm.decoding import SelfSpeculative
from fastvlm.drafting import FixedLength
from fastvlm.drafting.fingerprint import difference
from fastvlm.functional.errors import InputError
from fastvlm.language import split_decoder
from recipe.growth import Size, grown, grown_draft
from tests.decoding.conftest import decode, imitation
from tests.decoding.test_cycle import PROMPTS
from tests.models import VISUAL_TOKENS, small_vlm


def small_tied() -> Any:
    """Return the small model with the embeddings as its head."""
    model: Any = small_vlm().model
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    return model


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(2)
    size, reply = 128, torch.randint(5, 300, (2, 12))
    tokens = torch.cat((torch.full((2, VISUAL_TOKENS), model.config.image_token_id), reply), 1)
    pixels = torch.rand(2, 3, size, size, dtype=model.dtype)
    found: torch.Tensor = model(input_ids=tokens, pixel_values=pixels).logits
    return found


@pytest.mark.parametrize("size", [Size(3), Size(1, 8), Size(2, 9)])
def test_a_grown_model_has_the_same_logits(size: Size) -> None:
    model = small_tied()
    larger: Any = grown(model, size)
    assert larger.config.text_config.hidden_size == size.times * 64
    assert len(larger.model.language_model.layers) == (size.layers or 5)
    with torch.no_grad():
        before, after = logits(model), logits(larger)
    # The norms of transformers' Qwen2 compute in float32.
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5 * float(before.abs().max()))


@pytest.mark.parametrize("kind", ["block", "mlp"])
def test_the_draft_of_a_grown_model_drafts_what_it_did(kind: str) -> None:
    model = small_tied()
    strategy = imitation(model, kind=kind, exit_layer=2)
    network: Any = strategy.network
    larger: Any = grown(model, Size(2, 12))
    draft = grown_draft(network, larger).eval()
    # Of layers 0, 0, 0, 1, 1, 2, ..., those behind the first 1 aren't needed.
    assert draft.config.exit_layer == 4
    assert difference(draft.config.target, larger) is None
    wider = SelfSpeculative(split_decoder(larger), 4, draft, FixedLength(4))
    before, after = (
        [(one.output_token_ids, one.proposed, one.accepted) for one in decode(*both, PROMPTS, 40)]
        for both in ((model, strategy), (larger, wider))
    )
    assert after == before
    assert sum(sum(accepted) for _, _, accepted in before) > 0


def test_repeated_channels_have_gradients_of_their_own() -> None:
    model: Any = grown(small_tied(), Size(2, 6))
    logits(model)[:, -1, 7].sum().backward()
    for layer in model.model.language_model.layers:
        for linear in (layer.self_attn.v_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            gradient = linear.weight.grad
            if gradient.any():  # none yet in a new layer, but for its last product
                assert not torch.allclose(*gradient.chunk(2), rtol=1e-2)


def test_a_decoder_is_not_grown_to_what_it_can_not_be() -> None:
    model = small_tied()
    assert grown(model, Size()) is model
    with pytest.raises(InputError, match="The decoder has 5 layers, and can't shrink to 4"):
        grown(model, Size(layers=4))
    model.config.text_config.tie_word_embeddings = False
    with pytest.raises(InputError, match="Only a Qwen2 decoder with tied embeddings"):
        grown(model, Size(2))
