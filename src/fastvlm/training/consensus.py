"""Self-critical training: sentences of a model's own, rewarded by what people say of an image.

Teacher forcing teaches to imitate people's captions word by word, whatever is unsure of them. Here
the model samples sentences, and those that agree better with an image's captions than its other
samples become likelier (Rennie et al. 2017, arXiv 1612.00563; the mean of the other samples as
baseline: Luo 2020, arXiv 2003.09971).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastvlm.data.conversations import Broken, Conversation, Records, Shards, opened
from fastvlm.data.feed import Feed
from fastvlm.functional.errors import InputError
from fastvlm.language.structure import text_decoder
from fastvlm.metrics.captions import CiderD
from fastvlm.metrics.tokenization import tokenize_caption
from fastvlm.training.replies import text_of
from fastvlm.training.reply_scores import reply_loss
from fastvlm.training.rollouts import Rollouts
from fastvlm.training.rows import FastViTHDRows, RowBuilder, TrainingRow
from fastvlm.training.step_feed import StepFeed
from fastvlm.training.task import ExampleStream, Losses

SAMPLES = 5
"""Sentences sampled of an image."""
MAX_NEW_TOKENS = 24
"""Tokens of the longest sentence."""
FEWEST_CAPTIONS = 2
"""Captions that an image must have to reward a sentence by."""
END = "</s>"
"""Stands after each caption in the reward, or a sentence that breaks off would be as good."""


def compared(captions: Iterable[str]) -> list[list[str]]:
    """Return the tokens of captions, as they are compared."""
    return [[*tokenize_caption(caption), END] for caption in captions]


def captions_of(conversation: Conversation) -> list[list[str]]:
    """Return the tokens of a conversation's last replies, as they are compared."""
    return compared((text_of(conversation.messages[-1]), *conversation.alternatives))


def consensus_of(source: Records | Shards) -> CiderD:
    """Return what scores sentences by the captions of a data set.

    Raises:
        InputError: The data is streamed, or has no image with several captions.
    """
    if not isinstance(source, Records):
        raise InputError("The captions are counted first, so this data can't be streamed.")
    found = [captions_of(one) for one in source if isinstance(one, Conversation)]
    if not any(len(captions) >= FEWEST_CAPTIONS for captions in found):
        raise InputError(
            "A consensus needs several captions of an image in one record: rows with captions."
        )
    return CiderD(found)


@dataclass(frozen=True, slots=True)
class CaptionedRow:
    """An image with its captions.

    Args:
        prompt: What comes before a caption: (length,).
        pixels: (parts, 3, side, side) in [0, 1].
        captions: Their tokens, as they are compared.
        taught: The row in which they are learnt.
    """

    prompt: Tensor
    pixels: Tensor
    captions: list[list[str]]
    taught: list[TrainingRow]


@dataclass(frozen=True, slots=True)
class CaptionedRowMaker:
    """Makes rows of conversations whose images are not open yet, as a worker does.

    Args:
        rows: What makes a model's rows.
    """

    rows: FastViTHDRows

    def __call__(self, conversation: Conversation) -> CaptionedRow | Broken:
        """Return a row, or why there is none."""
        record = opened(conversation)
        if isinstance(record, Broken):
            return record
        if len(record.alternatives) + 1 < FEWEST_CAPTIONS:
            return Broken(record.name, "too few captions to agree with")
        try:
            written, images = self.rows.write_all(record)
        except InputError as error:
            return Broken(record.name, str(error))
        if not images:
            return Broken(record.name, "no image: there is nothing to agree about")
        prompt = torch.tensor(written[0].token_ids[: written[0].prompt_length])
        taught = self.rows.lay_out(written, images)
        return CaptionedRow(prompt, images["pixel_values"], captions_of(record), taught)


