"""How people ask: many wordings of each kind of request, and some that no training shows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

from fastvlm_example import DESCRIPTION_PROMPT, SCENE_PROMPT, SENTENCE_PROMPT

NOUNS = ("picture", "image", "photo", "photograph")
IMAGES = (
    *(f"{word} {noun}" for noun in NOUNS for word in ("the", "this")),
    "the attached image",
    "this shot",
    "what you see",
)
"""What a request calls its image."""

SENTENCE_FORMS = (
    *product(
        ("Describe {image}", "Caption {image}", "Summarise {image}", "Say what is in {image}"),
        (
            "",
            " in one sentence",
            " in a sentence",
            " with one sentence",
            " with a single sentence",
            " in a single short sentence",
            " briefly",
            " in a few words",
            " in one line",
            " shortly",
        ),
    ),
    *product(
        ("Write", "Give", "Suggest", "Generate", "Make up"),
        (
            " a caption for {image}",
            " one sentence about {image}",
            " a short caption of {image}",
            " a brief description of {image}",
            " a one-sentence description of {image}",
            " an alt text for {image}",
        ),
    ),
    *product(
        ("What is", "What can be seen", "What do you see", "What is happening", "What is shown"),
        (" in {image}?", " in {image}? Answer in one sentence.", " in {image}? Be brief."),
    ),
    *product(
        ("What does {image} show?", "Who or what is in {image}?", "What is {image} about?"),
        ("", " One sentence, please.", " Answer shortly."),
    ),
)
"""Requests for one sentence, as parts to be joined."""

DESCRIPTION_FORMS = (
    *product(
        (
            "Describe {image}",
            "Say what is in {image}",
            "Tell me about {image}",
            "Write about {image}",
        ),
        (
            " in several sentences",
            " in detail",
            " in a few sentences",
            " in two or three sentences",
            " with several sentences",
            " in a paragraph",
            " at length",
            " as fully as you can",
            " closely",
        ),
    ),
    *product(
        ("Write", "Give", "Generate", "Compose"),
        (
            " a detailed description of {image}",
            " a paragraph about {image}",
            " several sentences about {image}",
            " a long description of {image}",
            " a full account of {image}",
        ),
    ),
    *product(
        ("What is", "What can be seen", "What do you see", "What is happening"),
        (
            " in {image}? Write several sentences.",
            " in {image}? Answer in detail.",
            " in {image}? Use a few sentences.",
            " in {image}? Tell me everything.",
        ),
    ),
    *product(("What does {image} show?",), (" Give all the details.", " Write a paragraph.")),
)
"""Requests for several sentences, as parts to be joined."""

QUESTION_FORMS = (
    *product(
        (
            "What colour is the {thing}?",
            "What color is the {thing}?",
            "Is there a {thing} in {image}?",
            "Is the {thing} moving?",
            "How many {thing}s are there?",
            "Where is the {thing}?",
            "What is the {thing} doing?",
            "Which is bigger, the {thing} or the other one?",
            "Do you see a {thing}?",
            "What is beside the {thing}?",
        ),
        ("", "\nAnswer the question using a single word or phrase.", " Answer yes or no."),
    ),
    *product(
        ("Where was {image} taken?", "Who is in {image}?", "What time of day is it in {image}?"),
        ("", "\nAnswer the question using a single word or phrase."),
    ),
)
"""Questions, which the model can't answer: it says what it sees, in a sentence."""

SCENE_FORMS = (
    *product(
        ("Describe {scene}", "Say what is in {scene}", "Report {scene}"),
        (
            "",
            " exactly",
            " completely",
            " thing by thing",
            " with every place",
            " with all relations",
        ),
    ),
    *product(
        ("What is in {scene}?", "What does {scene} contain?"),
        ("", " Describe all of it.", " Name every place.", " Be exact."),
    ),
    *product(
        ("List", "Name", "Count", "Enumerate"),
        (
            " all objects and their places",
            " everything on the background",
            " the objects with size, colour, shape and place",
            " each object and where it lies",
        ),
    ),
    *product(
        ("Where is each object?", "Which objects are there?"),
        ("", " Say it exactly.", " Give sizes and colours."),
    ),
)
"""Requests for a scene's exact description, as parts to be joined."""

