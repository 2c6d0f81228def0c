"""Teacher forcing: whole dialogues through the split decoder of a model of any family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastvlm.language import DecoderInputs
from fastvlm.language.positions import Positions
from fastvlm.training.replies import Example
from fastvlm.vlm import VisionLanguageModel

T = TypeVar("T")

EXAMPLE_CACHE_BYTES = 2 * 2**30
"""The default memory for a frozen model's results on examples, in bytes."""


class ExampleCache:
    """Keeps what is computed from examples, as long as there is memory.

    What fits is kept for good: a step draws at random, so an eviction policy would not help. A
    value must be computed from its example alone, not from those that are drawn with it, so that a
    resumed run computes the same.

    Args:
        most_bytes: The maximum memory, in bytes.
    """

    def __init__(self, most_bytes: int = EXAMPLE_CACHE_BYTES) -> None:
        self.left = most_bytes
        # With what it was made of, which stays alive so that its id stays its own.
        self._found: dict[int, tuple[object, Any]] = {}

    def get(self, of: object, make: Callable[[], T], parts: Callable[[T], Iterable[Tensor]]) -> T:
        """Return the kept value of an object, or compute it.

        Args:
            of: The object, identified by `id`.
            make: Computes the value.
            parts: Returns the value's tensors, whose size is counted.
        """
        key = id(of)
        if key in self._found:
            return self._found[key][1]
        made = make()
        size = sum(tensor.nbytes for tensor in parts(made))
        if size <= self.left:
            self.left -= size
            self._found[key] = of, made
        return made

    def has(self, of: object) -> bool:
        """Return whether what is made of an object is kept; it may be called from any thread."""
        return id(of) in self._found


@dataclass(frozen=True, slots=True)
class Forced:
    """A batch of dialogues, for a pass over all their positions.

    Args:
        x: The decoder's inputs, padded on the right: (batch, length, d_embedding).
        positions: All positions.
        loss_mask: The positions that predict a token of the loss: (batch, length).
        targets: The tokens that they predict, in the order of `loss_mask`: (tokens,).
    """

    x: Tensor
    positions: Positions
    loss_mask: Tensor
    targets: Tensor


class TeacherForcing:
    """Makes batches of examples, and keeps their prompts.

    Args:
        vlm: The model whose prompts and decoder are used; its image encoder is frozen.
        kept: Where prompts are kept.
    """

    def __init__(self, vlm: VisionLanguageModel, kept: ExampleCache) -> None:
        self.vlm, self.kept = vlm, kept
        # What workers prepared, by the id of the messages, until it is taken.
        self.prepared: dict[int, Any] = {}

    @torch.no_grad()
    def prompt(self, example: Example) -> DecoderInputs:
        """Return an example's prompt, encoded now or taken from the cache.

        Raises:
            InputError: An image can't be read, or the model doesn't support the prompt.
        """
        return self.kept.get(
            example.messages,
            lambda: self.encoded(example),
            lambda made: (
                tensor
                for tensor in (made.embeddings, made.position_ids, made.encoder_states)
                if tensor is not None
            ),
        )

    def encoded(self, example: Example) -> DecoderInputs:
        """Return an example's prompt, prepared by a worker or here. See `prompt`."""
        prompts = self.vlm.prompts
        prepared = self.prepared.pop(id(example.messages), None)
        [found] = prompts.encoded([prepared or prompts.prepare(example.messages)])
        return found

    @torch.no_grad()
    def batch(self, examples: Sequence[Example], given: int = 1) -> Forced:
        """Return a batch.

        Args:
            examples: The dialogues.
            given: The number of tokens at the beginning of each reply without a loss: 1 for a
                draft, as the prefill gives that token and no draft holds it.

        Raises:
            InputError: As `prompt`.
        """
        decoder = self.vlm.decoder
        prompts = [self.prompt(example) for example in examples]
        rows, masks, targets = [], [], []
        for prompt, example in zip(prompts, examples, strict=True):
            reply = torch.tensor(example.reply, device=decoder.device)
            rows.append(torch.cat((prompt.embeddings, decoder.embed(reply[None, :-1])[0])))
            places = torch.arange(len(rows[-1]), device=decoder.device)
            masks.append(places >= len(prompt.token_ids) + given - 1)
            targets.append(reply[given:])
        x = pad_sequence(rows, batch_first=True)
        positions = Positions.whole([len(row) for row in rows], decoder.device, prompts)
        return Forced(x, positions, pad_sequence(masks, batch_first=True), torch.cat(targets))


class GradientCache:
    """The cache of one training pass: it stores nothing, so keys and values carry gradients."""

    def begin_pass(self, positions: Positions) -> None:
        """Do nothing."""

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values unchanged: a pass from position 0 attends to itself only.

        Args:
            keys: (batch, kv_heads, length, head_dim).
            values: (batch, kv_heads, length, head_dim).
            layer_idx: Not used.
        """
        del layer_idx
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the first position of the pass."""
        return 0
