"""`custom_generate=fastvlm.speculative(...)`: everything that `generate` prepares is honoured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TextIteratorStreamer, set_seed
from transformers.generation import logits_process as processing
from transformers.generation.stopping_criteria import (
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

import fastvlm
from fastvlm.drafting import ImitationConfig, ImitationNetwork
from fastvlm.drafting.fingerprint import fingerprint
from fastvlm.drafting.imitation import initialise_from
from fastvlm.functional.errors import CheckpointError, InputError
from fastvlm.language import split_decoder
from tests.families import FAMILIES, NEWER, Inputs
from tests.models import small_vlm

LIMIT = 14


def block(model: PreTrainedModel) -> ImitationNetwork:
    """Return a draft that is sometimes right."""
    decoder = split_decoder(model)
    torch.manual_seed(2)
    config = ImitationConfig(
        kind="block",
        exit_layer=1,
        blocks=2,
        text_config=decoder.decoder.config.to_dict(),
        target=fingerprint(model),
        num_speculative_tokens=4,
        confidence=0,
    )
    network = ImitationNetwork(config)
    initialise_from(network, decoder.layers)
    return network.implement_as(decoder.decoder.config).to(decoder.dtype).eval()


@pytest.fixture(scope="module")
def llava() -> tuple[PreTrainedModel, Inputs]:
    model, inputs = FAMILIES["llava"]()
    return model, inputs(3)


def both(model: PreTrainedModel, inputs: Inputs, method: Any, **options: Any) -> tuple[Any, Any]:
    """Return what `generate` gives ordinarily, and with our decoding method."""
    options = {"max_new_tokens": LIMIT, "do_sample": False, **options}
    return model.generate(**inputs, **options), model.generate(
        **inputs, **options, custom_generate=method
    )


@contextmanager
def drafts(method: Any, model: PreTrainedModel) -> Iterator[list[int]]:
    """Collect how many tokens each draft has."""
    strategy, found = method.target(model).strategy, []
    ordinary = type(strategy).draft

    def draft(self: Any, *args: Any) -> Any:
        made = ordinary(self, *args)
        found.append(sum(map(len, made.rows)))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(strategy), "draft", draft)
        yield found


def assert_sooner(model: PreTrainedModel, inputs: Inputs, method: Any) -> int:
    """Hold a batch against `generate`'s; return how many tokens were drafted."""
    with drafts(method, model) as proposed:
        ordinary, sooner = both(model, inputs, method)
    assert torch.equal(ordinary, sooner)
    return sum(proposed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_user_changes_one_argument(family: str) -> None:
    model, inputs = FAMILIES[family]()
    for method in (fastvlm.speculative(block(model)), fastvlm.speculative()):
        drafted = [assert_sooner(model, inputs(rows), method) for rows in (1, 3)]
        assert sum(drafted) > 0


@pytest.mark.parametrize("family", NEWER)
def test_a_user_changes_one_argument_for_newer_families(family: str) -> None:
    model, inputs = NEWER[family]()
    assert_sooner(model, inputs(1), fastvlm.speculative())
    assert assert_sooner(model, inputs(4), fastvlm.speculative(block(model))) > 0


def test_a_draft_is_loaded_from_its_directory(
    llava: tuple[PreTrainedModel, Inputs], tmp_path: Path
) -> None:
    model, inputs = llava
    block(model).save_pretrained(tmp_path / "draft")
    ordinary, sooner = both(model, inputs, fastvlm.speculative(tmp_path / "draft"))
    assert torch.equal(ordinary, sooner)
    other, given = FAMILIES["llama"]()
    with pytest.warns(UserWarning, match="other weights"):
        ordinary, sooner = both(other, given(1), fastvlm.speculative(tmp_path / "draft"))
    assert torch.equal(ordinary, sooner)
    other, given = FAMILIES["qwen2.5-vl"]()
    with pytest.raises(CheckpointError, match="doesn't fit this model"):
        both(other, given(1), fastvlm.speculative(tmp_path / "draft"))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": [[5], [7, 8]]},
        {"suppress_tokens": [3, 9, 11]},
        {"min_new_tokens": 10},
        {"forced_eos_token_id": 1},
        {"exponential_decay_length_penalty": (3, 1.6)},
        {"eos_token_id": [1, 20, 30, 40]},
        {"num_return_sequences": 1, "length_penalty": 2.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_logits_processors_see_what_generate_shows_them(
    llava: tuple[PreTrainedModel, Inputs], options: dict[str, Any]
) -> None:
    model, inputs = llava
    plain = model.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
    for method in (fastvlm.speculative(block(model)), fastvlm.speculative()):
        ordinary, sooner = both(model, inputs, method, **options)
        assert torch.equal(ordinary, sooner)
    if not options.keys() & {"length_penalty", "min_new_tokens"}:
        assert ordinary.shape != plain.shape or not torch.equal(ordinary, plain)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8])
