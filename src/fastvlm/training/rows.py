"""Conversations as a model's own forward takes them, with the labels of what is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastvlm.checkpoints.processors import tokenizer_of
from fastvlm.data.conversations import Broken, Conversation, opened
from fastvlm.functional.errors import InputError
from fastvlm.functional.messages import Message
from fastvlm.language import split_decoder
from fastvlm.language.generator import end_tokens
from fastvlm.prompts.fastvithd import expand_image_tokens
from fastvlm.prompts.messages import images_of
from fastvlm.prompts.processor import ProcessorInputs, placed
from fastvlm.training.branches import (
    BRANCHES,
    IGNORED,
    WrittenConversation,
    alternatives_of,
    branched,
    longest_shared_row,
    share_prompt,
)
from fastvlm.training.replies import end_token, text_of
from fastvlm.vision.configuration import REDUCTION
from fastvlm.vision.fastvithd import FastViTHD
from fastvlm.vision.images import prepare


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """What is learnt in one row.

    Args:
        inputs: What the model's forward takes.
        labels: What each position should have been predicted as, `IGNORED` where it doesn't
            matter: (length,).
        kind: What its loss is also reported as, on its own; "" for nothing.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    kind: str = ""


class RowBuilder(Protocol):
    """Makes rows of conversations, and batches of rows.

    It can be pickled, for the processes that prepare data; it holds no model, and its rows lie on
    the CPU.
    """

    def rows(self, conversation: Conversation) -> list[TrainingRow]:
        """Return the rows of a conversation.

        Raises:
            InputError: The model has no use for such a conversation.
        """
        ...

    def batches(self, rows: Sequence[TrainingRow]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield what the model's forward takes, and its labels: (batch, length)."""
        ...


@dataclass(frozen=True, slots=True)
class RowMaker:
    """Makes rows of a conversation whose images are not open yet, as a worker does.

    Args:
        rows: What makes them.
    """

    rows: RowBuilder

    def __call__(self, conversation: Conversation) -> list[TrainingRow] | Broken:
        """Return the rows, or why there are none."""
        if all(turn["role"] != "assistant" for turn in conversation.messages):
            return Broken(conversation.name, "no reply: it is a prompt alone")
        record = opened(conversation)
        if isinstance(record, Broken):
            return record
        try:
            return self.rows.rows(record)
        except InputError as error:
            return Broken(conversation.name, str(error))


class FastViTHDRows:
    """Rows of a model around a FastViTHD: a whole conversation in each, all replies labelled.

    A last turn's alternatives share a row where the decoder allows it: each sees the prompt and
    itself, at the positions that it has alone, and so has the loss that it has alone.

    Args:
        model: The model.
        tokenizer: Its tokenizer, with a chat template that has a place for images.
        image_size: Side in pixels of the images.

    Raises:
        InputError: It is no multiple of 64, or the model has no end token.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image_size: int
    ) -> None:
        if image_size % REDUCTION:
            raise InputError(
                f"Images are shown at a multiple of {REDUCTION} pixels; got {image_size}."
            )
        # Which settings a composite model has is its class's matter.
        config: Any = model.config
        self.tokenizer, self.image_size = tokenizer, image_size
        self.device, self.dtype, self.image = model.device, model.dtype, config.image_token_id
        self.context: int = config.get_text_config().max_position_embeddings
        self.shared_length = longest_shared_row(model)
        self.end = end_token(tokenizer, end_tokens(model))

    def rows(self, conversation: Conversation) -> list[TrainingRow]:
        """Return the row of a conversation, or one for each alternative. See `RowBuilder.rows`."""
        return self.lay_out(*self.write_all(conversation))

    def write_all(
        self, conversation: Conversation
    ) -> tuple[list[WrittenConversation], dict[str, Tensor]]:
        """Return a conversation with each of its last replies, and its images as inputs."""
        parts = [prepare(shown, self.image_size) for shown in images_of(conversation.messages)]
        visual = [len(part) * (part.shape[-1] // REDUCTION) ** 2 for part in parts]
        written = [self.write(said, visual) for said in alternatives_of(conversation)]
        return written, {"pixel_values": torch.cat(parts)} if parts else {}

    def lay_out(
        self, written: Sequence[WrittenConversation], images: dict[str, Tensor]
    ) -> list[TrainingRow]:
        """Return the rows of conversations that differ in the last reply alone.

        Args:
            written: The conversations.
            images: The inputs that are their images.
        """
        if len(written) > 1:
            shared, labels = share_prompt(written)
            if len(labels) <= self.shared_length:
                return [TrainingRow({**shared, **images}, labels)]
        return [
            TrainingRow(
                {"input_ids": torch.tensor(one.token_ids), **images}, torch.tensor(one.labels)
            )
            for one in written
        ]

    def write(self, messages: Sequence[Message], visual: Sequence[int]) -> WrittenConversation:
        """Return a conversation's tokens and labels.

        Args:
            messages: The conversation.
            visual: Visual tokens of each of its images, in order.

        Raises:
            InputError: The template has no place for an image, or doesn't write turn after turn, or
                the conversation is longer than the model's context.
        """
        numbers = iter(visual)
        tokens: list[int] = []
        labels: list[int] = []
        replied, prompt = False, 0
        for text, counted in self.pieces(messages):
            found = expand_image_tokens(self.tokenizer, text, self.image, numbers)
            if counted:
                prompt = len(tokens)
            tokens += found
            labels += found if counted else [IGNORED] * len(found)
            if replied and found:
                # A reply's end is learnt also where the template doesn't write it.
                labels[-len(found)] = self.end
            replied = counted
        tokens.append(self.end)
        labels.append(self.end)
        if next(numbers, None) is not None:
            raise InputError("The chat template has no place for an image.")
        if len(tokens) > self.context:
            raise InputError(f"It has {len(tokens)} tokens; the model's context is {self.context}.")
        return WrittenConversation(tokens, labels, prompt)

    def pieces(self, messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
        """Yield a conversation's text up to its last reply, and whether each piece is learnt.

        Raises:
            InputError: The template doesn't write turn after turn.
        """
        done = ""
        for place, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            prompt = self.written(messages[:place], asks=True)
            with_reply = self.written(messages[: place + 1], asks=False)
            reply = text_of(turn).strip()
            at = with_reply.find(reply, len(prompt))
            if not prompt.startswith(done) or not with_reply.startswith(prompt) or at < 0:
                raise InputError(
                    "The chat template rewrites earlier turns, so the replies of a whole"
                    " conversation can't be told apart; set a template that writes turn after turn."
                )
            yield prompt[len(done) :], False
            done = with_reply[: at + len(reply)]
            yield done[len(prompt) :], True

    def written(self, messages: Sequence[Message], *, asks: bool) -> str:
        """Return a conversation as the template writes it, up to a reply or with it."""
        turns = [dict(message) for message in messages]
        return str(
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks)
        )

    def batches(self, rows: Sequence[TrainingRow]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield one batch of all rows. See `RowBuilder.batches`."""
        # Padding stands on the right, where the causal mask alone keeps it out of sight.
        tokens = [row.inputs["input_ids"] for row in rows]
        inputs = {"input_ids": pad_sequence(tokens, batch_first=True, padding_value=self.end)}
        if any(BRANCHES in row.inputs for row in rows):
            inputs |= branched([row.inputs for row in rows], self.dtype)
        shown = [row.inputs["pixel_values"] for row in rows if "pixel_values" in row.inputs]
        if shown:
            inputs["pixel_values"] = torch.cat(shown)
        labels = [row.labels for row in rows]
        yield (
            {name: tensor.to(self.device) for name, tensor in inputs.items()},
            pad_sequence(labels, batch_first=True, padding_value=IGNORED).to(self.device),
        )


class ProcessorRows:
    """Rows of a model of any other family, as its own processor makes them: a reply in each.

    Args:
        model: The model.
        processor: Its processor, or the tokenizer of a model of text alone.

    Raises:
        InputError: The model's forward doesn't end in hidden states for the tokens it is given.
    """

    def __init__(
        self, model: PreTrainedModel, processor: PreTrainedTokenizerBase | ProcessorMixin
    ) -> None:
        if model.base_model is model or model.config.is_encoder_decoder:
            raise InputError(
                f"{type(model).__name__} can't be trained here; a draft for it can, and its decoder"
                " with --phases joint,frozen."
            )
        # Refused here where a model's decoder isn't known.
        split_decoder(model)
        self.processor_inputs = ProcessorInputs(model, processor)
        self.device, self.dtype = model.device, model.dtype
        self.tokenizer = tokenizer_of(processor)
        self.end = end_token(self.tokenizer, end_tokens(model))

    def rows(self, conversation: Conversation) -> list[TrainingRow]:
        """Return a row for each reply of a conversation, and each of the last turn's alternatives.

        See `RowBuilder.rows`.
        """
        messages = conversation.messages
        replies = [
            (place, text_of(turn))
            for place, turn in enumerate(messages)
            if turn["role"] == "assistant"
        ]
        replies += [(len(messages) - 1, text) for text in conversation.alternatives]
        found = []
        for place, text in replies:
            inputs = placed(self.processor_inputs(messages[:place]), None, self.dtype)
            before = inputs["input_ids"]
            said = self.tokenizer.encode(text.strip(), add_special_tokens=False)
            reply = before.new_tensor([[*said, self.end]])
            inputs = {
                name: torch.cat((value, value.new_zeros(reply.shape)), 1)
                if value.shape == before.shape
                else value
                for name, value in inputs.items()
            }
            inputs["input_ids"] = torch.cat((before, reply), 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            labels = inputs["input_ids"][0].clone()
            labels[: before.shape[1]] = IGNORED
            found.append(TrainingRow(inputs, labels))
        return found

    def batches(self, rows: Sequence[TrainingRow]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield each row alone: images' shapes differ. See `RowBuilder.batches`."""
        for row in rows:
            yield placed(row.inputs, self.device, None), row.labels[None].to(self.device)


def rows_for(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    image_size: int | None,
) -> RowBuilder:
    """Return what makes a model's rows.

    Args:
        model: The model.
        processor: Its processor, or its tokenizer alone.
        image_size: Side in pixels of the images; None for the model's own.

    Raises:
        InputError: The model can't be trained, or shows images in a size of its own.
    """
    tower = getattr(model.base_model, "vision_tower", None)
    if isinstance(tower, FastViTHD):
        size = tower.config.image_size if image_size is None else image_size
        return FastViTHDRows(model, tokenizer_of(processor), size)
    if image_size is not None:
        raise InputError(
            f"The processor of {type(model).__name__} decides how an image is shown; leave out the"
            " image size."
        )
    return ProcessorRows(model, processor)
