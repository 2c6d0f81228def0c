"""Images of several prompts in one pass of the encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastvlm.prompts import FastViTHDPromptBuilder, fastvithd
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from tests.decoding.test_prefix import counted
from tests.models import small_vlm


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return small_vlm()


def scenes(*numbers: int, size: int = 128) -> list[Any]:
    return [render(sample(number), size) for number in numbers]


@pytest.mark.parametrize("prefix_bytes", [0, 2**24])
def test_a_batch_goes_through_the_encoder_together(
    vlm: VisionLanguageModel, prefix_bytes: int
) -> None:
    vlm.lru.limit = prefix_bytes
    vlm.lru.clear()
    images = [*scenes(*range(10)), None]
    prompts = [f"What is it? {number}" for number in range(11)]
    with counted(vlm.model.model.vision_tower) as passes:
        found = list(vlm.requests(prompts, images, max_new_tokens=2))
    assert passes == [8, 2]
    for request, prompt, image in zip(found, prompts, images, strict=True):
        alone = vlm.request(prompt, image, cache=False).inputs
        assert request.inputs.token_ids == alone.token_ids
        torch.testing.assert_close(request.inputs.embeddings, alone.embeddings)
        assert (request.inputs.keys is None) == (image is not None and not prefix_bytes)


def test_sizes_repeats_and_what_is_kept(vlm: VisionLanguageModel) -> None:
    vlm.lru.limit = 2**24
    vlm.lru.clear()
    builder = vlm.fastvithd
    one, two, three = scenes(1, 2, 3)
    vlm.request("What?", two, image_size=128)
    shown = [(one, 128), (one, 128), (two, 128), (three, 64), ([one, three], 128)]
    prepared = [builder.prepare(of(image), image_size=size) for image, size in shown]
    with counted(vlm.model.model.vision_tower) as passes:
        found = builder.encoded(prepared, vlm.builder.features)
    # The first once, the second not again; each size in a pass of its own.
    assert passes == [2, 1]
    for inputs, (image, size) in zip(found, shown, strict=True):
        alone = builder.decoder_inputs(of(image), image_size=size)
        torch.testing.assert_close(inputs.embeddings, alone.embeddings)


def of(image: Any) -> Any:
    """Return a question about an image, or several."""
    shown = [
        {"type": "image", "image": one} for one in (image if isinstance(image, list) else [image])
    ]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": "What?"}]}]


def test_large_images_go_alone(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastvithd, "PIXELS_TOGETHER", 2 * 128**2)
    builder: FastViTHDPromptBuilder = vlm.fastvithd
    tiled = [builder.prepare(of(image), image_size=128) for image in scenes(1, 2, 3)]
    with counted(vlm.model.model.vision_tower) as passes:
        builder.encoded(tiled)
        builder.encoded([builder.prepare(of(scenes(4)[0]), image_size=192)] * 2)
    assert passes == [2, 1, 1, 1]


def test_what_is_wrong_with_one_is_its_own(
    vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = scenes(1, 2, 3)
    encode, bad = vlm.model.get_image_features, vlm.fastvithd.prepare(of(second))[1][0]

    def refusing(pixels: Any) -> Any:
        if any(torch.equal(image, bad[0].to(image.dtype)) for image in pixels):
            raise RuntimeError("the encoder fails")
        return encode(pixels)

    monkeypatch.setattr(vlm.model, "get_image_features", refusing)
    images = [first, second, "no-such-file.png", third]
    found = vlm.generate_batch(["What?"] * 4, images, max_new_tokens=3, cache=False)
    assert [bool(reply.error) for reply in found] == [False, True, True, False]
    assert "the encoder fails" in str(found[1].error)
    monkeypatch.undo()
    for reply, image in ((found[0], first), (found[3], third)):
        alone = vlm.generate("What?", image, max_new_tokens=3, cache=False)
        assert reply.token_ids == alone.token_ids