def test_the_limit_is_exact_inside_a_draft(
    llava: tuple[PreTrainedModel, Inputs], limit: int
) -> None:
    model, inputs = llava
    options = {"max_new_tokens": limit, "eos_token_id": None}
    ordinary, sooner = both(model, inputs, fastvlm.speculative(block(model)), **options)
    assert torch.equal(ordinary, sooner)
    assert sooner.shape[1] == inputs["input_ids"].shape[1] + limit


class Sum(StoppingCriteria):
    """Ends a row whose last two tokens have an even sum: a user's own criterion."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        return (input_ids[:, -1] + input_ids[:, -2]) % 4 == 0


def test_a_users_stopping_criterion_is_asked_after_each_token(
    llava: tuple[PreTrainedModel, Inputs],
) -> None:
    model, inputs = llava
    options = {"stopping_criteria": StoppingCriteriaList([Sum()]), "max_new_tokens": 40}
    ordinary, sooner = both(model, inputs, fastvlm.speculative(block(model)), **options)
    assert torch.equal(ordinary, sooner)
    assert sooner.shape[1] < inputs["input_ids"].shape[1] + 40


def test_stop_strings_and_streamers_work_as_ever() -> None:
    vlm = small_vlm()
    tokens = torch.tensor([vlm.tokens("Describe the picture.", 0)])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    method = fastvlm.speculative(strategy="early-exit", num_speculative_tokens=5)
    whole, sooner = both(vlm.model, inputs, method, max_new_tokens=30)
    assert torch.equal(whole, sooner)
    text = vlm.tokenizer.decode(whole[0, tokens.shape[1] :], skip_special_tokens=True)
    stop = StopStringCriteria(vlm.tokenizer, [text[len(text) // 2 :][:3]])
    ordinary, sooner = both(
        vlm.model, inputs, method, max_new_tokens=30, stopping_criteria=StoppingCriteriaList([stop])
    )
    assert torch.equal(ordinary, sooner)
    assert sooner.shape[1] < whole.shape[1]
    streamer = TextIteratorStreamer(
        vlm.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True
    )
    options = {**inputs, "max_new_tokens": 30, "do_sample": False, "streamer": streamer}
    thread = Thread(target=vlm.model.generate, kwargs={**options, "custom_generate": method})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == text
    assert len(pieces) > 2


def test_a_dictionary_holds_scores_and_logits(llava: tuple[PreTrainedModel, Inputs]) -> None:
    model, inputs = llava
    options = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.3,
        "eos_token_id": None,
    }
    ordinary, sooner = both(model, inputs, fastvlm.speculative(block(model)), **options)
    assert type(ordinary) is type(sooner)
    assert torch.equal(ordinary.sequences, sooner.sequences)
    for one, other in ((ordinary.scores, sooner.scores), (ordinary.logits, sooner.logits)):
        assert len(one) == len(other) == LIMIT
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


def test_a_seed_reproduces_samples(llava: tuple[PreTrainedModel, Inputs]) -> None:
    model, inputs = llava
    method = fastvlm.speculative(block(model))

    def sample(seed: int) -> Tensor:
        set_seed(seed)
        return model.generate(
            **inputs, max_new_tokens=LIMIT, do_sample=True, top_p=0.9, custom_generate=method
        )

    assert torch.equal(sample(1), sample(1))
    first, other = sample(1), sample(2)
    assert first.shape != other.shape or not torch.equal(first, other)


class Growing(processing.LogitsProcessor):
    """Forbids more tokens at each call: it remembers how often it was called."""

    def __init__(self, how: str) -> None:
        self.how, self.seen = how, Counter() if how == "counter" else None
        self.inner = Remembering()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        last = int(input_ids[0, -1]) % 7
        if self.how == "counter":
            self.seen[last] += 1
            calls = self.seen.total()
        elif self.how == "nothing at first":
            self.seen = scores[0, :1] * 0 + 1 if self.seen is None else self.seen + 1
            calls = int(self.seen)
        elif self.how == "an object below":
            calls = self.inner.call()
        else:
            with self.inner.lock:
                calls = self.inner.call()
        scores[:, calls % 40 : calls % 40 + 30 + int(input_ids[:, -2].sum()) % 5] = -torch.inf
        return scores


class Remembering:
    """What can't be copied."""

    def __init__(self) -> None:
        self.calls, self.lock = 0, Lock()

    def call(self) -> int:
        self.calls += 1
        return self.calls


