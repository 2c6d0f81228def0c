"""Answers to MMMU's questions: what a reply chose or computed, and how often it is right.

Yue et al. 2023, arXiv 2311.16502, section 4.1: rules read a letter or a value out of a reply; where
a multiple-choice reply names no option, one is drawn at random.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastvlm.functional.errors import InputError

DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
"""The subjects of each discipline."""

RANDOM_OPTION_SEED = 42
"""The seed of options drawn for replies that name none, as in the official evaluation."""

OPTION_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MIN_QUOTATION_WORDS = 5
"""A reply must have more words than this for options' texts to be looked for in it."""
_PUNCTUATION_MARKS = (",", ".", "!", "?", ";", ":", "'")
_ROUNDED_DECIMALS = 2
_CONCLUSION_MARKERS = (
    "could be ",
    "so ",
    "is ",
    "thus ",
    "therefore ",
    "final ",
    "answer ",
    "result ",
)
_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")


@dataclass(frozen=True, slots=True)
class Key:
    """The right answer to a question.

    Attributes:
        answers: The letter of the right option, or all that is right for an open question.
        options: The options' texts, for A, B, ...; None for an open question.
    """

    answers: tuple[str, ...]
    options: tuple[str, ...] | None


def subject_of(question: str) -> str:
    """Return the subject in a question's id, `Art_Theory` in `validation_Art_Theory_3`.

    Raises:
        InputError: The id has another form, or its subject is none of MMMU's.
    """
    subject = "_".join(question.split("_")[1:-1])
    if not any(subject in subjects for subjects in DISCIPLINES.values()):
        raise InputError(f"{question!r} is not the id of a question about a subject of MMMU.")
    return subject


def parse_choice(reply: str, options: Sequence[str]) -> str | None:
    """Return the letter that a reply chose, None where it names no option.

    Looked for in turn: "(A)", "A" as a word, and in a reply of more than five words an option's
    text; of several, the last one.
    """
    for mark in _PUNCTUATION_MARKS:
        reply = reply.strip(mark)
    text = f" {reply} "
    letters = OPTION_LETTERS[: len(options)]
    forms = [{letter: f"({letter})" for letter in letters}]
    forms.append({letter: f" {letter} " for letter in letters})
    for form in forms:
        places = {letter: text.rfind(mark) for letter, mark in form.items() if mark in text}
        if places:
            return max(places, key=places.__getitem__)
    if len(text.split()) <= _MIN_QUOTATION_WORDS:
        return None
    lower = text.lower()
    places = {
        letter: lower.rfind(option.lower())
        for letter, option in zip(letters, options, strict=True)
        if option.lower() in lower
    }
    return max(places, key=places.__getitem__, default=None)


def parse_open(reply: str) -> set[str | float]:
    """Return what a reply to an open question may mean: its conclusions, and the numbers in them.

    A conclusion is what stands after "is", "so", "answer" and the like in a line, after "=" too in
    the last; without any, the whole reply.
    """
    whole = reply.strip().strip(".").lower()
    lines = whole.split("\n")
    conclusions = []
    for index, line in enumerate(lines):
        words = (*_CONCLUSION_MARKERS, "=") if index == len(lines) - 1 else _CONCLUSION_MARKERS
        # The first of the shortest, as an empty one gives way to any that follows.
        shortest = ""
        for tail in (line.split(word)[-1].strip() for word in words if word in line):
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in _PUNCTUATION_MARKS:
            conclusions.append(shortest)
    said = conclusions or [whole]
    numbers = [
        number
        for text in said
        for form in (_WITH_COMMAS, _SCIENTIFIC, _PLAIN)
        for number in form.findall(text)
    ]
    return {value for text in (*said, *numbers) for value in _values(text)}


def is_right_open(reply: str, answers: Sequence[str]) -> bool:
    """Whether a reply to an open question has a right number, or a right text within its own."""
    right = {value for answer in answers for value in _values(answer)}
    texts = [value for value in right if isinstance(value, str)]
    return any(
        any(text in said for text in texts) if isinstance(said, str) else said in right
        for said in parse_open(reply)
    )


def discipline_scores(replies: Mapping[str, str], keys: Mapping[str, Key]) -> dict[str, float]:
    """Compute the share of right replies, by discipline and in all.

    Args:
        replies: By question, whose id names its subject.
        keys: The right answers to those questions, and maybe to others.

    Returns:
        `overall`, then each discipline that has a question: every question weighs the same.

    Raises:
        InputError: There are no replies, or an id has no subject.
    """
    if not replies:
        raise InputError("There are no replies to score.")
    draw = random.Random(RANDOM_OPTION_SEED)
    right: dict[str, bool] = {}
    for question, reply in replies.items():
        key = keys[question]
        if key.options is None:
            right[question] = is_right_open(reply, key.answers)
        else:
            choice = parse_choice(reply, key.options)
            letters = OPTION_LETTERS[: len(key.options)]
            right[question] = (choice or draw.choice(letters)) in key.answers
    scores = {"overall": sum(right.values()) / len(right)}
    for discipline, subjects in DISCIPLINES.items():
        its = [value for question, value in right.items() if subject_of(question) in subjects]
        if its:
            scores[discipline] = sum(its) / len(its)
    return scores


def _values(text: str) -> list[str | float]:
    """A number to two decimals, or a text in lower case; a letter only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), _ROUNDED_DECIMALS)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
