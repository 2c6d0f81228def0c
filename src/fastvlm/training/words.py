"""A new projector's first task: visual tokens near the embeddings of the words that are said.

No decoder runs, so it costs a hundredth of teacher forcing; and a decoder that reads words where an
image stands has less to learn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastvlm.checkpoints.processors import tokenizer_of
from fastvlm.data.conversations import Broken, Conversation, Records, Shards, opened
from fastvlm.data.feed import Feed
from fastvlm.functional.digests import digest_of_weights
from fastvlm.functional.errors import InputError
from fastvlm.functional.placement import moved
from fastvlm.prompts.messages import images_of
from fastvlm.training.assembly import show_images_of
from fastvlm.training.digests import digest_of_source
from fastvlm.training.instruction import save_tuned
from fastvlm.training.loop import train
from fastvlm.training.paper_stages import PaperStage
from fastvlm.training.parts import projector_of
from fastvlm.training.processes import this_process
from fastvlm.training.replies import text_of
from fastvlm.training.schedule import Schedule
from fastvlm.training.step_feed import StepFeed
from fastvlm.training.task import ExampleStream, Losses
from fastvlm.vision.fastvithd import FastViTHD
from fastvlm.vision.images import prepare

FEWEST_RECORDS = 10
"""Records that a token must occur in to be one of the words."""
LARGEST_SHARE = 0.5
"""The share of the records up to which a token says something about an image."""
COUNTED_RECORDS = 20_000
"""Records that the words are counted in, evenly spaced."""
SHARPNESS = 25.0
"""What similarities, from -1 to 1, are multiplied by to be logits."""


@dataclass(frozen=True, slots=True)
class Words:
    """The tokens that images are to be told by.

    Args:
        tokens: Their ids.
        weights: The logarithm of how rare each is.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


