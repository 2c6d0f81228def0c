"""Small models with random weights, and the naive ways to decode with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    PreTrainedModel,
)

from fastvlm.data.questions import Question
from fastvlm.decoding import Engine, Request, SelfSpeculative, Strategy
from fastvlm.decoding.lookup import Lookup
from fastvlm.drafting import DraftLength, FixedLength, ImitationConfig, ImitationNetwork
from fastvlm.drafting.imitation import initialise_from
from fastvlm.language import DecoderInputs, split_decoder
from fastvlm.vision import FastViTHDConfig
from fastvlm.vlm import VisionLanguageModel
from tests.models import LIVELY

SMALL: dict[str, Any] = {
    **{name: value for name, value in LIVELY.items() if name != "model_type"},
    "vocab_size": 97,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-sliding": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "llama-dynamic": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    },
}


def text_model(family: str) -> PreTrainedModel:
    """Return a causal model of a family in float64."""
    torch.manual_seed(5)
    options = {**SMALL, **FAMILIES[family]}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.fixture(scope="session")
def vision_model() -> FastVlmForConditionalGeneration:
    """Return a whole FastVLM with random weights in float64: 4 visual tokens at 128 px."""
    torch.manual_seed(6)
    vision = FastViTHDConfig(
        depths=(1, 1, 1, 1, 1), widths=(8, 16, 32, 32, 32), layer_scale_init=1.0, image_size=128
    )
    config = FastVlmConfig(
        vision_config=vision.to_dict(),
        text_config={**SMALL, "model_type": "qwen2"},
        image_token_id=96,
    )
    model = FastVlmForConditionalGeneration(config).double().eval()
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 0
    return model


def decode(
    model: PreTrainedModel, strategy: Strategy, prompts: list[list[int]], limit: int, **options: Any
) -> list[Request]:
    """Decode prompts of text with the engine, as one batch."""
    requests = [Request(inputs_of(model, p), strategy, limit, **options) for p in prompts]
    finish(Engine(split_decoder(model)), requests)
    return requests


def inputs_of(model: PreTrainedModel, prompt: list[int]) -> DecoderInputs:
    """Return a prompt of text as the decoder takes it."""
    return DecoderInputs(prompt, model.get_input_embeddings()(torch.tensor(prompt)).detach())


def finish(engine: Engine, requests: Iterable[Request]) -> None:
    """Decode requests to their ends; what one of them failed with is raised."""
    for request in engine.run(requests):
        if request.error is not None:
            raise request.error


def generate(model: PreTrainedModel, prompt: list[int], limit: int, **options: Any) -> list[int]:
    """Decode one prompt with transformers' own generate."""
    tokens = torch.tensor([prompt])
    out = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=limit,
        do_sample=False,
        **options,
    )
    return out[0, len(prompt) :].tolist()


def imitation(
    model: PreTrainedModel,
    *,
    kind: str = "block",
    exit_layer: int = 1,
    blocks: int = 1,
    length: DraftLength | None = None,
    perfect: bool = False,
    lookup: Lookup | None = None,
) -> SelfSpeculative:
    """Return self-speculative drafting; a perfect one holds all of the target's other layers."""
    decoder = split_decoder(model)
    config = model.get_decoder().config
    network = ImitationNetwork(
        ImitationConfig(
            kind=kind,
            exit_layer=exit_layer,
            blocks=decoder.depth - exit_layer if perfect else blocks,
            text_config=config.to_dict(),
        )
    )
    network = network.to(decoder.dtype).eval()
    initialise_from(network, list(model.get_decoder().layers))
    return SelfSpeculative(decoder, exit_layer, network, length or FixedLength(4), lookup)


def decoding_acceptance(
    vlm: VisionLanguageModel, questions: Sequence[Question], length: DraftLength
) -> float:
    """Return the share of accepted tokens among those that were compared with the target's.

    What follows a rejected token in its draft was never compared, and does not count.
    """
    assert vlm.network is not None
    exit_layer = vlm.network.config.exit_layer
    strategy = SelfSpeculative(vlm.decoder, exit_layer, vlm.network, length)
    accepted = rejected = 0
    for question in questions:
        image = question.open(vlm.image_size)
        request = vlm.request(question.prompt, image, strategy=strategy, max_new_tokens=160)
        finish(vlm.engine, [request])
        accepted += sum(request.accepted)
        rejected += sum(
            count < proposed
            for count, proposed in zip(request.accepted, request.proposed, strict=True)
        )
    return accepted / (accepted + rejected)
