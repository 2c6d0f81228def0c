"""Models that change between two replies, and drafts for models that are not as they were made."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import PreTrainedModel

import fastvlm
from fastvlm.custom_generate import Speculative
from fastvlm.drafting import ImitationConfig, ImitationNetwork
from fastvlm.drafting.fingerprint import fingerprint
from fastvlm.drafting.imitation import initialise_from
from fastvlm.language import split_decoder
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from tests.families import FAMILIES, NEWER, Inputs
from tests.language.test_placement import Int8Linear, quantise
from tests.models import IMAGE_SIZE, small_vlm

LIMIT = 14


def draft_for(model: PreTrainedModel) -> ImitationNetwork:
    """Return a draft with a vocabulary of its own, so that it cuts rows of the LM head."""
    decoder = split_decoder(model)
    network = ImitationNetwork(
        ImitationConfig(
            kind="block",
            exit_layer=1,
            blocks=2,
            text_config=decoder.decoder.config.to_dict(),
            target=fingerprint(model),
            draft_vocabulary_size=80,
            num_speculative_tokens=4,
            confidence=0,
        )
    )
    initialise_from(network, decoder.layers)
    assert network.draft_vocabulary is not None
    network.draft_vocabulary.copy_(torch.arange(3, 83))
    return network.to(decoder.dtype).eval()


def lora(model: Any, *targets: str) -> Any:
    """Return a model with adapters that change its replies."""
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=list(targets))
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return adapted.eval()


def resized(model: PreTrainedModel) -> Any:
    torch.manual_seed(4)
    model.resize_token_embeddings(110, mean_resizing=False)
    return model


def doubled(model: PreTrainedModel) -> Any:
    with torch.no_grad():
        for parameter in model.get_decoder().parameters():
            # As some libraries merge adapters, which leaves no trace.
            parameter.data += 0.3 * torch.randn_like(parameter.data)
    return model


CHANGES: dict[str, Callable[[Any], Any]] = {
    "resized": resized,
    "adapter on the head": lambda model: lora(model, "lm_head"),
    "adapter on the layers": lambda model: lora(model, "q_proj", "down_proj"),
    "merged": lambda model: lora(model, "lm_head", "v_proj", "up_proj").merge_and_unload(),
    "float32": lambda model: model.float(),
    "other weights": doubled,
}


def generated(model: Any, inputs: Inputs, method: Any = None) -> torch.Tensor:
    dtype = model.get_input_embeddings().weight.dtype
    given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}
    out: torch.Tensor = model.generate(
        **given, max_new_tokens=LIMIT, do_sample=False, eos_token_id=None, custom_generate=method
    )
    return out


@pytest.mark.parametrize(
    ("family", "change"),
    [
        *product(["llama", "llava"], CHANGES),
        *product(["gemma3", "qwen3-vl", "mllama", "t5gemma"], ["adapter on the layers"]),
        ("gemma3", "adapter on the head"),
        ("qwen3-vl", "resized"),
    ],
)
def test_one_speculative_object_decodes_a_model_as_it_is(family: str, change: str) -> None:
    model, inputs = {**FAMILIES, **NEWER}[family]()
    given = inputs(2)
    methods = [fastvlm.speculative(draft_for(model)), fastvlm.speculative(strategy="early-exit")]
    before = generated(model, given)
    for method in methods:
        assert torch.equal(generated(model, given, method), before)
    model = CHANGES[change](model)
    expected = generated(model, given)
    if change != "float32":
        assert not torch.equal(expected, before)
    for method in methods:
        assert torch.equal(generated(model, given, method), expected)


def test_autocast_around_calls() -> None:
    model, inputs = FAMILIES["llama"]()
    given, method = inputs(2), fastvlm.speculative(draft_for(model.float()))
    plain = generated(model, given, method)
    assert torch.equal(plain, generated(model, given))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = generated(model, given, method)
    # In bfloat16 passes of several tokens round otherwise; what is asked is that it decodes.
    assert mixed.shape == plain.shape
    assert torch.equal(generated(model, given, method), plain)


def changes_of_a_vlm() -> dict[str, Callable[[VisionLanguageModel], Any]]:
    def attach(vlm: VisionLanguageModel) -> Any:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        torch.manual_seed(5)
        vlm.model.add_adapter(config)
        for name, parameter in vlm.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)

    def edit(vlm: VisionLanguageModel) -> Any:
        for layer in vlm.decoder.layers:
            layer.mlp.down_proj.weight.data *= -1

    def replace(vlm: VisionLanguageModel) -> Any:
        head = copy.deepcopy(vlm.model.lm_head)
        nn.init.normal_(head.weight, std=0.5)
        vlm.model.lm_head = head

    return {"an adapter": attach, "weights": edit, "the head": replace}


@pytest.mark.parametrize("change", changes_of_a_vlm())
def test_what_is_kept_of_a_prompt_is_that_of_the_model_as_it_is(change: str) -> None:
    vlm = small_vlm()
    question, image = "Describe the scene.", render(sample(4), IMAGE_SIZE)

    def reply() -> list[int]:
        return vlm.generate(question, image, max_new_tokens=12).token_ids

    before = reply()
    assert vlm.lru.nbytes
    assert reply() == before
    changes_of_a_vlm()[change](vlm)
    vlm.model.eval()
    fresh = VisionLanguageModel(vlm.model, vlm.tokenizer, prefix_bytes=0)
    expected = fresh.generate(question, image, max_new_tokens=12).token_ids
    assert expected != before
    assert reply() == expected
    if change == "an adapter":
        vlm.model.disable_adapters()
        assert reply() == before
        vlm.model.enable_adapters()
        assert reply() == expected


@pytest.mark.parametrize("how", ["quantised", "offloaded", "adapter", "bfloat16"])
def test_a_draft_with_a_vocabulary_drafts_whatever_holds_the_head(how: str, tmp_path: Path) -> None:
    model, inputs = FAMILIES["llama"]()
    draft_for(model).save_pretrained(tmp_path)
    given = inputs(2)
    if how == "quantised":
        quantise(model.get_decoder())
        model.lm_head = Int8Linear(model.lm_head)
    elif how == "offloaded":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif how == "adapter":
        model = lora(model, "lm_head", "o_proj")
    else:
        model = model.bfloat16()
    if how == "bfloat16":
        given = {n: v for n, v in given.items() if not v.is_floating_point()}
    base = model.get_base_model() if how == "adapter" else model

    def decoded(method: Speculative | None) -> torch.Tensor:
        out: torch.Tensor = model.generate(
            **given, max_new_tokens=LIMIT, do_sample=False, eos_token_id=None,
            custom_generate=method,
        )  # fmt: skip
        return out

    expected = decoded(None)
    method = fastvlm.speculative(tmp_path)
    with warnings.catch_warnings():
        # That some weights may be others is a warning.
        warnings.simplefilter("ignore")
        found = decoded(method)
    assert method.target(base).strategy.name == "cascade"
    if how != "bfloat16":
        assert torch.equal(found, expected)
    assert found.shape == expected.shape
