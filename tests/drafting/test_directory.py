"""The imitation network and its directory: saved, loaded, and refused where it doesn't fit."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import fastvlm_example
from fastvlm.checkpoints.loading import load_checkpoint
from fastvlm.drafting import ImitationConfig, ImitationNetwork
from fastvlm.drafting.directory import load_draft
from fastvlm.drafting.fingerprint import decoder_hash, fingerprint, weights_hash
from fastvlm.drafting.imitation import initialise_from
from fastvlm.functional.errors import CheckpointError, InputError
from fastvlm.language import split_decoder
from tests.models import LIVELY
from tests.quantised import quantise_linears

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
    cache = decoder.cache(2, 6)
    positions = cache.positions([0, 0], 6)
    tokens = torch.tensor([[4, 8, 15, 16, 23, 42], [7, 7, 1, 2, 30, 9]])
    layers = range(network.config.exit_layer)
    x = decoder.forward_layers(decoder.embed(tokens), positions, cache, layers)
    return network.imitate(x, positions, cache, decoder)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return text_model()


@pytest.fixture
def draft(target: PreTrainedModel, tmp_path: Path) -> Path:
    network_for(target).save_pretrained(tmp_path / "draft")
    return tmp_path / "draft"


def config_of(draft: Path, **changes: Any) -> None:
    file = draft / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


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


def quietly(folder: Path, target: PreTrainedModel) -> ImitationNetwork:
    """Load a draft; a warning fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_draft(folder, target)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_draft_knows_its_target_in_any_precision(
    dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    target = text_model(tie_word_embeddings=tied)
    for number, made_in in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        rounded = copy.deepcopy(target).to(made_in)
        network_for(rounded).save_pretrained(tmp_path / str(number))
        loaded = quietly(tmp_path / str(number), rounded.to(dtype))
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        quietly(tmp_path / str(number), copy.deepcopy(target).to(dtype))


def test_a_draft_knows_its_target_after_its_vocabulary_has_grown(tmp_path: Path) -> None:
    target = text_model(vocab_size=5000)
    network_for(target).save_pretrained(tmp_path)
    target.resize_token_embeddings(5010)
    quietly(tmp_path, target)


def other_head(model: Any) -> None:
    model.lm_head = nn.Linear(64, 50, bias=False)


def fine_tuned(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter) * parameter.std(correction=0)


OTHERS: dict[str, Callable[[Any], Any]] = {
    "another LM head": other_head,
    "fine-tuned": fine_tuned,
    "another embedding": lambda model: model.get_input_embeddings().weight.data.normal_(),
    "another layer": lambda model: model.model.layers[3].mlp.up_proj.weight.data.mul_(1.1),
}


@pytest.mark.parametrize("how", OTHERS)
def test_a_draft_for_other_weights_is_loaded_with_a_warning(
    how: str, draft: Path, target: PreTrainedModel
) -> None:
    other = copy.deepcopy(target)
    OTHERS[how](other)
    with pytest.warns(UserWarning, match="other weights") as warned:
        loaded = load_draft(draft, other)
    (one,) = warned
    assert one.filename == __file__
    said = str(one.message)
    assert str(draft) in said
    assert "\n" not in said
    assert guesses(loaded, other).shape == (2, 6, 64)


def test_a_draft_that_records_no_target_or_a_broken_one(
    draft: Path, target: PreTrainedModel
) -> None:
    for recorded in (None, "?:?", f"{fingerprint(target)}AAAA", fingerprint(target)[:-5]):
        config_of(draft, target=recorded)
        with pytest.warns(UserWarning, match="other weights"):
            load_draft(draft, target)


def test_a_draft_from_before_values_were_recorded(draft: Path, target: PreTrainedModel) -> None:
    config_of(draft, target=decoder_hash(target))
    quietly(draft, target)
    quietly(draft, copy.deepcopy(target).to(torch.bfloat16))
    with pytest.warns(UserWarning, match=decoder_hash(target)):
        load_draft(draft, text_model(number=9))
    quantised = copy.deepcopy(target)
    quantise_linears(quantised)
    with pytest.warns(UserWarning, match="quantised or offloaded"):
        load_draft(draft, quantised)


UNFIT: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "family": ({"model_type": "llama"}, ("family", "qwen2", "llama")),
    "layers": ({"num_hidden_layers": 4}, ("layers", "5", "4")),
    "width": ({"hidden_size": 32}, ("size", "64", "32")),
    "heads": ({"num_key_value_heads": 4}, ("key-value heads", "2", "4")),
    "vocabulary": ({"vocab_size": 30}, ("vocabulary", "41", "30")),
}


