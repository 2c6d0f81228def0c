"""Caption scores: by hand, against a slow and obvious version, and against published figures."""

from __future__ import annotations

import gzip
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest

from fastvlm.functional.errors import InputError
from fastvlm.metrics.captions import (
    BleuCounts,
    CaptionScores,
    cider_d,
    count_bleu,
    rouge_l,
    score_captions,
)
from fastvlm.metrics.tokenization import tokenize_caption

Tokens = list[str]

PREDICTIONS = {
    "bird": "A small bird sits on a branch.",
    "boat": "two boats in the water",
    "bread": "A loaf of bread, sliced, on a board.",
    "rain": "People with umbrellas cross the street in the rain.",
}
REFERENCES = {
    "bird": ["A bird on a branch.", "A tiny bird sits on a thin branch", "Bird sitting on a tree!"],
    "boat": ["Two boats float in the water.", "Boats, two of them, on the water"],
    "bread": ["Bread on a board", "A sliced loaf of bread is on a wooden board.", "Some bread."],
    "rain": ["A rainy street; people carry umbrellas.", "People cross the street in the rain."],
}


# The obvious version: tables and dictionaries, nothing shared between captions.


def naive_ngrams(tokens: Tokens, order: int) -> list[str]:
    return ["\t".join(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]


def naive_bleu(tests: list[Tokens], truths: list[list[Tokens]]) -> list[float]:
    test_length = sum(len(test) for test in tests)
    reference_length = 0
    for test, references in zip(tests, truths, strict=True):
        lengths = sorted(len(truth) for truth in references)
        reference_length += min(lengths, key=lambda n: abs(n - len(test)))
    precisions = []
    for order in range(1, 5):
        correct = guessed = 0
        for test, references in zip(tests, truths, strict=True):
            ngrams = naive_ngrams(test, order)
            guessed += len(ngrams)
            for ngram in set(ngrams):
                allowed = max(naive_ngrams(truth, order).count(ngram) for truth in references)
                correct += min(ngrams.count(ngram), allowed)
        precisions.append(correct / guessed if guessed else 0.0)
    brevity = min(1.0, math.exp(1 - reference_length / test_length))
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]


def naive_rouge(test: Tokens, references: list[Tokens]) -> float:
    precisions, recalls = [], []
    for truth in references:
        table = [[0] * (len(truth) + 1) for _ in range(len(test) + 1)]
        for i, ours in enumerate(test):
            for j, theirs in enumerate(truth):
                longest = max(table[i][j + 1], table[i + 1][j])
                table[i + 1][j + 1] = table[i][j] + 1 if ours == theirs else longest
        precisions.append(table[-1][-1] / len(test))
        recalls.append(table[-1][-1] / len(truth))
    p, r = max(precisions), max(recalls)
    return (1 + 1.2**2) * p * r / (r + 1.2**2 * p) if p else 0.0


def naive_cider(tests: list[Tokens], truths: list[list[Tokens]]) -> list[float]:
    def vector(tokens: Tokens, order: int) -> dict[str, float]:
        weights = {}
        for ngram in naive_ngrams(tokens, order):
            images = sum(any(ngram in naive_ngrams(t, order) for t in refs) for refs in truths)
            idf = math.log(len(truths) / max(1, images))
            weights[ngram] = naive_ngrams(tokens, order).count(ngram) * idf
        return weights

    scores = []
    for test, references in zip(tests, truths, strict=True):
        values = []
        for truth in references:
            for order in range(1, 5):
                ours, theirs = vector(test, order), vector(truth, order)
                dot = sum(min(ours[n], theirs[n]) * theirs[n] for n in ours if n in theirs)
                norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                penalty = math.exp(-((len(test) - len(truth)) ** 2) / (2 * 6.0**2))
                values.append(penalty * dot / norm if norm else 0.0)
        scores.append(10 * sum(values) / len(values))
    return scores


def random_captions(images: int) -> tuple[list[Tokens], list[list[Tokens]]]:
    words = ["a", "a", "a", "the", "on", "of", "dog", "cat", "tree", "red", "big", "runs", "sits"]

    def caption() -> Tokens:
        return random.choices(words, k=random.randint(1, 14))

    truths = [[caption() for _ in range(random.randint(1, 5))] for _ in range(images)]
    return [caption() for _ in range(images)], truths