SCENES = ("the scene", "this scene", "the grid", "the rendered scene", "the drawing")
"""What a request calls a scene."""

THINGS = (
    *("dog", "ball", "man", "woman", "child", "shirt", "car", "bike", "hat", "tree", "boat"),
    *("horse", "cat", "table", "bird", "sign", "building", "bus", "plate", "cup", "player"),
)
"""What questions are about."""

CANONICAL = {
    "scene": SCENE_PROMPT,
    "sentence": SENTENCE_PROMPT,
    "description": DESCRIPTION_PROMPT,
}
"""The wording of each kind that the package gives as a constant."""

HELD_OUT = {
    "scene": (
        "Which shapes do you see, and where are they?",
        "State precisely what this scene shows.",
    ),
    "sentence": (
        "Provide a one-sentence caption for the provided image.",
        "Sum up the photo in one line.",
        "Caption this.",
        "Write a single sentence saying what this image shows.",
        "What's going on here?",
        "I can't see the picture; tell me in one sentence what it is.",
        "What sport is this?\nAnswer the question using a single word or phrase.",
    ),
    "description": (
        "Describe the image in several sentences.",
        "Explain in detail what this photo shows.",
        "Talk me through this picture.",
        "Please write a thorough description of the photograph.",
    ),
}
"""Wordings that no training shows: what `evaluate` and `benchmark` ask by default, and more."""

FORMS = {
    "scene": (SCENE_FORMS,),
    "sentence": (SENTENCE_FORMS, SENTENCE_FORMS, SENTENCE_FORMS, QUESTION_FORMS),
    "description": (DESCRIPTION_FORMS,),
}
"""The forms of each kind's requests; of several sets, each is as likely as the others."""
CANONICAL_SHARE = 0.25
"""How often a request is in its kind's canonical words."""
LOWER_SHARE = POLITE_SHARE = 0.2
"""How often a request begins with a small letter, and how often with one of `POLITE`."""
POLITE = ("Please ", "Can you ", "Could you ", "Kindly ")
"""What may stand before a request that begins with a verb."""


def wording(kind: str) -> str:
    """Return a request of a kind in words drawn at random; never one that is held out."""
    if random.random() < CANONICAL_SHARE:
        return CANONICAL[kind]
    held_out = {*map(plain, HELD_OUT[kind])}
    while True:
        text = varied(random.choice(random.choice(FORMS[kind])))
        if plain(text) not in held_out:
            return text


def plain(text: str) -> str:
    """Return a request without what `varied` varies at its ends."""
    return text.lower().rstrip(".!?")


def varied(parts: Sequence[str]) -> str:
    """Join the parts of a request, name what it is about, and vary what people vary."""
    text = filled(parts, random.choice(IMAGES), random.choice(SCENES), random.choice(THINGS))
    lower = text[0].lower() + text[1:]
    if text.endswith(("?", ".")):
        return lower if random.random() < LOWER_SHARE else text
    if random.random() < POLITE_SHARE:
        polite = random.choice(POLITE)
        return polite + lower + ("?" if "you" in polite else ".")
    return random.choice((text, text, text, lower)) + random.choice((".", ".", ".", "", "!"))


def filled(parts: Sequence[str], image: str, scene: str, thing: str) -> str:
    """Join the parts of a request, and name what it is about."""
    return "".join(parts).format(image=image, scene=scene, thing=thing)


def all_forms() -> list[str]:
    """Return each form once, for a tokenizer to learn from."""
    return [
        filled(parts, IMAGES[number % len(IMAGES)], SCENES[0], THINGS[number % len(THINGS)])
        for forms in (SENTENCE_FORMS, DESCRIPTION_FORMS, QUESTION_FORMS, SCENE_FORMS)
        for number, parts in enumerate(forms)
    ] + [*CANONICAL.values()]