@pytest.mark.parametrize("how", ["counter", "nothing at first", "an object below", "a lock"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_processor_that_may_remember_decodes_without_drafts(
    llava: tuple[PreTrainedModel, Inputs], how: str, rows: int
) -> None:
    model, inputs = llava
    given = {name: value[:rows] for name, value in inputs.items()}
    method = fastvlm.speculative(block(model))

    def generated(**options: Any) -> Tensor:
        processors = processing.LogitsProcessorList([Growing(how)])
        return model.generate(
            **given, max_new_tokens=LIMIT, do_sample=False, logits_processor=processors, **options
        )

    expected = generated()
    with drafts(method, model) as proposed, pytest.warns(UserWarning, match="Growing"):
        found = generated(custom_generate=method)
    assert torch.equal(found, expected)
    assert not proposed


def penalise_even(input_ids: Tensor, scores: Tensor) -> Tensor:
    bias = torch.zeros_like(scores)
    bias[:, ::2] = -4.0 * (int(input_ids[:, -2:].sum()) % 3)
    return scores + bias


def test_a_processor_that_says_it_is_stateless_is_used_with_drafts(
    llava: tuple[PreTrainedModel, Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = llava
    given = {name: value[:1] for name, value in inputs.items()}
    method = fastvlm.speculative(block(model))
    processors = processing.LogitsProcessorList([penalise_even])
    with pytest.warns(UserWarning, match="penalise_even"):
        both(model, given, method, logits_processor=processors)
    monkeypatch.setattr(penalise_even, "stateless", True, raising=False)
    with drafts(method, model) as proposed:
        ordinary, sooner = both(model, given, method, logits_processor=processors)
    assert torch.equal(ordinary, sooner)
    assert sum(proposed) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_allowed_tokens_fn": lambda row, _: [row + 4, row + 9, 20]},
        {"encoder_repetition_penalty": 1.2},
    ],
    ids=["by row", "encoder"],
)
def test_what_treats_rows_in_their_own_ways_decodes_without_drafts(
    llava: tuple[PreTrainedModel, Inputs], options: dict[str, Any]
) -> None:
    model, inputs = llava
    with pytest.warns(UserWarning, match="without drafts"):
        ordinary, sooner = both(model, inputs, fastvlm.speculative(block(model)), **options)
    assert torch.equal(ordinary, sooner)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_beams": 3}, "num_beams"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "hidden states"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
    ],
    ids=["beams", "hidden states", "another method"],
)
def test_what_can_not_be_exact_is_refused(
    llava: tuple[PreTrainedModel, Inputs], options: dict[str, Any], told: str
) -> None:
    model, inputs = llava
    given = {name: value[:1] for name, value in inputs.items()}
    with pytest.raises(InputError, match=told):
        model.generate(**given, max_new_tokens=5, custom_generate=fastvlm.speculative(), **options)


