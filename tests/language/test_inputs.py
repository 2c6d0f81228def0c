"""A model prepares its own prompt, is stopped at its decoder, and is left as it was."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fastvlm.decoding import Autoregressive
from fastvlm.functional.errors import InputError
from fastvlm.language import DecoderInputs, capture_decoder_inputs, split_decoder
from fastvlm.language.decoder import cache_name
from fastvlm.language.decoder_inputs import UNKNOWN_TOKEN
from fastvlm.language.generator import end_tokens
from fastvlm.language.structure import text_decoder
from tests.families import END, FAMILIES, IMAGE, QUERIES, START, Inputs, replies
from tests.language.decoding import LIMIT, decode

COMPOSITE = [name for name in FAMILIES if name.startswith(("blip2", "instructblip"))]


def assert_same(
    found: list[DecoderInputs], expected: list[DecoderInputs], *, tokens: bool = True
) -> None:
    assert len(found) == len(expected)
    for ours, other in zip(found, expected, strict=True):
        if tokens:
            assert ours.token_ids == other.token_ids
        torch.testing.assert_close(ours.embeddings, other.embeddings)
        for mine, its in (
            (ours.position_ids, other.position_ids),
            (ours.encoder_states, other.encoder_states),
        ):
            assert (mine is None) == (its is None)
            if mine is not None:
                torch.testing.assert_close(mine, its)


def padded_right(inputs: Inputs) -> Inputs:
    """Move the padding of prompts to their ends."""
    order = inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
    length = order.shape[1]
    return {
        name: value.gather(1, order)
        if name in {"input_ids", "attention_mask", "mm_token_type_ids"} and value.shape[1] == length
        else value
        for name, value in inputs.items()
    }


def caught_in_generate(model: PreTrainedModel, inputs: Inputs) -> list[DecoderInputs]:
    """Return what is captured where a custom decoding method of `generate` is called."""
    found = []

    def decoding(model: Any, input_ids: Tensor, **named: Any) -> Tensor:
        for name in ("logits_processor", "stopping_criteria", "generation_config"):
            named.pop(name, None)
        first = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **named)
        found.extend(capture_decoder_inputs(model, first))
        return input_ids

    model.generate(**inputs, custom_generate=decoding, max_new_tokens=3, do_sample=False)
    return found


def hooks(model: PreTrainedModel) -> int:
    return sum(
        len(part._forward_pre_hooks) + len(part._forward_hooks) + len(part._backward_hooks)
        for part in model.modules()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_left_as_it_was(family: str) -> None:
    model, inputs = FAMILIES[family]()
    given = inputs(2)
    before, values = replies(model, given, 6), {n: v.clone() for n, v in given.items()}
    attached, state = hooks(model), {n: list(vars(m)) for n, m in model.named_modules()}
    offsets = getattr(model.base_model, "rope_deltas", None)
    first, second = capture_decoder_inputs(model, given), capture_decoder_inputs(model, given)
    assert_same(first, second)
    assert hooks(model) == attached
    assert {n: list(vars(m)) for n, m in model.named_modules()} == state
    assert getattr(model.base_model, "rope_deltas", None) is offsets
    assert given.keys() == values.keys()
    assert all(torch.equal(given[name], values[name]) for name in given)
    assert replies(model, given, 6) == before


@pytest.mark.filterwarnings("ignore:The rows are padded on the right")
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_are_what_they_are_alone(family: str) -> None:
    model, inputs = FAMILIES[family]()
    [alone] = capture_decoder_inputs(model, inputs(1))
    given = inputs(4)
    together = capture_decoder_inputs(model, given)
    assert len(together) == 4
    assert_same(together[:1], [alone])
    assert_same(capture_decoder_inputs(model, padded_right(given)), together)
    if alone.encoder_states is None:
        lengths = given["attention_mask"].sum(1).tolist()
        assert [len(prompt.token_ids) for prompt in together] == lengths
        assert [len(prompt.embeddings) for prompt in together] == lengths
    else:
        assert all(prompt.token_ids == [0] for prompt in together)
        lengths = given["attention_mask"].sum(1).tolist()
        assert [len(prompt.encoder_states) for prompt in together] == lengths


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_the_one_of_generate(family: str) -> None:
    model, inputs = FAMILIES[family]()
    given = inputs(3)
    # BLIP-2 calls `generate` of the language model in it, with embeddings.
    assert_same(
        caught_in_generate(model, given),
        capture_decoder_inputs(model, given),
        tokens=family not in COMPOSITE,
    )


def test_tokens_of_embeddings_are_unknown() -> None:
    model, inputs = FAMILIES["blip2-opt"]()
    [prompt] = caught_in_generate(model, inputs(1))
    assert prompt.token_ids == [UNKNOWN_TOKEN] * len(prompt.embeddings)


@pytest.mark.parametrize("family", ["blip2-opt", "blip2-t5"])
def test_blip2_describes_an_image_without_being_asked(family: str) -> None:
    model, inputs = FAMILIES[family]()
    model.config.text_config.bos_token_id = START
    given = {"pixel_values": inputs(2)["pixel_values"]}
    found = capture_decoder_inputs(model, given)
    assert_same(caught_in_generate(model, given), found, tokens=False)
    if family == "blip2-opt":
        assert [prompt.token_ids for prompt in found] == [[IMAGE] * QUERIES + [START]] * 2


def test_positions_in_three_axes() -> None:
    model, inputs = FAMILIES["qwen2.5-vl"]()
    given = inputs(4)
    table, _ = model.model.get_rope_index(
        **{name: given[name] for name in given if name != "pixel_values"}
    )
    for row, prompt in enumerate(capture_decoder_inputs(model, given)):
        own = given["attention_mask"][row].bool()
        assert torch.equal(prompt.position_ids, table[:, row, own])
        assert not torch.equal(prompt.position_ids[1], prompt.position_ids[2])


def test_a_question_without_an_image_has_ordinary_positions() -> None:
    model, inputs = FAMILIES["qwen2.5-vl"]()
    asked = inputs(2)
    capture_decoder_inputs(model, asked)
    tokens = torch.tensor([[5, 6, 7, 8], [0, 9, 10, 11]])
    found = capture_decoder_inputs(
        model, {"input_ids": tokens, "attention_mask": (tokens > 0).long()}
    )
    assert [prompt.position_ids for prompt in found] == [None, None]


def test_a_filled_cache_is_refused() -> None:
    model, inputs = FAMILIES["llama"]()
    given = inputs(1)
    name = cache_name(model)
    filled = model(**given, **{name: DynamicCache()})[name]
    with pytest.raises(InputError, match="from 5 positions"):
        capture_decoder_inputs(model, {**given, name: filled})
    assert capture_decoder_inputs(model, {**given, name: DynamicCache()})


@pytest.mark.parametrize("positions", [[3, 4, 5, 6, 7], [0, 1, 7, 8, 20], [0, 0, 1, 1, 2]])
def test_positions_are_taken_as_they_are(positions: list[int]) -> None:
    model, inputs = FAMILIES["llama"]()
    given = {**inputs(1), "position_ids": torch.tensor([positions])}
    decoder = split_decoder(model)
    found = decode(decoder, Autoregressive(), capture_decoder_inputs(model, given))
    assert [request.output_token_ids for request in found] == replies(model, given, LIMIT)


@pytest.mark.parametrize(
    ("family", "positions"), [("opt-350m", [3, 4, 5, 6, 7]), ("llama", [0, 1, 2, 3, 2])]
)
def test_other_positions_are_refused(family: str, positions: list[int]) -> None:
    """OPT counts positions by itself, and a reply goes on from the last, not from the greatest."""
    model, inputs = FAMILIES[family]()
    with pytest.raises(InputError, match="Leave out position_ids"):
        capture_decoder_inputs(model, {**inputs(1), "position_ids": torch.tensor([positions])})


def test_an_error_of_the_model_leaves_nothing_behind() -> None:
    model, inputs = FAMILIES["llava"]()
    given = inputs(1)
    # transformers attaches hooks of its own when a model first asks its tower for hidden states.
    capture_decoder_inputs(model, given)
    before = hooks(model)
    given["pixel_values"] = given["pixel_values"][:, :1]
    with pytest.raises(RuntimeError):
        capture_decoder_inputs(model, given)
    assert hooks(model) == before
    assert "forward" not in vars(text_decoder(model))


def test_a_mask_of_more_than_padding_is_refused() -> None:
    model, inputs = FAMILIES["llama"]()
    given = inputs(1)
    given["attention_mask"] = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    with pytest.raises(InputError, match=r"\(1, 5\) tokens are padding; got \(1, 1, 5, 5\)"):
        capture_decoder_inputs(model, given)


def test_padding_on_the_right_is_warned_of() -> None:
    model, inputs = FAMILIES["llava"]()
    with pytest.warns(UserWarning, match="padded on the right"):
        capture_decoder_inputs(model, padded_right(inputs(4)))


def handing(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    """Make a model hand its decoder more arguments."""
    decoder = text_decoder(model)
    call = type(decoder).__call__

    def extended(module: Any, *args: Any, **kwargs: Any) -> Any:
        return call(module, *args, **{**kwargs, **(more if module is decoder else {})})

    monkeypatch.setattr(type(decoder), "__call__", extended)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_type_ids", torch.zeros(1, 5, dtype=torch.long)),
        ("is_causal", False),
        ("something", "new"),
        ("cache_position", torch.arange(1, 6)),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = FAMILIES["llava"]()
    handing(model, monkeypatch, **{name: value})
    with pytest.raises(InputError, match=f"hands its decoder {name}, which"):
        capture_decoder_inputs(model, inputs(1))


def test_states_to_add_need_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = FAMILIES["llava"]()
    handing(model, monkeypatch, deepstack_visual_embeds=[torch.zeros(3, 32)])
    with pytest.raises(InputError, match="visual_pos_masks"):
        capture_decoder_inputs(model, inputs(1))


def test_what_changes_nothing_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = FAMILIES["llava"]()
    expected = capture_decoder_inputs(model, inputs(1))
    handing(
        model,
        monkeypatch,
        token_type_ids=None,
        use_cache=True,
        return_dict=True,
        output_attentions=False,
        output_hidden_states=True,
        cache_position=torch.arange(21),
        **{cache_name(text_decoder(model)): DynamicCache()},
    )
    assert_same(capture_decoder_inputs(model, inputs(1)), expected)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 1, 21, 21),
        torch.zeros(1, 1, 21, 30),
        {"full_attention": torch.ones(1)},
        {"full_attention": torch.eye(21, dtype=torch.bool)[None, None]},
    ],
)
def test_a_mask_of_the_models_own_is_refused(mask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = FAMILIES["llava"]()
    handing(model, monkeypatch, attention_mask=mask)
    with pytest.raises(InputError, match="mask"):
        capture_decoder_inputs(model, inputs(1))


@pytest.mark.parametrize(
    "mask", [None, {"full_attention": None}, {"full_attention": None, "sliding_attention": None}]
)
def test_layers_without_a_mask_see_what_they_say_of_themselves(
    mask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = FAMILIES["llava"]()
    handing(model, monkeypatch, attention_mask=mask)
    [causal] = capture_decoder_inputs(model, inputs(1))
    assert causal.blocks is None
    text_decoder(model).layers[0].self_attn.is_causal = False
    [prompt] = capture_decoder_inputs(model, inputs(1))
    assert prompt.blocks is not None
    assert prompt.blocks.tolist() == [0] * 21


def test_layers_that_differ_in_more_than_a_window_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = FAMILIES["llava"]()
    decoder = text_decoder(model)
    decoder.layers[0].self_attn.is_causal = False
    decoder.config.sliding_window = 4
    back = torch.ones(21, 21, dtype=torch.bool).tril().triu(-3)[None, None]
    handing(model, monkeypatch, attention_mask={"full_attention": None, "sliding_attention": back})
    with pytest.raises(InputError, match="attn_implementation='eager'"):
        capture_decoder_inputs(model, inputs(1))


def test_what_a_model_puts_before_a_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = FAMILIES["llama"]()
    name = cache_name(model)
    filled = model(**inputs(1), **{name: DynamicCache()})[name]
    # Prefix tuning does so.
    handing(model, monkeypatch, **{name: filled})
    with pytest.raises(InputError, match="from 5 positions"):
        capture_decoder_inputs(model, inputs(1))


def test_arguments_by_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = FAMILIES["llava"]()
    expected = capture_decoder_inputs(model, inputs(1))
    decoder = text_decoder(model)
    call = type(decoder).__call__
    cache = cache_name(decoder)
    order = ("input_ids", "attention_mask", "position_ids", cache, "inputs_embeds")

    def placed(module: Any, *args: Any, **kwargs: Any) -> Any:
        assert not args
        return call(module, *[kwargs.pop(name, None) for name in order], **kwargs)

    monkeypatch.setattr(type(decoder), "__call__", placed)
    assert_same(capture_decoder_inputs(model, inputs(1)), expected)


def test_a_forward_that_was_replaced_before_is_put_back() -> None:
    model, inputs = FAMILIES["llava"]()
    decoder = text_decoder(model)
    expected = capture_decoder_inputs(model, inputs(1))
    # As accelerate's hooks do.
    decoder.forward = replaced = functools.partial(decoder.forward)
    assert_same(capture_decoder_inputs(model, inputs(1)), expected)
    assert vars(decoder)["forward"] is replaced


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl"])
def test_what_generate_remembers_is_neither_read_nor_written(family: str) -> None:
    model, inputs = FAMILIES[family]()
    given = inputs(2)
    base = model.base_model
    fresh = capture_decoder_inputs(model, given)
    assert base.rope_deltas is None
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(given["input_ids"]),
        "attention_mask": given["attention_mask"],
    }
    plain = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    base.rope_deltas = another = torch.tensor([[5], [9]])
    assert_same(capture_decoder_inputs(model, given), fresh)
    for asked in (embedded, plain, {"input_ids": given["input_ids"][1:]}):
        assert all(row.position_ids is None for row in capture_decoder_inputs(model, asked))
    assert base.rope_deltas is another
    assert another.tolist() == [[5], [9]]


def together(tasks: list[Callable[[], None]]) -> None:
    """Run tasks in threads of their own, which begin at the same time."""
    begin = threading.Barrier(len(tasks))

    def run(task: Callable[[], None]) -> None:
        begin.wait(timeout=60)
        task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        for done in [pool.submit(run, task) for task in tasks]:
            done.result(timeout=120)


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "blip2-opt", "blip2-t5"])
def test_threads_that_capture_beside_threads_that_generate(family: str) -> None:
    model, inputs = FAMILIES[family]()
    rows = {number: inputs(number) for number in (1, 2, 3)}
    expected = {number: capture_decoder_inputs(model, given) for number, given in rows.items()}
    generated = {number: replies(model, given, 6) for number, given in rows.items()}
    attached, state = hooks(model), {n: list(vars(m)) for n, m in model.named_modules()}
    deltas = getattr(model.base_model, "rope_deltas", None)
    # Qwen2.5-VL's own state admits one `generate` at a time.
    turn = threading.Lock()

    def capturing(number: int) -> None:
        for _ in range(8):
            assert_same(capture_decoder_inputs(model, rows[number]), expected[number])

    def generating(number: int) -> None:
        for _ in range(3):
            if deltas is None:
                assert replies(model, rows[number], 6) == generated[number]
            else:
                with turn:
                    assert replies(model, rows[number], 6) == generated[number]

    together(
        [
            *(lambda n=number: capturing(n) for number in (1, 2, 3)),
            *(lambda n=number: generating(n) for number in (2, 3)),
        ]
    )
    assert hooks(model) == attached
    assert {n: list(vars(m)) for n, m in model.named_modules()} == state
    if deltas is not None:
        with turn:
            replies(model, rows[3], 6)
        assert torch.equal(model.base_model.rope_deltas, deltas)


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llava", {7, 8}), ("llama", {7, 8}), ("blip2-opt", {END}), ("blip2-t5", {END})],
)
def test_the_model_that_generates_says_what_ends_a_reply(family: str, expected: set[int]) -> None:
    model, _ = FAMILIES[family]()
    model.generation_config.eos_token_id = [7, 8]
    assert end_tokens(model) == expected
    model.generation_config.eos_token_id = None
    assert end_tokens(model) == (expected if expected == {END} else set())
