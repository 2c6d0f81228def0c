"""Imitation networks for every kind of decoder: how they start, and that they can be saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastvlm.drafting import ImitationConfig, ImitationNetwork
from fastvlm.drafting.directory import load_draft
from fastvlm.drafting.fingerprint import fingerprint
from fastvlm.drafting.imitation import initialise_from
from fastvlm.language import split_decoder
from tests.families import FAMILIES

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


@pytest.mark.parametrize("family", ["blip2-opt", "blip2-t5"])
def test_a_draft_knows_its_target_from_without_and_from_within(family: str) -> None:
    model, _ = FAMILIES[family]()
    assert fingerprint(model) == fingerprint(model.language_model)
