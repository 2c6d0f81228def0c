"""Scores of captions against human references, as COCO's caption evaluation computes them.

BLEU-1..4 (Papineni et al. 2002), ROUGE-L (Lin 2004) and CIDEr-D (Vedantam et al. 2015, arXiv
1411.5726), over the tokens of `fastvlm.metrics.tokenization`. These are columns of captioning
papers' tables (arXiv 1504.00325, section 3); METEOR and SPICE are in `fastvlm.metrics.java`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fastvlm.functional.errors import InputError
from fastvlm.metrics.tokenization import tokenize_caption

MAX_NGRAM_ORDER = 4
CIDER_SIGMA = 6.0
CIDER_SCALE = 10.0
ROUGE_BETA = 1.2

# Keeps BLEU defined where there are no n-grams, or no correct ones: COCO's own two constants.
_BLEU_TINY = 1e-15
_BLEU_SMALL = 1e-9

Tokens = Sequence[str]


@dataclass(frozen=True, slots=True)
class BleuCounts:
    """What corpus BLEU is computed from, summed over all captions.

    Attributes:
        test_length: Tokens in the predictions.
        reference_length: Tokens in the references, for each prediction those of the reference whose
            length is closest to its own, the shorter of two equally close.
        guesses: N-grams in the predictions, for n = 1..4.
        correct: Those of them that a reference has too, each counted no more often than in the
            reference that has it most often, for n = 1..4.
    """

    test_length: int
    reference_length: int
    guesses: tuple[int, ...]
    correct: tuple[int, ...]

    @property
    def scores(self) -> tuple[float, ...]:
        """BLEU-1..4, 0 to 1: geometric means of the precisions, times the brevity penalty."""
        ratio = (self.test_length + _BLEU_TINY) / (self.reference_length + _BLEU_SMALL)
        brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
        scores = []
        product = 1.0
        for order, (correct, guesses) in enumerate(zip(self.correct, self.guesses, strict=True), 1):
            product *= (correct + _BLEU_TINY) / (guesses + _BLEU_SMALL)
            scores.append(brevity * product ** (1 / order))
        return tuple(scores)


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Scores of one set of predicted captions.

    Attributes:
        bleu: BLEU-1, -2, -3 and -4 of the corpus, 0 to 1.
        bleu_counts: What they were computed from.
        rouge_l: Mean ROUGE-L of the captions, 0 to 1.
        cider: Mean CIDEr-D of the captions, 0 to 10; papers print it as it is or times 100.
        rouge_l_by_image: ROUGE-L of each prediction, by its key.
        cider_by_image: CIDEr-D of each prediction, by its key.
    """

    bleu: tuple[float, ...]
    bleu_counts: BleuCounts
    rouge_l: float
    cider: float
    rouge_l_by_image: Mapping[str, float]
    cider_by_image: Mapping[str, float]


