"""The imitation network and its directory: saved, loaded, and refused for another target."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fastvlm.drafting import ImitationConfig, ImitationNetwork
from fastvlm.drafting.directory import load_draft
from fastvlm.drafting.fingerprint import fingerprint
from fastvlm.drafting.imitation import initialise_from
from fastvlm.functional.errors import CheckpointError, InputError
from fastvlm.language import split_decoder
from tests.models import LIVELY

DRAFTED = (3, 5, 8, 21, 40)
KINDS: dict[str, dict[str, Any]] = {
    "block": {"kind": "block", "exit_layer": 2},
    "two blocks": {"kind": "block", "exit_layer": 1, "blocks": 2},
    "mlp": {"kind": "mlp", "exit_layer": 3},
}


def text_model(family: str = "qwen2", number: int = 4, **overrides: Any) -> PreTrainedModel:
    """Return a causal model in float32; its weights follow from a number."""
    torch.manual_seed(number)
    options = {**LIVELY, "model_type": family, "vocab_size": 50, **overrides}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    return AutoModelForCausalLM.from_config(config).eval()


def network_for(target: PreTrainedModel, **options: Any) -> ImitationNetwork:
    """Return a network that starts as the target's layers, and was moved a little from there."""
    options = {"draft_vocabulary_size": len(DRAFTED), **options}
    network = ImitationNetwork(
        ImitationConfig(text_config=target.config.to_dict(), target=fingerprint(target), **options)
    ).eval()
    initialise_from(network, list(target.get_decoder().layers))
    if network.draft_vocabulary is not None:
        network.draft_vocabulary.copy_(torch.tensor(DRAFTED))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return network


@torch.no_grad()
def guesses(network: ImitationNetwork, target: PreTrainedModel) -> Tensor:
    """What a network imitates of a few tokens."""
    decoder = split_decoder(target)
    cache = decoder.cache(2, 6, network.cache_layers)
    span = cache.span([0, 0], 6)
    tokens = torch.tensor([[4, 8, 15, 16, 23, 42], [7, 7, 1, 2, 30, 9]])
    x = decoder.run(decoder.embed(tokens), span, cache, range(network.config.exit_layer))
    return network.run(x, span, cache, decoder)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return text_model()


@pytest.fixture
def draft(target: PreTrainedModel, tmp_path: Path) -> Path:
    network_for(target).save_pretrained(tmp_path / "draft")
    return tmp_path / "draft"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_loading_gives_what_was_saved(kind: str, family: str, tmp_path: Path) -> None:
    target = text_model(family)
    network = network_for(target, num_speculative_tokens=7, confidence=0.25, **KINDS[kind])
    network.save_pretrained(tmp_path)
    again, info = ImitationNetwork.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for loaded in (again.eval(), load_draft(tmp_path, target)):
        assert not loaded.training
        assert loaded.state_dict().keys() == network.state_dict().keys()
        for name, weight in network.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name
        assert loaded.draft_vocabulary.tolist() == list(DRAFTED)
        assert loaded.draft_vocabulary.dtype == torch.long
        for field in ("kind", "exit_layer", "blocks", "num_speculative_tokens", "confidence"):
            assert getattr(loaded.config, field) == getattr(network.config, field)
        # Weights at another address may be summed in another order.
        torch.testing.assert_close(guesses(loaded, target), guesses(network, target))


