"""The model that lmms-eval is given; importing this needs lmms-eval."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lmms_eval.api import instance as lmms_instance
from lmms_eval.api.model import lmms
from PIL import Image

from fastvlm.decoding import Request
from fastvlm.decoding.options import split_options
from fastvlm.evaluation.likelihood import likelihoods
from fastvlm.functional.errors import InputError
from fastvlm.functional.messages import Message
from fastvlm.vlm import load

IMAGE_PLACEHOLDER = "<image>"
"""The placeholder of images in some tasks' texts; it is removed, as images come before the text."""
MAX_NEW_TOKENS = 1024
"""The maximum number of tokens in a reply, if a task sets none."""


class FastVlm(lmms):
    """A model and its draft.

    Args:
        pretrained: A directory, or a name on the Hugging Face hub; None for the example model.
        draft: The draft's directory; None for none.
        strategy: The strategy's name; None for the model's default.
        device: The device to compute on.
        dtype: The precision to compute in.
        batch_size: The maximum number of requests decoded together.

    Raises:
        CheckpointError: The model or the draft is missing or broken.
        InputError: An argument is out of range.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        draft: str | None = None,
        *,
        strategy: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int | str = 1,
    ) -> None:
        super().__init__()
        self.vlm = load(
            pretrained,
            draft,
            dtype=getattr(torch, dtype),
            device=device,
            max_slots=int(batch_size),
        )
        self.strategy = self.vlm.strategy(strategy)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return a reply to each request.

        Args:
            requests: lmms-eval's instances, whose `args` are the text, the generation options, a
                function that returns a document's images, the document's number, the task and its
                split.

        Raises:
            InputError: A request has visuals that are not images, or asks for beam search.
        """
        # What can be refused is refused before anything is decoded.
        wanted = [generation(instance.args[1]) for instance in requests]
        places: dict[Request, int] = {}

        def made() -> Iterator[Request]:
            for place, (instance, options) in enumerate(zip(requests, wanted, strict=True)):
                context, _, visual, document, task, split = instance.args
                messages = self.messages(context, visual(self.task_dict[task][split][document]))
                request = self.vlm.request(messages, strategy=self.strategy, **options)
                places[request] = place
                yield request

        replies = [""] * len(requests)
        for request in self.vlm.engine.run(made()):
            if request.error is not None:
                raise request.error
            place = places[request]
            replies[place] = self.vlm.reply(request).text.strip()
            key = requests[place].args[:2]
            self.cache_hook.add_partial("generate_until", key, replies[place])
        return replies

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Return the loss of each target, and whether it is the greedy reply.

        lmms-eval calls it a log-likelihood, but its tasks choose the smallest one: its own models
        return the mean cross-entropy of the target's tokens.

        Args:
            requests: As for `generate_until`, with the target in place of the generation options: a
                text, or a function that returns a document's.
        """
        found = []
        for request in requests:
            context, target, visual, document, task, split = request.args
            content = self.task_dict[task][split][document]
            prompt = self.vlm.request(self.messages(context, visual(content)))
            text = target if isinstance(target, str) else target(content)
            [one] = likelihoods(self.vlm, prompt, [text])
            length = len(self.vlm.tokenizer.encode(text, add_special_tokens=False))
            found.append(scored(-one.text / length, greedy=one.greedy))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: tasks of several rounds are not supported."""
        raise InputError(f"fastvlm answers tasks of one round; got {len(requests)} of several.")

    def messages(self, context: str, visuals: Iterable[Any] | None) -> list[Message]:
        """Return a request as a dialogue of one turn.

        Raises:
            InputError: There are visuals that are not images.
        """
        shown = list(visuals or ())
        for one in shown:
            if not isinstance(one, Image.Image):
                raise InputError(f"fastvlm is shown images; got {type(one).__name__}.")
        text = context.replace(IMAGE_PLACEHOLDER, "").strip()
        images = [{"type": "image", "image": image} for image in shown]
        return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def scored(loss: float, *, greedy: bool) -> Any:
    """Return a target's loss and whether it is the greedy reply, in lmms-eval's format.

    lmms-eval 0.7.3 turns a pair into a string, which its choice tasks then can't read, but leaves
    the contents of a `GenerationResult` as they are. Earlier versions have no such class.
    """
    wrapper = getattr(lmms_instance, "GenerationResult", None)
    return (loss, greedy) if wrapper is None else wrapper((loss, greedy))


def generation(options: dict[str, Any]) -> dict[str, Any]:
    """Return generation options as options of `VisionLanguageModel.request`.

    Args:
        options: The options of lmms-eval's tasks: `max_new_tokens`, `until`, `do_sample`,
            `temperature`, `top_p`, `num_beams`.

    Raises:
        InputError: Beam search is asked for, or an option is out of range.
    """
    if options.get("num_beams") not in (None, 1):
        raise InputError(f"fastvlm decodes without beams; got num_beams={options['num_beams']}.")
    until = options.get("until") or ()
    found: dict[str, Any] = {
        "max_new_tokens": options.get("max_new_tokens") or MAX_NEW_TOKENS,
        "stop": [until] if isinstance(until, str) else list(until),
    }
    if options.get("do_sample") and options.get("temperature"):
        found["temperature"] = options["temperature"]
        if options.get("top_p") is not None:
            found["top_p"] = options["top_p"]
    split_options(found)
    return found