@pytest.mark.parametrize("what", UNFIT)
@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_that_does_not_fit_is_refused(
    what: str, kind: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    network_for(target, **KINDS[kind]).save_pretrained(tmp_path)
    changes, said = UNFIT[what]
    other = text_model(**changes)
    if what == "heads" and kind == "mlp":
        # It has no states of its own.
        with pytest.warns(UserWarning, match="other weights"):
            load_draft(tmp_path, other)
        return
    with pytest.raises(CheckpointError, match="doesn't fit this model") as caught:
        load_draft(tmp_path, other)
    for part in (str(tmp_path), *said):
        assert part in str(caught.value)


def test_heads_of_another_size_are_refused(tmp_path: Path) -> None:
    target = text_model("qwen3", head_dim=16)
    network_for(target).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="heads' size is 16 for the draft and 32 in the"):
        load_draft(tmp_path, text_model("qwen3", head_dim=32))


def test_a_vocabulary_that_was_cut_is_told(draft: Path, target: PreTrainedModel) -> None:
    other = copy.deepcopy(target)
    other.resize_token_embeddings(40)
    with pytest.raises(CheckpointError, match="41 or more for the draft and 40 in the model"):
        load_draft(draft, other)


def test_the_target_does_not_run(tmp_path: Path) -> None:
    # Whoever decodes with the target sees whether it can be split, which takes a pass or two.
    target = text_model(vocab_size=51)
    network_for(target).save_pretrained(tmp_path)
    for layer in target.get_decoder().layers:
        layer.register_forward_pre_hook(lambda *_: pytest.fail("the target ran"))
    assert load_draft(tmp_path, target).cache_layers == 1


def test_adapters_are_passed_over(draft: Path, target: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(target)
    config = peft.LoraConfig(
        target_modules=["q_proj", "down_proj", "lm_head"],
        modules_to_save=["embed_tokens"],
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, config)
    for one in (adapted, model):
        loaded = quietly(draft, one)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
        with adapted.disable_adapter():
            quietly(draft, one)
    assert fingerprint(adapted) == fingerprint(target)
    hashes = {weights_hash(target), weights_hash(adapted)}
    with adapted.disable_adapter():
        hashes.add(weights_hash(adapted))
    assert len(hashes) == 3
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        merge()
        with pytest.warns(UserWarning, match="compared values differ"):
            load_draft(draft, model)


def test_a_quantised_target(draft: Path, target: PreTrainedModel) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(target).to(dtype)
        quantise_linears(model)
        with pytest.warns(UserWarning, match="can't be read, as they are quantised or offloaded"):
            loaded = load_draft(draft, model)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert len(weights_hash(model)) == 16
        # What could not be read when the draft was made isn't compared.
        config_of(draft, target=fingerprint(model))
        quietly(draft, target)
        config_of(draft, target=fingerprint(target))
    model.get_input_embeddings().weight.data.mul_(2)
    with pytest.warns(UserWarning, match="compared values differ"):
        load_draft(draft, model)


def test_a_target_of_whole_numbers(draft: Path, target: PreTrainedModel) -> None:
    class Codes(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.out_features = layer.out_features
            self.weight = nn.Parameter((50 * layer.weight.detach()).char(), requires_grad=False)
            self.bias = layer.bias

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype) / 50, self.bias)

    model: Any = copy.deepcopy(target)
    model.lm_head = Codes(model.lm_head)
    for layer in model.model.layers:
        layer.mlp.up_proj = Codes(layer.mlp.up_proj)
    with pytest.warns(UserWarning, match="can't be read"):
        loaded = load_draft(draft, model)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert len(weights_hash(model)) == 16


def test_an_offloaded_target(draft: Path, target: PreTrainedModel) -> None:
    model = copy.deepcopy(target)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.warns(UserWarning, match="can't be read"):
        loaded = load_draft(draft, model)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert len(weights_hash(model)) == 16


def test_replies_are_told_apart_by_all_weights(target: PreTrainedModel) -> None:
    same = copy.deepcopy(target)
    hashes = {weights_hash(target)}
    assert weights_hash(same) in hashes
    assert weights_hash(same.to(torch.bfloat16).float()) in hashes
    hashes.add(weights_hash(text_model(number=9)))
    names = ("norm.weight", "layers.4.mlp.down_proj.weight", "layers.0.self_attn.q_proj.bias")
    for name in names:
        moved = copy.deepcopy(target)
        moved.get_decoder().get_parameter(name).data.view(-1)[0] += 0.5
        hashes.add(weights_hash(moved))
    other_head(same)
    hashes.add(weights_hash(same))
    assert len(hashes) == 3 + len(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_drafts_that_ship_know_the_model_that_ships(dtype: torch.dtype) -> None:
    model, _ = load_checkpoint(fastvlm_example.MODEL, dtype, "cpu")
    if dtype != torch.float16:
        assert decoder_hash(model) == "70278894d084ece7"  # as releases before record it
    for folder in ("draft", "draft-mlp"):
        loaded = quietly(fastvlm_example.FOLDER / folder, model)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


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
        with pytest.raises(CheckpointError) as caught:
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