def test_bleu_by_hand() -> None:
    # "the" is allowed twice, as in the second reference; of the bigrams only "the cat" is there.
    # References of 4 and 6 tokens are equally far from 5: the shorter counts.
    test = ["the", "the", "the", "cat", "slept"]
    truths = [["a", "cat", "sat", "down"], ["the", "cat", "and", "the", "dog", "sat"]]
    counts = count_bleu([test], [truths])
    assert counts == BleuCounts(5, 4, guesses=(5, 4, 3, 2), correct=(3, 1, 0, 0))
    assert counts.scores[0] == pytest.approx(3 / 5)
    assert counts.scores[1] == pytest.approx(math.sqrt(3 / 5 * 1 / 4))
    assert counts.scores[2] == pytest.approx(0, abs=1e-4)


def test_bleu_punishes_brevity_of_the_corpus_only() -> None:
    short, long = ["a", "b"], ["a", "b", "c", "d", "e", "f"]
    assert count_bleu([short], [[long]]).scores[0] == pytest.approx(math.exp(1 - 6 / 2))
    both = count_bleu([short, long], [[long], [short]])
    assert (both.test_length, both.reference_length) == (8, 8)
    assert both.scores[0] == pytest.approx(4 / 8)


def test_rouge_l_by_hand() -> None:
    # Precision 3/4 is the first reference's (a c d), recall 2/2 the second's (c d).
    score = rouge_l(list("abcd"), [list("axcyd"), list("cd")])
    assert score == pytest.approx((1 + 1.44) * 0.75 * 1 / (1 + 1.44 * 0.75))
    assert rouge_l(list("abcd"), [list("abcd"), list("zz")]) == pytest.approx(1)
    assert rouge_l(list("abc"), [list("xyz")]) == 0
    assert rouge_l([], [["a"], []]) == 0
    assert rouge_l(["a"], [[]]) == 0


def test_cider_by_hand() -> None:
    # Two images, one reference each, nothing shared: every n-gram weighs log 2. "red dog" has one
    # of two words of "big dog", no bigram, and neither has longer n-grams: 10 * 1/2 / 4.
    scores = cider_d([["red", "dog"], ["a", "b", "c", "d"]], [[["big", "dog"]], [list("abcd")]])
    assert scores == pytest.approx([1.25, 10.0])
    # A word of every image's references weighs nothing.
    assert cider_d([["a"], ["a"]], [[["a"]], [["a"]]]) == [0, 0]
    # Repeating is clipped: (min(3, 1) * 1) / (3 * 1), times a penalty for two tokens too many.
    repeated = cider_d([["dog"] * 3, ["x"]], [[["dog"]], [["cat"]]])[0]
    assert repeated == pytest.approx(10 / 4 / 3 * math.exp(-4 / 72))


def test_scores_equal_the_obvious_version() -> None:
    for _ in range(20):
        tests, truths = random_captions(images=random.randint(2, 12))
        assert cider_d(tests, truths) == pytest.approx(naive_cider(tests, truths), abs=1e-12)
        assert count_bleu(tests, truths).scores == pytest.approx(
            naive_bleu(tests, truths), abs=1e-3
        )
        for test, references in zip(tests, truths, strict=True):
            assert rouge_l(test, references) == pytest.approx(naive_rouge(test, references))


def test_captions_are_tokenized_before_they_are_scored() -> None:
    scores = score_captions(PREDICTIONS, REFERENCES)
    tests = [tokenize_caption(PREDICTIONS[image]) for image in PREDICTIONS]
    truths = [[tokenize_caption(text) for text in REFERENCES[image]] for image in PREDICTIONS]
    cider = naive_cider(tests, truths)
    rouge = [naive_rouge(test, references) for test, references in zip(tests, truths, strict=True)]
    assert list(scores.cider_by_image) == list(PREDICTIONS)
    assert list(scores.cider_by_image.values()) == pytest.approx(cider)
    assert scores.cider == pytest.approx(sum(cider) / 4)
    assert list(scores.rouge_l_by_image.values()) == pytest.approx(rouge)
    assert scores.rouge_l == pytest.approx(sum(rouge) / 4)
    assert scores.bleu == pytest.approx(naive_bleu(tests, truths))
    assert scores.bleu == scores.bleu_counts.scores


def test_order_and_case_do_not_matter() -> None:
    scores = score_captions(PREDICTIONS, REFERENCES)
    shouted = {image: text.upper() for image, text in reversed(PREDICTIONS.items())}
    again = score_captions(shouted, REFERENCES)
    assert again.bleu_counts == scores.bleu_counts
    assert again.cider == pytest.approx(scores.cider)
    assert again.rouge_l == pytest.approx(scores.rouge_l)


def test_a_perfect_caption_scores_in_full() -> None:
    perfect = {image: captions[0] for image, captions in REFERENCES.items()}
    scores = score_captions(perfect, {image: [text] for image, text in perfect.items()})
    assert scores.bleu == pytest.approx([1] * 4)
    assert scores.rouge_l == pytest.approx(1)
    assert scores.cider == pytest.approx(10)


