"""A split decoder that ONNX Runtime computes on the CPU, with weights of 32, 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from threading import RLock
from typing import TypeGuard

import torch
from torch import Tensor, nn

from fastvlm.language.bare import is_lookup
from fastvlm.language.cache import DecoderCache, KeyValueCache
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.draft_path import DraftPath
from fastvlm.language.general import added_after, injected
from fastvlm.language.positions import Positions
from fastvlm.language.weights_state import identities, weights_state
from fastvlm.runtimes.decoder_forms import DecoderForms
from fastvlm.runtimes.draft_runner import DraftRunner
from fastvlm.runtimes.head_pass import HeadPasses
from fastvlm.runtimes.layer_stack import LARGEST, LayerStack, StackPass, split_after
from fastvlm.runtimes.wrapped_decoder import WrappedDecoder

PLACE = ("cpu", torch.float32)
"""Where, and in what precision, it computes."""
IDLE_CACHE_BYTES = 2**25
"""The most bytes of a cache that stay while nothing is decoded."""


class OnnxDecoder(WrappedDecoder):
    """A decoder of the usual form whose layers and LM head are graphs in ONNX Runtime.

    Passes that record gradients, and those of training, are computed in torch. Keys and values are
    those of torch's cache, bound where they lie. Weights are packed when a layer first runs; where
    the model's have changed by the time that a request enters, they are packed anew.

    Args:
        split: The decoder in torch, which embeds, makes tables of rotations and knows the family.
        bits: Bits of the weights: 8 or 4, in blocks, see `quantise`; None for float32.
        required: Whether a model that is not in float32 on a CPU is refused, now and later on;
            torch computes it else, from the first request on.

    Raises:
        InputError: The decoder is of another form, or the model is refused.
    """

    runtime = "onnx"
    title = "ONNX Runtime"

    def __init__(
        self, split: SplitDecoder, bits: int | None = None, *, required: bool = True
    ) -> None:
        super().__init__(split)
        self.bits, self.required = bits, required
        if required:
            self._check_precision()
        self.forms = DecoderForms(self.split, self.refusal)
        self.ahead: DraftRunner = DraftRunner(self.forms, bits)
        self._turn = RLock()
        self._state: Hashable = None
        self._forget()

    def follow(self) -> int:
        """Forget what was packed of weights that have changed since. See `SplitDecoder.follow`.

        Raises:
            InputError: The model was moved or cast, and this runtime is required.
        """
        if self.required:
            self._check_precision()
        with self._turn:
            self.runtime = "onnx" if self._place() == PLACE else "torch"
            if self.runtime == "torch":
                self.ahead.follow()
                if self._state is not None:
                    self._forget()
                self._state, self.recomputes = None, False
                return 0
            weights = weights_state(self.model)
            self.ahead.follow(weights)
            if self._state != self._weights_state(weights):
                self._forget()
                return 0
            # Of small layers, telling all graphs where memory lies takes as long as a step.
            return IDLE_CACHE_BYTES if self.recomputes else 0

    def forward_layers(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, layers: Iterable[int]
    ) -> Tensor:
        """Run some of the target's layers on (batch, new, d_model) hidden states."""
        if not self._decodes(cache):
            return self.split.forward_layers(x, positions, cache, layers)
        chosen = list(layers)
        if chosen and chosen[0] == 0:
            x = self.split.enter(x, positions)
            if positions.injects:
                x = injected(x, positions, -1)
        after = [(layer,) for layer in chosen]
        return self._run(self._target, x, (positions, cache), list(zip(chosen, after, strict=True)))

    def forward_all(
        self,
        x: Tensor,
        positions: Positions,
        cache: KeyValueCache,
        exit_layer: int = 0,
        *,
        logits: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        """Run all layers, in one graph where they are small. See `SplitDecoder.forward_all`."""
        if not self.recomputes or positions.injects or not self._decodes(cache):
            return super().forward_all(x, positions, cache, exit_layer, logits=logits)
        x = self.split.enter(x, positions)
        return self._run_all(x, (positions, cache), exit_layer, logits=logits)

    def forward_tokens(
        self,
        token_ids: Sequence[Sequence[int]],
        positions: Positions,
        cache: KeyValueCache,
        exit_layer: int = 0,
    ) -> tuple[Tensor | None, Tensor]:
        """Run the whole model on tokens, in one graph where it is small. See `SplitDecoder`."""
        whole = self.recomputes and self._looks_up
        if not whole or positions.injects or not self._decodes(cache):
            return super().forward_tokens(token_ids, positions, cache, exit_layer)
        return self._run_all(token_ids, (positions, cache), exit_layer, logits=True)

    def _run_all(
        self,
        x: Tensor | Sequence[Sequence[int]],
        given: tuple[Positions, DecoderCache],
        exit_layer: int,
        *,
        logits: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """Run all layers on what enters the first, or on tokens. See `forward_all`."""
        with self._turn:
            *exits, last = self._target.run_all(x, exit_layer, self._pass(*given), logits=logits)
        return (exits[0] if exits else None), self.logits(last) if logits else last

    def forward_blocks(
        self,
        x: Tensor,
        positions: Positions,
        cache: KeyValueCache,
        blocks: Iterable[nn.Module],
        exit_layer: int,
    ) -> Tensor:
        """Run layers of the target's own kind. See `SplitDecoder.forward_blocks`."""
        if not self._decodes(cache):
            return self.split.forward_blocks(x, positions, cache, blocks, exit_layer)
        own = list(blocks)
        first, *after = added_after(exit_layer, self.depth, len(own))
        if positions.injects:
            for number in first:
                x = injected(x, positions, number)
        stack = self._stack_of(own)
        return self._run(stack, x, (positions, cache), list(enumerate(after)))

    def raw_logits(self, x: Tensor) -> Tensor:
        """Return the LM head's outputs of normed states."""
        if self._is_torchs:
            return self.split.raw_logits(x)
        with self._turn:
            return self._heads.run(x, normed=True)

    def head(self, x: Tensor) -> Tensor:
        """Return the logits of (batch, new, d_model)."""
        if self._is_torchs:
            return self.split.head(x)
        with self._turn:
            return self.logits(self._heads.run(x))

    def head_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the logits of some tokens alone. See `SplitDecoder.head_rows`."""
        if self._is_torchs:
            return self.split.head_rows(x, rows)
        with self._turn:
            return self.logits(self._heads.run(x, rows))

    def draft_step(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, path: DraftPath
    ) -> tuple[Tensor, Tensor]:
        """Run a draft step in one graph, where it is small. See `SplitDecoder.draft_step`."""
        if positions.injects or not self._decodes(cache):
            return super().draft_step(x, positions, cache, path)
        found = self.ahead.step(x, positions, cache, path)
        if found is None:
            return super().draft_step(x, positions, cache, path)
        return found[0], self.logits(found[1])

    def _run(
        self,
        stack: LayerStack,
        x: Tensor,
        given: tuple[Positions, DecoderCache],
        layers: Sequence[tuple[int, tuple[int, ...]]],
    ) -> Tensor:
        """Run layers of a stack, each with the target's layers whose additions follow it."""
        positions, cache = given
        added: dict[int, Tensor] = {}
        if positions.injects:
            for layer, after in layers:
                found = [positions.injection(number, x) for number in after]
                states = [one for one in found if one is not None]
                if states:
                    added[layer] = sum(states[1:], states[0])
        with self._turn:
            whole = self._pass(positions, cache)
            for part in split_after([layer for layer, _ in layers], added):
                x = stack.run(x, part, whole)
                if part[-1] in added:
                    x = x + added[part[-1]]
        return x

    def _pass(self, positions: Positions, cache: DecoderCache) -> StackPass:
        return StackPass(positions, cache, self.forms.rotations.of(positions, cache.capacity))

    @property
    def _looks_up(self) -> bool:
        """Whether what enters the first layer are rows of the embedding as they are."""
        as_they_are = self.split.first_entry() is None and self.split.calls.entry == "nothing"
        return as_they_are and is_lookup(self.embedding)

    def _stack_of(self, blocks: list[nn.Module]) -> LayerStack:
        """Return layers that are not the target's own, as they are run."""
        key = tuple(map(id, blocks))
        with self._turn:
            if key not in self._blocks:
                masks = [call.mask for call in self.split.calls.layers[-len(blocks) :]]
                copied = _weights(blocks) <= LARGEST
                stack = LayerStack(masks, self.forms.block_reader(blocks), self.bits, copied=copied)
                self._blocks[key] = blocks, stack
                self._state = self._weights_state()
            return self._blocks[key][1]

    def _check_precision(self) -> None:
        if self._place() != PLACE:
            device, dtype = self.device_and_dtype()
            raise self.refusal(
                f"it computes in float32 on the CPU, and the model is in {dtype} on {device}"
            )

    def _place(self) -> tuple[str, torch.dtype]:
        device, dtype = self.device_and_dtype()
        return device.type, dtype

    def _decodes(self, cache: KeyValueCache) -> TypeGuard[DecoderCache]:
        """Return whether a pass is computed here: it keeps keys and values, and no gradients."""
        return isinstance(cache, DecoderCache) and not self._is_torchs

    @property
    def _is_torchs(self) -> bool:
        return self.runtime == "torch" or torch.is_grad_enabled()

    def _weights_state(self, weights: Hashable = None) -> Hashable:
        """Return what changes whenever weights do that were packed, or may have been.

        Args:
            weights: The `weights_state` of the model, where it is known.
        """
        modules = [block for blocks, _ in self._blocks.values() for block in blocks]
        blocks = [weight for one in dict.fromkeys(modules) for weight in one.parameters()]
        found = weights_state(self.model) if weights is None else weights
        return found, identities(blocks), self.forms.rotations.state

    def _forget(self) -> None:
        """Pack all weights anew where they are next needed."""
        masks = [call.mask for call in self.split.calls.layers]
        # One call more takes longer than a few positions more, and each rounds as it did.
        small = self.recomputes = _weights(self.layers) <= LARGEST
        self.ahead.forget()
        self._target = LayerStack(
            masks,
            self.forms.layer,
            self.bits,
            copied=small,
            head=self.forms.head,
            embedding=lambda: self.embedding.weight,
        )
        self._blocks: dict[tuple[int, ...], tuple[list[nn.Module], LayerStack]] = {}
        self._heads = HeadPasses(self.forms.head, self.bits)
        self._state = self._weights_state()


def _weights(layers: Iterable[nn.Module]) -> int:
    return sum(weight.numel() for layer in layers for weight in layer.parameters())