def score_captions(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> CaptionScores:
    """Score one predicted caption an image against its human captions.

    CIDEr-D weighs n-grams by how many of *these* images have them in their references: to get its
    published value for a subset (a domain of nocaps, say), score the subset alone instead of
    averaging over its images in a larger run. For a single image it is 0.

    Args:
        predictions: A caption by image.
        references: One or more captions by image, for the same images.

    Returns:
        The scores, of the corpus and by image.

    Raises:
        InputError: There are no predictions, the two name different images, an image has no
            reference, or a caption isn't text.
    """
    check_captions(predictions, references)
    images = list(predictions)
    tests = [tokenize_caption(predictions[image]) for image in images]
    truths = [[tokenize_caption(caption) for caption in references[image]] for image in images]
    counts = count_bleu(tests, truths)
    rouge = [rouge_l(test, truth) for test, truth in zip(tests, truths, strict=True)]
    cider = cider_d(tests, truths)
    return CaptionScores(
        bleu=counts.scores,
        bleu_counts=counts,
        rouge_l=fmean(rouge),
        cider=fmean(cider),
        rouge_l_by_image=dict(zip(images, rouge, strict=True)),
        cider_by_image=dict(zip(images, cider, strict=True)),
    )


def count_bleu(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> BleuCounts:
    """Count what corpus BLEU needs.

    Args:
        predictions: Tokens of each prediction.
        references: Tokens of each prediction's references, one or more.

    Returns:
        The counts; their `scores` are BLEU-1..4.
    """
    test_length = reference_length = 0
    guesses = [0] * MAX_NGRAM_ORDER
    correct = [0] * MAX_NGRAM_ORDER
    for prediction, truths in zip(predictions, references, strict=True):
        length = len(prediction)
        test_length += length
        reference_length += min(map(len, truths), key=lambda n: (abs(n - length), n))
        for order in range(1, MAX_NGRAM_ORDER + 1):
            guesses[order - 1] += max(0, length - order + 1)
        # | of two counters is their maximum, & their minimum.
        most: Counter[tuple[str, ...]] = Counter()
        for truth in truths:
            most |= _count_ngrams(truth)
        for ngram, count in (_count_ngrams(prediction) & most).items():
            correct[len(ngram) - 1] += count
    return BleuCounts(test_length, reference_length, tuple(guesses), tuple(correct))


def rouge_l(prediction: Tokens, references: Sequence[Tokens]) -> float:
    """Compute ROUGE-L of one caption: an F-measure of its longest common subsequences.

    Precision and recall are each the best over the references (not of one reference), and recall
    weighs 1.2 squared as much as precision, as in COCO's evaluation.

    Args:
        prediction: Tokens of the prediction.
        references: Tokens of its references, one or more.

    Returns:
        0 to 1; 0 where the prediction or all references have no tokens.
    """
    common = [(_longest_common(prediction, truth), len(truth)) for truth in references]
    if not any(shared for shared, _ in common):
        return 0.0
    precision = max(shared for shared, _ in common) / len(prediction)
    recall = max(shared / length for shared, length in common if length)
    weight = ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


class CiderD:
    """CIDEr-D (arXiv 1411.5726, sections 5 and 7) with the document frequencies of a corpus.

    The cosine between the n-gram counts of a prediction and of a reference, weighted by inverse
    document frequency (a document is all references of one image), with the prediction's counts
    clipped to the reference's, times a Gaussian of their difference in length; averaged over
    n = 1..4 and the references; times 10.

    Args:
        references: Tokens of each image's references: the corpus.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        documents = Counter(
            ngram
            for truths in references
            for ngram in {ngram for truth in truths for ngram in _ngrams(truth)}
        )
        self.unseen = math.log(len(references)) if references else 0.0
        self.rarity = {ngram: self.unseen - math.log(count) for ngram, count in documents.items()}

    def score(self, prediction: Tokens, references: Sequence[Tokens]) -> float:
        """Score one caption against an image's references, one or more: 0 to 10."""
        counts = _count_ngrams(prediction)
        prediction_norms = self._norms(counts)
        total = 0.0
        for truth in references:
            truth_counts = _count_ngrams(truth)
            products = [0.0] * MAX_NGRAM_ORDER
            for ngram in counts.keys() & truth_counts.keys():
                count = truth_counts[ngram]
                weight = self.rarity.get(ngram, self.unseen) ** 2
                products[len(ngram) - 1] += min(counts[ngram], count) * count * weight
            similarity = sum(
                product / (ours * theirs)
                for product, ours, theirs in zip(
                    products, prediction_norms, self._norms(truth_counts), strict=True
                )
                if product
            )
            # COCO measures length in bigrams: captions of no token and of one are equally long.
            difference = max(len(prediction), 1) - max(len(truth), 1)
            total += similarity * math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
        return CIDER_SCALE * total / (MAX_NGRAM_ORDER * len(references))

    def _norms(self, counts: Counter[tuple[str, ...]]) -> list[float]:
        squares = [0.0] * MAX_NGRAM_ORDER
        for ngram, count in counts.items():
            squares[len(ngram) - 1] += (count * self.rarity.get(ngram, self.unseen)) ** 2
        return [math.sqrt(square) for square in squares]


def cider_d(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Compute CIDEr-D of each caption of a corpus, document frequencies from its references.

    Args:
        predictions: Tokens of each prediction.
        references: Tokens of each prediction's references, one or more.

    Returns:
        CIDEr-D of each prediction, 0 to 10.
    """
    corpus = CiderD(references)
    return [
        corpus.score(prediction, truths)
        for prediction, truths in zip(predictions, references, strict=True)
    ]


def check_captions(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    """Check that every prediction is text and has references that are.

    Raises:
        InputError: One is not, or has none.
    """
    if not predictions:
        raise InputError("There are no predicted captions to score.")
    unmatched = predictions.keys() ^ references.keys()
    if unmatched:
        image = min(unmatched, key=str)
        lacks = "prediction" if image in references else "references"
        raise InputError(
            "Predictions and references must be of the same images, but"
            f" {len(unmatched)} images have only one of them: {image!r} has no {lacks}."
        )
    for image, prediction in predictions.items():
        captions = references[image]
        if not isinstance(prediction, str):
            raise InputError(f"The prediction of {image!r} must be text, not {prediction!r}.")
        if isinstance(captions, str) or not all(isinstance(text, str) for text in captions):
            raise InputError(f"References of {image!r} must be a list of texts, not {captions!r}.")
        if not captions:
            raise InputError(f"{image!r} has no reference caption; it needs one or more.")


def _ngrams(tokens: Tokens) -> Iterable[tuple[str, ...]]:
    """All n-grams of a caption, n = 1..4."""
    for order in range(1, MAX_NGRAM_ORDER + 1):
        yield from zip(*(tokens[start:] for start in range(order)), strict=False)


def _count_ngrams(tokens: Tokens) -> Counter[tuple[str, ...]]:
    """How often each n-gram of a caption occurs in it, n = 1..4."""
    return Counter(_ngrams(tokens))


def _longest_common(first: Tokens, second: Tokens) -> int:
    """Length of the longest common subsequence of two captions.

    Bit-parallel (Hyyro 2004): bit i of `row` is 0 where the length grows at token i of the first,
    so that one addition of integers does a row of the usual table.
    """
    places: dict[str, int] = {}
    for index, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for token in second:
        matches = row & places.get(token, 0)
        row = (row + matches) | (row - matches)
    return len(first) - (row & full).bit_count()