def reply_tokens(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Counter[int]:
    """Return in how many of a conversation's replies each token is, as inside a sentence."""
    said = [text_of(turn) for turn in conversation.messages if turn["role"] == "assistant"]
    found: Counter[int] = Counter()
    for text in (*said, *conversation.alternatives):
        found.update({*tokenizer.encode(f" {text}", add_special_tokens=False)})
    return found


def count_words(source: Records, tokenizer: PreTrainedTokenizerBase) -> Words:
    """Return the tokens of a data set's replies that are neither rare nor everywhere.

    Raises:
        InputError: There are none.
    """
    records = [source[place] for place in range(0, len(source), 1 + len(source) // COUNTED_RECORDS)]
    counts: Counter[int] = Counter()
    for record in records:
        if isinstance(record, Conversation):
            counts.update(reply_tokens(record, tokenizer).keys())
    words = {
        token: math.log(len(records) / count)
        for token, count in sorted(counts.items())
        if FEWEST_RECORDS <= count <= LARGEST_SHARE * len(records)
    }
    if not words:
        raise InputError(
            f"No token is in {FEWEST_RECORDS} replies and in at most half of them; the data is too"
            " small to learn words from."
        )
    return Words(tuple(words), tuple(words.values()))


@dataclass(frozen=True, slots=True)
class WordExample:
    """An image, and what is said of it.

    Args:
        pixels: (parts, 3, side, side) in [0, 1].
        counts: In how many replies each token is.
    """

    pixels: Tensor
    counts: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class WordExampleMaker:
    """Makes an example of a conversation whose images are not open yet, as a worker does.

    Args:
        tokenizer: The model's.
        image_size: Side in pixels of the images.
    """

    tokenizer: PreTrainedTokenizerBase
    image_size: int

    def __call__(self, conversation: Conversation) -> WordExample | Broken:
        """Return the example, or why there is none."""
        record = opened(conversation)
        if isinstance(record, Broken):
            return record
        shown = images_of(record.messages)
        if not shown:
            return Broken(record.name, "no image: there is nothing to tell by words")
        pixels = torch.cat([prepare(image, self.image_size) for image in shown])
        return WordExample(pixels, reply_tokens(record, self.tokenizer))


class WordsTask:
    """Teaches a projector to tell an image by words; all else is frozen. See `TrainingTask`.

    An image's logit of a word is the soft maximum, over its visual tokens, of their similarity with
    the word's embedding, both without what all words have in common. The loss is the cross-entropy
    with the words that are said, the rarer the heavier. Visual tokens are kept as large as words.

    Args:
        model: A model around a FastViTHD.
        words: The words.
        feed: The conversations.
        examples: What makes examples of them.
        batch: Images that this process takes in a step.
        plan: See `TrainingTask`.
        workers: Processes that prepare images ahead.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        words: Words,
        feed: Feed,
        examples: WordExampleMaker,
        batch: int,
        plan: Mapping[str, Any] | None = None,
        workers: int = 0,
    ) -> None:
        # Which methods a composite model has is its class's matter.
        self.model: Any = model.eval().requires_grad_(False)
        self.module: nn.Module = projector_of(model).requires_grad_(True)
        self.unit = "images"
        self.whole: str | None = None
        self.plan: Mapping[str, Any] = plan or {}
        self.source: ExampleStream | None = feed
        self.feed = StepFeed(feed, examples, batch, workers)
        self.places = {token: place for place, token in enumerate(words.tokens)}
        tokens = torch.tensor(words.tokens, device=model.device)
        with torch.no_grad():
            embedded = model.get_input_embeddings()(tokens).float()
        self.weights = torch.tensor(words.weights, device=model.device)
        self.common, self.size = embedded.mean(0), embedded.square().mean().sqrt()
        self.directions = F.normalize(embedded - self.common, dim=-1)

    def draw(self, step: int) -> list[WordExample]:
        """Return the examples of a step. See `TrainingTask.draw`."""
        return self.feed.draw()

    def close(self) -> None:
        """End the workers."""
        self.feed.close()

    def loss(self, examples: Sequence[WordExample]) -> Losses:
        """Return the loss of some examples. See `TrainingTask.loss`."""
        pixels = torch.cat([one.pixels for one in examples]).to(self.model.device)
        visual = torch.cat([*self.model.get_image_features(pixels).pooler_output]).float()
        parts = [len(one.pixels) * len(visual) // len(pixels) for one in examples]
        similar = F.normalize(visual - self.common, dim=-1) @ self.directions.T
        logits = torch.stack(
            [
                (SHARPNESS * shown).logsumexp(0) - math.log(len(shown))
                for shown in similar.split(parts)
            ]
        )
        said = torch.stack([self.said(one) for one in examples])
        words = -(said * logits.log_softmax(-1)).sum()
        sizes = visual.square().mean(-1).sqrt() / self.size
        apart = torch.stack([(shown - 1).square().mean() for shown in sizes.split(parts)]).sum()
        number = len(examples)
        report = {"words": (float(words.detach()), number), "size": (float(apart.detach()), number)}
        return Losses(words + apart, number, report)

    def said(self, example: WordExample) -> Tensor:
        """Return the share of each word in what is said of an image: (words,)."""
        counts = torch.zeros_like(self.weights)
        for token, count in example.counts.items():
            if token in self.places:
                counts[self.places[token]] = count
        weighed = counts * self.weights
        return weighed / weighed.sum().clamp(min=torch.finfo(weighed.dtype).tiny)


def teach_words(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    source: Records | Shards,
    stage: PaperStage,
    schedule: Schedule,
    output: Path,
) -> None:
    """Teach a model's projector words and save the model, in bfloat16, as `output`.

    Args:
        model: The model, in float32.
        processor: Its processor, or its tokenizer alone.
        source: The conversations.
        stage: Size of the images and of the steps; the projector alone learns.
        schedule: Length and learning rate.
        output: The directory of the model in the end, and of the checkpoint, in `training`.

    Raises:
        InputError: The model is not one around FastViTHD, the data is streamed, or too many records
            are broken.
    """
    tower = getattr(model.base_model, "vision_tower", None)
    if not isinstance(tower, FastViTHD):
        raise InputError(f"{type(model).__name__} has no FastViTHD encoder; teach it replies.")
    if not isinstance(source, Records):
        raise InputError("The words are counted first, so this data can't be streamed.")
    torch.manual_seed(schedule.seed)
    process = this_process()
    moved(model, process.device)
    size = tower.config.image_size if stage.image_size is None else stage.image_size
    tokenizer = tokenizer_of(processor)
    feed = Feed(
        source, seed=schedule.seed, process=process.process_index, processes=process.num_processes
    )
    plan = {
        "objective": "words",
        "image_size": size,
        "batch": stage.batch,
        "model": digest_of_weights(model),
        "data": digest_of_source(source),
    }
    batch = max(1, stage.batch // process.num_processes)
    words, examples = count_words(source, tokenizer), WordExampleMaker(tokenizer, size)
    with closing(WordsTask(model, words, feed, examples, batch, plan, schedule.workers)) as task:
        train(task, schedule, output / "training")
    show_images_of(model, size)
    save_tuned(model, processor, output)