class LastScore(StoppingCriteria):
    """Ends a row where the best score has grown, after a few tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        assert len(scores) > 0
        grown = len(scores) > 4 and bool(scores[-1].max() > scores[-2].max())
        return torch.full((len(input_ids),), grown)


def test_a_stopping_criterion_reads_the_scores(llava: tuple[PreTrainedModel, Inputs]) -> None:
    model, inputs = llava
    given = {name: value[:1] for name, value in inputs.items()}
    options = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "stopping_criteria": StoppingCriteriaList([LastScore()]),
        "repetition_penalty": 1.3,
        "max_new_tokens": 30,
        "eos_token_id": None,
    }
    ordinary, sooner = both(model, given, fastvlm.speculative(block(model)), **options)
    assert torch.equal(ordinary.sequences, sooner.sequences)
    assert given["input_ids"].shape[1] + 1 < sooner.sequences.shape[1]
    assert sooner.sequences.shape[1] < given["input_ids"].shape[1] + 30


def test_a_streamer_gets_each_token_once_whichever_row_ends_first(
    llava: tuple[PreTrainedModel, Inputs],
) -> None:
    model, inputs = llava
    plain = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)
    start = inputs["input_ids"].shape[1]
    # A token that ends the first row early, and the others later or never.
    end = int(plain[0, start + 2])

    class Noted(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = 0

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist() if value.dim() < 2 else []

        def end(self) -> None:
            self.ended += 1

    streamer = Noted()
    found = model.generate(
        **inputs, max_new_tokens=20, do_sample=False, eos_token_id=end, streamer=streamer,
        custom_generate=fastvlm.speculative(block(model)),
    )  # fmt: skip
    row = found[0, start:].tolist()
    assert streamer.tokens == row[: row.index(end) + 1]
    assert streamer.ended == 1


def test_set_seed_decides_what_is_drawn(llava: tuple[PreTrainedModel, Inputs]) -> None:
    model, inputs = llava
    ways = [
        fastvlm.speculative(block(model)),
        fastvlm.speculative(),
        fastvlm.speculative(strategy="autoregressive"),
        fastvlm.speculative(block(model), num_speculative_tokens=2),
    ]
    found = []
    for method in ways:
        for _ in range(2):
            set_seed(3)
            found.append(
                model.generate(
                    **inputs, max_new_tokens=LIMIT, do_sample=True, eos_token_id=None,
                    custom_generate=method,
                )
            )  # fmt: skip
    assert all(torch.equal(found[0], other) for other in found)
    # Equal prompts in a batch are drawn each for itself.
    same = {name: value[:1].repeat(3, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    rows = model.generate(**same, max_new_tokens=LIMIT, do_sample=True, custom_generate=ways[0])
    assert len({*map(tuple, rows.tolist())}) == 3


def test_one_object_serves_many_threads(llava: tuple[PreTrainedModel, Inputs]) -> None:
    model, inputs = llava
    method = fastvlm.speculative(block(model))
    rows = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(3)]
    expected = [model.generate(**row, max_new_tokens=LIMIT, do_sample=False) for row in rows]

    def work(number: int) -> list[bool]:
        return [
            torch.equal(
                model.generate(
                    **rows[index % 3], max_new_tokens=LIMIT, do_sample=False,
                    # Beside it, transformers' own.
                    custom_generate=None if (index + number) % 4 == 3 else method,
                ),
                expected[index % 3],
            )
            for index in range(10)
        ]  # fmt: skip

    with ThreadPoolExecutor(4) as pool:
        assert [all(found) for found in pool.map(work, range(4))] == [True] * 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_assistant_tokens": 3}, "num_assistant_tokens"),
        ({"exit_layer": 1}, "exit_layer"),
        ({"strategy": "lookup"}, "lookup"),
    ],
)
def test_options_that_nobody_takes_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        fastvlm.speculative(**options)
