"""Features of images are kept by their digests, for one thread at a time, and bounded in bytes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fastvlm.decoding.prefix_cache import PrefixCache, PrefixEntry
from fastvlm.functional.lru import LruBytes
from fastvlm.language import capture_decoder_inputs
from fastvlm.prompts.features import ImageFeatureCache, digest
from tests.families import FAMILIES, replies


def cache(limit: int = 2**20) -> ImageFeatureCache:
    return ImageFeatureCache(LruBytes(limit))


def attributes(model: nn.Module) -> dict[str, list[str]]:
    return {name: sorted(vars(part)) for name, part in model.named_modules()}


def test_features_by_their_digests() -> None:
    kept = cache()
    one, several = torch.zeros(4, 8), [torch.zeros(2, 8), torch.zeros(3, 8)]
    assert kept.get("one") is None
    assert kept.put("one", one)
    assert kept.put("several", several)
    assert kept.get("one") is one
    assert kept.get("several") is several
    assert kept.lru.nbytes == 4 * 8 * (4 + 2 + 3)


def test_what_is_too_large_drops_no_other() -> None:
    kept = cache(limit=4 * 8 * 4)
    assert kept.put("one", torch.zeros(4, 8))
    assert not kept.put("other", torch.zeros(5, 8))
    assert kept.get("one") is not None
    assert kept.get("other") is None


def test_two_models_and_their_prefixes_share_a_limit() -> None:
    lru = LruBytes(1000)
    one, other, prefixes = ImageFeatureCache(lru), ImageFeatureCache(lru), PrefixCache(lru)
    one.put("image", torch.zeros(4, 8))
    assert other.get("image") is None
    entry = PrefixEntry(["image"], {0: torch.zeros(2, 1, 1, 4)})
    assert prefixes.put(["image"], entry.nbytes, lambda: entry)
    assert prefixes.match(["image"]).entry is entry
    assert one.get("image").shape == (4, 8)
    assert lru.nbytes == 4 * 8 * 4 + entry.nbytes
    # What was used longest ago makes room, of either kind.
    prefixes.match(["image"])
    other.put("another", torch.zeros(27, 8))
    assert one.get("image") is None
    assert prefixes.match(["image"]).entry is entry


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.float64)),
        (torch.zeros(4), torch.tensor([0.0, 0, 0, 1])),
        ([torch.zeros(4), torch.zeros(4)], [torch.zeros(8)]),
        ([torch.zeros(4)], torch.zeros(4)),
        ((1, "a"), (1, "b")),
        (None, False),
    ],
)
def test_digests_differ(one: object, other: object) -> None:
    assert digest(one) != digest(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_the_digest_of_a_tensor_is_that_of_its_values(dtype: torch.dtype) -> None:
    value = torch.arange(12).view(3, 4).to(dtype)
    assert digest(value) == digest(value.clone().t().contiguous().t())


@pytest.mark.parametrize("family", ["llava", "llava-next", "qwen2.5-vl", "blip2-opt", "smolvlm"])
def test_what_is_asked_again_is_answered(family: str) -> None:
    model, inputs = FAMILIES[family]()
    kept, given = cache(), inputs(2)
    [one, other] = capture_decoder_inputs(model, given)
    before = attributes(model)
    seen = []
    for _ in range(2):
        with kept.patched(model) as asked:
            found = capture_decoder_inputs(model, given)
        seen.append(asked)
        torch.testing.assert_close(found[0].embeddings, one.embeddings)
        torch.testing.assert_close(found[1].embeddings, other.embeddings)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 1
    assert len(kept.lru) == 1
    assert attributes(model) == before
    given["pixel_values"] = given["pixel_values"] + 1
    with kept.patched(model) as asked:
        capture_decoder_inputs(model, given)
    assert asked != seen[0]


def test_a_model_that_never_asks_is_left_alone() -> None:
    model, inputs = FAMILIES["llama"]()
    with cache().patched(model) as asked:
        capture_decoder_inputs(model, inputs(1))
    assert asked == []


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "blip2-opt"])
def test_threads_that_keep_features_beside_threads_that_generate(family: str) -> None:
    model, inputs = FAMILIES[family]()
    rows = {number: inputs(number) for number in (1, 2, 3)}
    expected = {number: capture_decoder_inputs(model, given) for number, given in rows.items()}
    generated = replies(model, rows[2], 6)
    before = attributes(model)
    kept = cache()
    begin = threading.Barrier(4)

    def capturing(number: int) -> set[str]:
        begin.wait(timeout=60)
        names = set()
        for _ in range(8):
            with kept.patched(model) as asked:
                found = capture_decoder_inputs(model, rows[number])
            for ours, other in zip(found, expected[number], strict=True):
                assert torch.equal(ours.embeddings, other.embeddings)
            names.update(asked)
        return names

    def generating() -> None:
        begin.wait(timeout=60)
        for _ in range(3):
            assert replies(model, rows[2], 6) == generated

    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(capturing, number) for number in rows]
        other = pool.submit(generating)
        digests = [task.result(timeout=120) for task in tasks]
        other.result(timeout=120)
    # Each thread asked for its own images, and `generate` for none of ours.
    assert [len(names) for names in digests] == [1, 1, 1]
    assert len(set.union(*digests)) == 3
    assert len(kept.lru) == 3
    assert attributes(model) == before
