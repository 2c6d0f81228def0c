"""Requests: messages and options of every kind, to a small model with a draft."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st

from fastvlm.functional.errors import FastVlmError
from fastvlm_example.scenes import render, sample
from tests.fuzzing.area import WrongError
from tests.fuzzing.models import LLAVA, small_models
from tests.fuzzing.mutations import odd_numbers, odd_texts, odd_values

IMAGE = "an image"
"""Stands in a case for an image, which is no plain data."""
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "max_new_tokens": st.integers(-1, 12) | odd_numbers.filter(lambda n: not n > 12),
    "temperature": odd_numbers,
    "top_p": odd_numbers,
    "top_k": odd_numbers,
    "min_p": odd_numbers,
    "repetition_penalty": odd_numbers,
    "presence_penalty": odd_numbers,
    "frequency_penalty": odd_numbers,
    "logit_bias": st.dictionaries(st.integers(-2, 400), odd_numbers, max_size=3) | odd_values,
    "seed": odd_numbers,
    "stop": odd_texts | st.lists(odd_texts, max_size=3) | odd_values,
    "logprobs": odd_values,
    "image_size": st.integers(-64, 256) | odd_values,
    "fit": odd_texts,
    "tiles": st.integers(-1, 5),
    "temprature": st.just(1),
}


SENSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "max_new_tokens": st.integers(1, 12),
    "temperature": st.floats(0, 3),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(1, 60),
    "min_p": st.floats(0, 0.5),
    "repetition_penalty": st.floats(0.5, 2),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 40), st.floats(-100, 100), max_size=3),
    "seed": st.integers(0, 2**40),
    "stop": st.text(min_size=1, max_size=2),
}
"""Options as people give them."""


@dataclass(frozen=True, slots=True)
class Request:
    """What `generate` is given."""

    model: str
    prompt: Any
    shows_image: bool
    options: dict[str, Any]


class Requests:
    """See `Area`."""

    name: ClassVar[str] = "requests"
    share: ClassVar[float] = 0.1

    def __init__(self, folder: Path) -> None:
        self.models = small_models(folder)
        self.image = render(sample(3), 64)

    def cases(self) -> st.SearchStrategy[Any]:
        """See `Area`."""
        part = st.one_of(
            st.fixed_dictionaries({"type": st.just("text"), "text": odd_texts}),
            st.just({"type": "image", "image": IMAGE}),
            st.fixed_dictionaries(
                {"type": st.sampled_from(["text", "image", "image_url", "video", "input_image"])},
                optional={
                    "text": odd_values,
                    "image": odd_values,
                    "url": odd_texts,
                    "image_url": odd_values,
                },
            ),
            odd_values,
        )
        message = st.one_of(
            st.fixed_dictionaries(
                {
                    "role": st.sampled_from(["user", "user", "assistant", "system", "tool", ""]),
                    "content": odd_texts | st.lists(part, max_size=3) | odd_values,
                }
            ),
            odd_values,
        )
        usual = st.just(
            {
                "role": "user",
                "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What?"}],
            }
        )
        prompt = st.one_of(
            st.just("What is it?"),
            st.text(max_size=30),
            odd_texts,
            st.lists(usual | message, min_size=1, max_size=3),
            st.lists(message, max_size=4),
            message | odd_values,
        )
        some = st.fixed_dictionaries({}, optional=OPTIONS)
        few = st.fixed_dictionaries({}, optional=SENSIBLE)
        return st.builds(
            Request,
            st.sampled_from(sorted(self.models)),
            prompt,
            st.booleans(),
            st.one_of(st.just({}), few, few, some),
        )

    def check(self, case: Request) -> None:
        """See `Area`."""
        vlm = self.models[case.model]
        options = {"max_new_tokens": 8, "seed": 5, **case.options}
        prompt = self.shown(case.prompt)
        image = self.image if case.shows_image else None
        try:
            reply = vlm.generate(prompt, image, **options)
        finally:
            # Whatever it was, the next one is answered.
            after = vlm.generate("What is it?", self.image, max_new_tokens=3)
            if not after.token_ids:
                raise WrongError("the request after it has no reply")
        first = reply.token_ids
        if isinstance(options["max_new_tokens"], int) and len(first) > options["max_new_tokens"]:
            raise WrongError(f"{len(first)} tokens")
        name = "early-exit" if case.model == LLAVA else "autoregressive"
        try:
            second = vlm.generate(prompt, image, strategy=name, **options).token_ids
        except FastVlmError as error:
            raise WrongError(f"refused under {name} alone: {error}") from error
        if first != second:
            raise WrongError(f"{first} and under {name} {second}")

    def shown(self, value: Any) -> Any:
        """Return a prompt with images in their places."""
        if isinstance(value, dict):
            return {key: self.shown(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.shown(inner) for inner in value]
        return self.image if isinstance(value, str) and value == IMAGE else value