def test_a_network_without_a_vocabulary_of_its_own_drafts_all(
    target: PreTrainedModel, tmp_path: Path
) -> None:
    network_for(target, draft_vocabulary_size=None).save_pretrained(tmp_path)
    assert load_draft(tmp_path, target).draft_vocabulary is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_takes_the_precision_of_its_target(
    kind: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    network = network_for(target, **KINDS[kind])
    network.to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        same = copy.deepcopy(target).to(dtype)
        loaded = load_draft(tmp_path, same)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert loaded.draft_vocabulary.tolist() == list(DRAFTED)
        # bfloat16 fits into the other two, so nothing is rounded on the way.
        for name, weight in network.named_parameters():
            assert torch.equal(loaded.get_parameter(name).bfloat16(), weight), name
        assert guesses(loaded, same).dtype == dtype


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64], ids=str)
def test_blocks_are_as_precise_as_the_rest_whatever_the_target_was_stored_in(
    stored: torch.dtype, target: PreTrainedModel, tmp_path: Path
) -> None:
    copy.deepcopy(target).to(stored).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for kind in KINDS.values():
        network = network_for(loaded, **kind)
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_a_fingerprint_tells_weights_and_not_precisions_apart(target: PreTrainedModel) -> None:
    own = fingerprint(target)
    assert len(own) == 16
    assert int(own, 16) >= 0
    assert fingerprint(copy.deepcopy(target)) == own
    for dtype in (torch.float64, torch.bfloat16):
        assert fingerprint(copy.deepcopy(target).to(dtype)) == own
    assert fingerprint(copy.deepcopy(target).bfloat16().float()) == own
    others = [text_model(number=9), text_model("llama"), text_model(num_hidden_layers=4)]
    for name in ("norm.weight", "layers.4.mlp.down_proj.weight", "layers.0.self_attn.q_proj.bias"):
        moved = copy.deepcopy(target)
        moved.get_decoder().get_parameter(name).data.view(-1)[0] += 0.5
        others.append(moved)
    assert len({own, *map(fingerprint, others)}) == 1 + len(others)


def test_a_draft_for_another_target_is_refused(draft: Path, target: PreTrainedModel) -> None:
    other = text_model(number=9)
    with pytest.raises(CheckpointError, match="made for another model") as caught:
        load_draft(draft, other)
    for part in (str(draft), fingerprint(target), fingerprint(other)):
        assert part in str(caught.value)


def spoil(draft: Path, how: str) -> None:
    weights, config = draft / "model.safetensors", draft / "config.json"
    tensors = load_file(weights)
    settings = json.loads(config.read_text())
    first = next(name for name in tensors if name.endswith("down_proj.weight"))
    match how:
        case "no weights":
            weights.unlink()
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "text for weights":
            weights.write_text("not tensors")
        case "a missing tensor":
            del tensors[first]
            save_file(tensors, weights, {"format": "pt"})
        case "no vocabulary":
            del tensors["draft_vocabulary"]
            save_file(tensors, weights, {"format": "pt"})
        case "another shape":
            tensors[first] = tensors[first][:, 1:].clone()
            save_file(tensors, weights, {"format": "pt"})
        case "broken configuration":
            config.write_text("{")
        case "impossible configuration":
            config.write_text(json.dumps({**settings, "exit_layer": 5}))
        case "unknown kind":
            config.write_text(json.dumps({**settings, "kind": "tree"}))
        case "no target's configuration":
            config.write_text(json.dumps({**settings, "text_config": None}))


@pytest.mark.parametrize(
    "how",
    [
        "no weights",
        "cut weights",
        "text for weights",
        "a missing tensor",
        "no vocabulary",
        "another shape",
        "broken configuration",
        "impossible configuration",
        "unknown kind",
        "no target's configuration",
    ],
)
def test_a_broken_draft_is_named(how: str, draft: Path, target: PreTrainedModel) -> None:
    spoil(draft, how)
    for given in (draft, str(draft)):
        with pytest.raises(CheckpointError, match=r"can't be read: \S") as caught:
            load_draft(given, target)
        assert str(draft) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_where_there_is_no_draft_is_said(target: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(CheckpointError, match=r"no draft in .*config\.json") as caught:
            load_draft(folder, target)
        assert str(folder) in str(caught.value)


def test_a_target_is_no_draft(target: PreTrainedModel, tmp_path: Path) -> None:
    target.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_draft(tmp_path, target)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "tree"}, "block, mlp; got tree"),
        ({"exit_layer": 0}, "at least 1; got 0 and 1"),
        ({"blocks": 0}, "at least 1; got 1 and 0"),
        ({"exit_layer": 5}, "below the target's 5 layers; got 5"),
    ],
)
def test_an_impossible_network_is_refused(
    wrong: dict[str, Any], message: str, target: PreTrainedModel
) -> None:
    with pytest.raises(InputError, match=message):
        ImitationNetwork(ImitationConfig(text_config=target.config.to_dict(), **wrong))


def test_a_network_needs_its_targets_configuration() -> None:
    with pytest.raises(InputError, match="text_config"):
        ImitationNetwork(ImitationConfig())
