"""A reply's text: whole characters, and stop strings wherever tokens and drafts end."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from fastvlm.decoding.text import REPLACEMENT_CHARACTER, ReplyText, token_bytes
from fastvlm.functional.errors import InputError
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from tests.models import IMAGE_SIZE, small_vlm

MANY = "naïve 😀 · größer, 漢字 and again 😀😀"
QUESTION = "Describe the picture."
STRATEGIES = ("autoregressive", "prompt-lookup", "early-exit")


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return small_vlm()


@pytest.fixture(scope="module")
def tokenizer(vlm: VisionLanguageModel) -> PreTrainedTokenizerBase:
    return vlm.tokenizer


def test_characters_are_never_split(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.encode(MANY, add_special_tokens=False)
    assert len(tokens) > len(MANY)  # some characters are several tokens
    text, shown = ReplyText(tokenizer), ""
    for end in range(1, len(tokens) + 1):
        text.follow(tokens[:end])
        assert text.final.startswith(shown)
        assert REPLACEMENT_CHARACTER not in text.final
        assert MANY.startswith(text.final)
        shown = text.final
    assert shown == MANY
    # Half a character is shown where no other half will come.
    text = ReplyText(tokenizer)
    emoji = tokenizer.encode("😀", add_special_tokens=False)
    text.follow(emoji[:1])
    assert text.final == ""
    text.end()
    assert text.final == REPLACEMENT_CHARACTER


def test_a_tokens_bytes_are_its_part_of_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.encode(MANY, add_special_tokens=False)
    assert b"".join(token_bytes(tokenizer, token) for token in tokens) == MANY.encode()


@pytest.mark.parametrize("step", [1, 2, 3, 1000])
@pytest.mark.parametrize("least", range(12))
def test_a_stop_string_within_the_least_tokens_does_not_end_the_text(
    tokenizer: PreTrainedTokenizerBase, least: int, step: int
) -> None:
    whole = "ababababab"
    tokens = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in whole]
    text = ReplyText(tokenizer, ["bab", "x"], least)
    ended = False
    for end in range(step, len(tokens) + step, step):
        ended = ended or text.follow(tokens[:end])
    # Token by token: the string ends with every second token from the fourth on.
    ends = [end for end in range(4, len(whole) + 1, 2) if end > least]
    assert ended == bool(ends)
    text.end()
    assert text.whole == (whole[: ends[0] - 3] if ends else whole)


@pytest.mark.parametrize("stop", [["größer"], ["r, 漢"], ["字 a", "nothing"], ["😀😀", "ain"]])
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_stop_string_ends_the_text_before_it(
    tokenizer: PreTrainedTokenizerBase, stop: list[str], step: int
) -> None:
    tokens = tokenizer.encode(MANY, add_special_tokens=False)
    text = ReplyText(tokenizer, stop)
    expected = MANY[: min(MANY.index(one) for one in stop if one in MANY)]
    for end in range(0, len(tokens) + step, step):
        # What was shown once is never taken back.
        assert expected.startswith(text.final)
        if text.follow(tokens[:end]):
            break
    assert text.stopped
    assert text.final == expected


def test_what_begins_a_stop_string_is_shown_when_nothing_follows(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = ReplyText(tokenizer, ["and then"])
    text.follow(tokenizer.encode("this and", add_special_tokens=False))
    assert text.final == "this "
    text.end()
    assert text.final == "this and"
    with pytest.raises(InputError, match="at least one character"):
        ReplyText(tokenizer, [""])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_replies_and_streams_end_at_stop_strings(vlm: VisionLanguageModel, strategy: str) -> None:
    image = render(sample(3), IMAGE_SIZE)
    whole = vlm.generate(QUESTION, image, max_new_tokens=40)
    place = len(whole.text) // 2
    for stop in (whole.text[place : place + 1], whole.text[place : place + 7]):
        expected = whole.text[: whole.text.index(stop)]
        options = {} if strategy == "autoregressive" else {"num_speculative_tokens": 5}
        drafting = vlm.strategy(strategy, **options)
        # A string alone is one stop string, not as many as it has letters.
        stream = vlm.stream(QUESTION, image, max_new_tokens=40, stop=stop, strategy=drafting)
        pieces = list(stream)
        assert "".join(piece.text for piece in pieces) == expected
        assert stream.reply.text == expected
        assert stream.reply.finish_reason == "stop"
        # The tokens that make up the stop string are the last ones, and no others follow.
        assert [token for piece in pieces for token in piece.token_ids] == stream.reply.token_ids
        assert stream.reply.token_ids == whole.token_ids[: len(stream.reply.token_ids)]
        ordinary = vlm.generate(QUESTION, image, max_new_tokens=40, stop=[stop])
        assert ordinary.token_ids == stream.reply.token_ids


def test_every_token_streams_once_with_where_it_came_from(vlm: VisionLanguageModel) -> None:
    image = render(sample(4), IMAGE_SIZE)
    stream = vlm.stream(QUESTION, image, max_new_tokens=30, strategy="early-exit")
    pieces = list(stream)
    assert [token for piece in pieces for token in piece.token_ids] == stream.reply.token_ids
    assert [flag for piece in pieces for flag in piece.drafted] == stream.reply.drafted
    assert "".join(piece.text for piece in pieces) == stream.reply.text


def test_a_stream_that_nobody_reads_on_computes_nothing_more(vlm: VisionLanguageModel) -> None:
    stream = vlm.stream(QUESTION, render(sample(5), IMAGE_SIZE), max_new_tokens=50)
    for _ in stream:
        break
    stream.close()
    assert len(stream.reply.token_ids) < 50
    assert stream.reply.finish_reason == "cancelled"
    assert not vlm.engine.slots


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"top_p": 0.9}, "top_p needs a temperature"),
        ({"seed": 1}, "seed needs a temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 0.5, "top_p": 1.5}, "top_p"),
        ({"temperature": 0.5, "top_k": 0}, "top_k"),
    ],
)
def test_sampling_options_out_of_range_are_named(
    vlm: VisionLanguageModel, options: dict, told: str
) -> None:
    with pytest.raises(InputError, match=told):
        vlm.generate(QUESTION, **options)


def test_a_seed_gives_the_same_reply_and_another_seed_another(vlm: VisionLanguageModel) -> None:
    options = {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 20}
    first, again, other = (
        vlm.generate(QUESTION, seed=seed, **options).token_ids for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