class SelfCritic:
    """Has a model describe images by sampling, and rewards what agrees with their captions.

    Args:
        model: The model.
        rows: What makes its rows.
        scorer: What scores a sentence.
    """

    def __init__(self, model: PreTrainedModel, rows: FastViTHDRows, scorer: CiderD) -> None:
        self.rollouts, self.scorer = Rollouts(model, rows), scorer

    def loss(self, examples: Sequence[CaptionedRow]) -> tuple[Tensor, Tensor]:
        """Return the self-critical loss, a mean over tokens, and the rewards: (images, samples)."""
        shown = [one.prompt for one in examples], [one.pixels for one in examples]
        replies = self.rollouts.decode(
            *shown, times=SAMPLES, do_sample=True, top_k=0, max_new_tokens=MAX_NEW_TOKENS
        )
        rewards = torch.tensor(
            [
                [self.reward(reply, one.captions) for reply in said]
                for one, said in zip(examples, replies, strict=True)
            ]
        )
        losses = self.rollouts.losses(*shown, replies)
        lengths = torch.tensor([len(reply) for said in replies for reply in said])
        gains = advantages(rewards).flatten().repeat_interleave(lengths).to(losses.device)
        return (gains * losses).mean(), rewards

    def reward(self, reply: Sequence[int], captions: Sequence[Sequence[str]]) -> float:
        """Return how far a reply agrees with captions: CIDEr-D."""
        ended = [END] if self.rollouts.has_ended(reply) else []
        return self.scorer.score([*tokenize_caption(self.rollouts.text(reply)), *ended], captions)


class ConsensusTask:
    """Teaches a model captions, and its own sentences by their rewards. See `TrainingTask`.

    Args:
        model: A model around a FastViTHD.
        rows: What makes its rows.
        scorer: What scores a sentence.
        feed: The images with captions, and how a step draws them.
        plan: See `TrainingTask`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: FastViTHDRows,
        scorer: CiderD,
        feed: StepFeed[CaptionedRow],
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model.eval()
        text_decoder(model).train()
        self.module: nn.Module = model
        self.unit = "tokens"
        self.plan: Mapping[str, Any] = plan or {}
        self.whole: str | None = "the rewards of a step are set against one another"
        self.rows, self.feed = rows, feed
        self.critic = SelfCritic(model, rows, scorer)
        self.source: ExampleStream | None = feed.feed

    def draw(self, step: int) -> list[CaptionedRow]:
        """Return the images of a step. See `TrainingTask.draw`."""
        return self.feed.draw()

    def close(self) -> None:
        """End the workers."""
        self.feed.close()

    def loss(self, examples: Sequence[CaptionedRow]) -> Losses:
        """Return the captions' cross-entropy, and as heavy the self-critical loss of samples."""
        taught = reply_loss(self.model, self.rows, [row for one in examples for row in one.taught])
        loss, rewards = self.critic.loss(examples)
        report = {**taught.report, "reward": (float(rewards.sum()), float(rewards.numel()))}
        return Losses(taught.total + taught.weight * loss, taught.weight, report)


def consensus_task(
    model: PreTrainedModel,
    rows: RowBuilder,
    source: Records | Shards,
    feed: Feed,
    batch: int,
    plan: Mapping[str, Any],
    workers: int = 0,
) -> ConsensusTask:
    """Return the task of a model and a data set.

    Args:
        model: The model.
        rows: What makes its rows.
        source: The data set, in which the captions' words are counted.
        feed: The same, as the steps draw from it.
        batch: Images that this process takes in a step.
        plan: See `TrainingTask`.
        workers: Processes that prepare images ahead.

    Raises:
        InputError: The model is not one around FastViTHD, or the data has no consensus.
    """
    if not isinstance(rows, FastViTHDRows):
        raise InputError(f"{type(model).__name__} has no FastViTHD encoder; teach it replies.")
    scorer = consensus_of(source)
    captioned = StepFeed(feed, CaptionedRowMaker(rows), batch, workers)
    return ConsensusTask(model, rows, scorer, captioned, plan)


def advantages(rewards: Tensor) -> Tensor:
    """Return by how much each sample is better than the mean of the others of its image.

    Args:
        rewards: (images, samples).

    Returns:
        The same shape, in standard deviations of the step's advantages, so that the loss weighs as
        much as teacher forcing's, however good the model is.
    """
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    better = rewards - others
    return better / better.std().clamp(min=1e-3)
