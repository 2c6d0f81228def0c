"""Short answers against human ones: VQA accuracy, TextVQA accuracy, ANLS.

An answer counts in part where a part of the people agree with it (Antol et al. 2015, arXiv
1505.00468, section 4; Goyal et al. 2017), or where its spelling is close (Biten et al. 2019).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from fastvlm.functional.errors import InputError

FULL_CREDIT_PEOPLE = 3
"""The number of people who must give an answer for full credit."""
ANLS_THRESHOLD = 0.5

_ARTICLES = frozenset(["a", "an", "the"])
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official code hands `re.UNICODE` (32) to `sub` where it takes the most replacements to make.
_MAX_PERIODS = 32

# Each is restored where one of its apostrophes is missing; "lets" and "shes", say, are left alone.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've "
    "hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am "
    "might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at "
    "shan't should've shouldn't she'd've shouldn't've somebody'd've somebody'll somebody's "
    "someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've "
    "'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't "
    "wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
)
_CONTRACTION_BY_SPELLING = {
    contraction[:place] + contraction[place + 1 :]: contraction
    for contraction in _CONTRACTIONS.split()
    for place, character in enumerate(contraction)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # as the official table has it


def vqa_accuracy(reply: str, answers: Sequence[str]) -> float:
    """Compute the accuracy of one answer, as VQA's official evaluation does.

    For each person, the reply counts min(1, others who gave it / 3); the accuracy is the mean over
    the people. Reply and answers are normalised (lower case, digits, no articles or punctuation)
    only where the people's answers are not all alike: otherwise the reply must be theirs as it is.

    Args:
        reply: The model's answer.
        answers: What people answered; ten in VQA.

    Returns:
        0 to 1.

    Raises:
        InputError: There are no answers.
    """
    reply, people = _spaced(reply), [_spaced(answer) for answer in answers]
    if len(set(people)) > 1:
        reply, people = normalize_answer(reply), [normalize_answer(answer) for answer in people]
    return _agreement(reply, people)


def textvqa_accuracy(reply: str, answers: Sequence[str]) -> float:
    """Compute the accuracy of one answer, as TextVQA's evaluation (and LLaVA's) does.

    VQA's accuracy, but always normalised, commas and question marks removed before all else, and a
    possessive 's a word of its own.

    Args:
        reply: The model's answer.
        answers: What people answered; ten in TextVQA.

    Returns:
        0 to 1.

    Raises:
        InputError: There are no answers.
    """
    return _agreement(normalize_submission(reply), [normalize_submission(text) for text in answers])


def normalize_answer(answer: str) -> str:
    """Return an answer in VQA's canonical form: punctuation, digits, articles, apostrophes."""
    text = answer
    spread = _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or spread else " ")
    text = _PERIOD.sub("", text, count=_MAX_PERIODS)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(
        _CONTRACTION_BY_SPELLING.get(word, word) for word in words if word not in _ARTICLES
    )


def normalize_submission(answer: str) -> str:
    """Return an answer as TextVQA's evaluation reads it, and as LLaVA submits it to VQA's."""
    plain = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_answer(_spaced(plain))


def anls(reply: str, answers: Sequence[str]) -> float:
    """Compute the normalised Levenshtein similarity of one answer (ANLS is its mean).

    1 - distance / length of the longer, over the closest of the answers; 0 where that is under .5
    (Biten et al. 2019, arXiv 1905.13648, equation 1; exactly .5 counts, as in the challenges' own
    evaluation). Case and repeated spaces don't matter.

    Args:
        reply: The model's answer.
        answers: The right answers, one or more.

    Returns:
        0, or .5 to 1.

    Raises:
        InputError: There are no answers.
    """
    if not answers:
        raise InputError("An answer can't be scored without a right answer to hold it against.")
    said = " ".join(reply.lower().split())
    best = 0.0
    for answer in answers:
        right = " ".join(answer.lower().split())
        longest = max(len(said), len(right))
        best = max(best, 1 - _edit_distance(said, right) / longest if longest else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def _spaced(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _agreement(reply: str, people: Sequence[str]) -> float:
    """Mean over the people of min(1, others who gave the reply / 3)."""
    if not people:
        raise InputError("An answer can't be scored without the answers of people.")
    same = Counter(people)[reply]
    by_those = min(1.0, (same - 1) / FULL_CREDIT_PEOPLE) if same else 0.0
    by_others = min(1.0, same / FULL_CREDIT_PEOPLE)
    return (same * by_those + (len(people) - same) * by_others) / len(people)


def _edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance: insertions, deletions and substitutions of characters."""
    row = list(range(len(second) + 1))
    for i, ours in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, theirs in enumerate(second, 1):
            diagonal, row[j] = (
                row[j],
                min(row[j] + 1, row[j - 1] + 1, diagonal + (ours != theirs)),
            )
    return row[-1]
