"""A judge: a language model behind an endpoint of OpenAI's protocol.

The prompts are our own, so the grades are not comparable with those of the papers.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from fastvlm.data.tasks import EvaluationTask
from fastvlm.data.tasks.llava_wild import LlavaWild
from fastvlm.data.tasks.mmvet import MmVet
from fastvlm.functional.errors import InputError

MAX_ATTEMPTS, FIRST_PAUSE_SECONDS, TIMEOUT_SECONDS = 4, 2.0, 120.0
"""Attempts for each prompt; the pause after the first, doubled each time; the limit of each."""
TOO_MANY_REQUESTS_STATUS, SERVER_ERROR_STATUS = 429, 500
"""HTTP status codes after which a request is repeated: 429, and 500 and above."""
NUMBER_PATTERN = re.compile(r"\d+(?:\.\d+)?")

CORRECTNESS_PROMPT = """\
Grade a reply to a question about an image that you can't see. You are given the right answer, in \
which <AND> joins parts that are all needed and <OR> separates answers that are each right. Give a \
number from 0.0 (nothing of it is right) to 1.0 (all of it is right) in steps of 0.1; more detail \
than the right answer has is no mistake. Answer with the number alone.

Question: {question}
Right answer: {answer}
Reply: {reply}
Grade:"""

COMPARISON_PROMPT = """\
Two assistants were asked about an image. You can't see it; this is what it shows:
{context}

The question: {question}

What the first assistant replied:
{reference}

What the second assistant replied:
{reply}

Grade how helpful, relevant, accurate and detailed each reply is, from 1 to 10. Their order means \
nothing. Answer with two numbers alone: the first assistant's grade, a space, the second's."""


class Judge:
    """A language model that grades replies.

    Args:
        url: The endpoint up to its version, such as `http://localhost:8000/v1`.
        model: The model's name at the endpoint.
        key: The API key; None for none.
        sleep: Waits for a number of seconds.

    Raises:
        InputError: The URL is not one of HTTP or HTTPS.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"A judge's address starts with http:// or https://; got {url!r}.")
        self.url, self.model, self.key, self.sleep = url.rstrip("/"), model, key, sleep

    def grade(self, task: EvaluationTask[Any], item: str, reply: str) -> Any:
        """Return the grade of a reply, in the form that the task's `score` takes.

        Args:
            task: MM-Vet or LLaVA-Bench.
            item: The item's id.
            reply: The model's reply.

        Raises:
            InputError: The judge can't be reached, or doesn't answer with grades.
        """
        question = next(one.prompt for one in task.items if one.id == item)
        if isinstance(task, MmVet):
            text = CORRECTNESS_PROMPT.format(
                question=question, answer=task.answers[item], reply=reply
            )
            return self.numbers(text, 1, 0.0, 1.0)
        if isinstance(task, LlavaWild):
            text = COMPARISON_PROMPT.format(
                context=task.contexts[item],
                question=question,
                reference=task.references[item],
                reply=reply,
            )
            return self.numbers(text, 2, 1.0, 10.0)
        raise InputError(f"fastvlm doesn't know how {task.name} is judged.")

    def numbers(self, text: str, count: int, low: float, high: float) -> list[float]:
        """Return the grades in the judge's answer to a prompt.

        Args:
            text: The prompt.
            count: The number of grades asked for.
            low: The lowest valid grade.
            high: The highest valid grade.

        Raises:
            InputError: There are fewer grades than asked for, or one is out of range.
        """
        said = self.ask(text)
        found = [float(number) for number in NUMBER_PATTERN.findall(said)]
        if len(found) < count or not all(low <= grade <= high for grade in found[:count]):
            raise InputError(
                f"The judge {self.model} was asked for {count} number{'s' * (count > 1)} from"
                f" {low:g} to {high:g}, but said {said[:80]!r}."
            )
        return found[:count]

    def ask(self, text: str) -> str:
        """Return the judge's answer to a prompt.

        Raises:
            InputError: The judge can't be reached, or refuses.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        address = f"{self.url}/chat/completions"
        # The scheme was looked at above: no file is opened by this.
        request = Request(address, json.dumps(body).encode(), headers)
        for attempt in range(MAX_ATTEMPTS):
            last = attempt == MAX_ATTEMPTS - 1
            try:
                with urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                    said = json.load(response)
                return str(said["choices"][0]["message"]["content"])
            except HTTPError as error:
                if last or (
                    error.code != TOO_MANY_REQUESTS_STATUS and error.code < SERVER_ERROR_STATUS
                ):
                    raise InputError(f"The judge at {address} refuses: {error}.") from error
            except (URLError, TimeoutError) as error:
                if last:
                    raise InputError(
                        f"The judge at {address} can't be reached: {error}."
                    ) from error
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise InputError(
                    f"What the judge at {address} sends is not as OpenAI's protocol has it."
                ) from error
            self.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
        raise AssertionError  # the last attempt returns or raises