def test_empty_captions_score_nothing() -> None:
    scores = score_captions({"a": "", "b": "..."}, {"a": ["a dog"], "b": ["a cat", ""]})
    assert scores.bleu == pytest.approx([0] * 4, abs=1e-6)
    assert (scores.rouge_l, scores.cider) == (0, 0)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "no predicted captions"),
        ({"a": "x"}, {}, "'a' has no references"),
        ({"a": "x"}, {"a": ["x"], "b": ["y"]}, "'b' has no prediction"),
        ({"a": "x"}, {"a": []}, "'a' has no reference caption"),
        ({"a": "x"}, {"a": "x"}, "must be a list of texts, not 'x'"),
        ({"a": "x"}, {"a": ["x", None]}, "must be a list of texts"),
        ({"a": ["x"]}, {"a": ["x"]}, r"must be text, not \['x'\]"),
    ],
)
def test_bad_input_is_named(predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_captions(predictions, references)


# Published figures, from files that aren't part of the project.


def rows_of(data: Path, name: str) -> list[dict[str, Any]]:
    file = data / "scored_captions" / f"{name}.json.gz"
    if not file.is_file():
        pytest.skip(f"No file {file}.")
    rows: list[dict[str, Any]] = json.loads(gzip.decompress(file.read_bytes()))
    return rows


def score_rows(rows: list[dict[str, Any]]) -> CaptionScores:
    return score_captions(
        {str(index): row["prediction"] for index, row in enumerate(rows)},
        {str(index): row["captions"] for index, row in enumerate(rows)},
    )


@pytest.mark.slow
def test_published_magic_coco(data: Path) -> None:
    rows = rows_of(data, "magic_coco")
    started = time.process_time()
    scores = score_rows(rows)
    assert time.process_time() - started < 20
    counts = scores.bleu_counts
    assert (counts.test_length, counts.reference_length) == (47153, 47168)
    assert counts.correct == (26801, 9496, 2857, 902)
    assert scores.bleu == pytest.approx([0.568, 0.358, 0.214, 0.129], abs=5e-4)
    assert scores.rouge_l == pytest.approx(0.399, abs=5e-4)
    assert scores.cider == pytest.approx(0.493, abs=5e-4)


@pytest.mark.slow
def test_published_viecap_nocaps(data: Path) -> None:
    rows = rows_of(data, "viecap_nocaps")
    published = {"in_domain": 0.611, "near_domain": 0.643, "out_domain": 0.650}
    for domain, cider in published.items():
        scores = score_rows([row for row in rows if row["split"] == domain])
        assert scores.cider == pytest.approx(cider, abs=5e-4), domain
    assert score_rows(rows).cider == pytest.approx(0.662, abs=5e-4)


@pytest.mark.parametrize(
    ("kind", "bleu", "rouge", "cider"),
    [("good", 0.6667, 0.428, 0.5637), ("bad", 0.4815, 0.3121, 0.279)],
)
def test_published_clipscore(
    data: Path, kind: str, bleu: float, rouge: float, cider: float
) -> None:
    folder = data / "metric_fixtures" / "clipscore"
    if not folder.is_dir():
        pytest.skip(f"No folder {folder}.")
    predictions = json.loads((folder / f"{kind}_captions.json").read_text(encoding="utf-8"))
    references = json.loads((folder / "refs.json").read_text(encoding="utf-8"))
    scores = score_captions(predictions, references)
    assert (scores.bleu[0], scores.rouge_l, scores.cider) == pytest.approx(
        (bleu, rouge, cider), abs=5e-5
    )


def test_published_nlg_eval(data: Path) -> None:
    folder = data / "metric_fixtures" / "nlg-eval" / "examples"
    if not folder.is_dir():
        pytest.skip(f"No folder {folder}.")
    tests, first, second = (
        (folder / name).read_text(encoding="utf-8").splitlines()
        for name in ("hyp.txt", "ref1.txt", "ref2.txt")
    )
    lines = [str(number) for number in range(len(tests))]
    references = [list(pair) for pair in zip(first, second, strict=True)]
    scores = score_captions(
        dict(zip(lines, tests, strict=True)), dict(zip(lines, references, strict=True))
    )
    assert scores.bleu == pytest.approx([0.55, 0.428174, 0.284043, 0.201143], abs=5e-7)
    assert scores.rouge_l == pytest.approx(0.522104, abs=5e-7)
    assert scores.cider == pytest.approx(1.242192, abs=5e-7)
