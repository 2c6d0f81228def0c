"""Imitation networks for every kind of decoder: how they start, and that they can be saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastvlm.drafting import ImitationConfig, ImitationNetwork
from fastvlm.drafting.directory import load_draft
from fastvlm.drafting.fingerprint import fingerprint
from fastvlm.drafting.imitation import grown, initialise_from
from fastvlm.functional.errors import InputError
from fastvlm.language import capture_decoder_inputs, split_decoder
from fastvlm.language.general import added_after
from fastvlm.language.positions import Positions
from fastvlm.training.forcing import GradientCache
from tests.families import FAMILIES, NEWER

KINDS = ("llama", "qwen2.5-vl", "blip2-opt", "opt-350m", "blip2-t5", "blip2-t5-tied")


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("kind", ["block", "mlp"])
def test_a_saved_network_is_the_same(family: str, kind: str, tmp_path: Path) -> None:
    model, _ = FAMILIES[family]()
    network = ImitationNetwork(
        ImitationConfig(
            kind=kind,
            exit_layer=1,
            blocks=2,
            text_config=model.config.get_text_config().to_dict(),
            target=fingerprint(model),
        )
    )
    initialise_from(network, split_decoder(model).layers)
    network.save_pretrained(tmp_path)
    loaded = load_draft(tmp_path, model)
    assert loaded.state_dict().keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value.double())
    assert loaded.cache_layers == (2 if kind == "block" else 0)


@pytest.mark.parametrize("family", KINDS)
def test_a_gated_network_starts_from_a_gated_layer_or_as_the_identity(family: str) -> None:
    model, _ = FAMILIES[family]()
    decoder = split_decoder(model)
    config = ImitationConfig(kind="mlp", exit_layer=1, text_config=decoder.decoder.config.to_dict())
    network = ImitationNetwork(config)
    initialise_from(network, decoder.layers)
    x = torch.randn(1, 3, decoder.width)
    with torch.no_grad():
        changed = not torch.equal(network.mlp(x), x)
    assert changed == (decoder.feed_forward(decoder.layers[1]) is not None)
    assert changed == (family in {"llama", "qwen2.5-vl", "blip2-t5"})


@pytest.mark.parametrize("family", ["llama", "qwen2.5-vl", "blip2-opt"])
def test_further_blocks_add_nothing_at_first(family: str) -> None:
    model, inputs = FAMILIES[family]()
    decoder = split_decoder(model)
    [prompt] = capture_decoder_inputs(model, inputs(1))
    text = decoder.decoder.config.to_dict()
    network = ImitationNetwork(ImitationConfig(text_config=text, draft_vocabulary_size=5))
    initialise_from(network, decoder.layers)
    network.draft_vocabulary.copy_(torch.tensor([3, 4, 7, 8, 9]))
    network.implement_as(decoder.decoder.config).to(decoder.dtype).eval()
    more = grown(network, 3, decoder)
    assert (more.config.blocks, more.cache_layers) == (3, 3)
    assert torch.equal(more.draft_vocabulary, network.draft_vocabulary)
    found = []
    with torch.no_grad():
        for one in (network, more):
            whole, cache = Positions.whole([len(prompt)], decoder.device, [prompt]), GradientCache()
            x = decoder.forward_layers(prompt.embeddings[None], whole, cache, range(1))
            found.append(one.imitate(x, whole, cache, decoder))
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], x)


# The first has norms after its sums; the other attends to an encoder in a part of its own.
@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "mlp"), ("opt-350m", "block"), ("blip2-t5", "block")]
)
def test_what_can_not_have_blocks_that_add_nothing_is_refused(family: str, kind: str) -> None:
    model, _ = FAMILIES[family]()
    decoder = split_decoder(model)
    text = decoder.decoder.config.to_dict()
    network = ImitationNetwork(ImitationConfig(kind=kind, text_config=text)).to(decoder.dtype)
    for parameter in network.layers.parameters():
        # Norms with weights of 1 would leave alone what is normed.
        nn.init.uniform_(parameter, 0.5, 1.5)
    with pytest.raises(InputError, match=r"blocks|Blocks"):
        grown(network.implement_as(decoder.decoder.config).eval(), 2, decoder)


@pytest.mark.parametrize("family", ["blip2-opt", "blip2-t5"])
def test_a_draft_knows_its_target_from_without_and_from_within(family: str) -> None:
    model, _ = FAMILIES[family]()
    assert fingerprint(model) == fingerprint(model.language_model)


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("family", ["granite4-vision", "qwen3-vl"])
def test_blocks_see_what_is_added_after_the_exit_in_training_as_in_decoding(
    family: str, blocks: int
) -> None:
    model, inputs = NEWER[family]()
    decoder = split_decoder(model)
    [prompt] = capture_decoder_inputs(model, inputs(1))
    assert max(prompt.injections) >= 1
    text = decoder.decoder.config.to_dict()
    torch.manual_seed(3)
    network = ImitationNetwork(ImitationConfig(exit_layer=1, blocks=blocks, text_config=text))
    network.implement_as(decoder).to(decoder.dtype).eval()
    length = len(prompt)
    with torch.no_grad():
        whole = Positions.whole([length], decoder.device, [prompt])
        cache = GradientCache()
        x = decoder.forward_layers(prompt.embeddings[None], whole, cache, range(1))
        taught = network.imitate(x, whole, cache, decoder)
        blind = Positions.whole([length], decoder.device, [replace(prompt, injections={})])
        assert not torch.allclose(network.imitate(x, blind, cache, decoder)[:, -1], taught[:, -1])
        kept = decoder.cache(1, length)
        kept.assign(0, prompt)
        found = []
        for first in range(0, length, 4):
            part = x[:, first : first + 4]
            found.append(
                network.imitate(part, kept.positions([first], part.shape[1]), kept, decoder)
            )
    torch.testing.assert_close(torch.cat(found, 1), taught)


def test_a_block_is_given_what_is_added_within_the_layers_that_it_stands_for() -> None:
    assert added_after(1, 4, 3) == ((), (1,), (2,), (3,))
    assert added_after(1, 4, 1) == ((1, 2), (3,))
    assert added_after(2, 8, 2) == ((2, 3), (4, 5, 6), (7,))
