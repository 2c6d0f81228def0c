"""A split decoder on a GPU: passes of a reply by kernels of few launches, recorded as graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from threading import RLock
from typing import TypeGuard

import torch
import triton
from torch import Tensor, nn

from fastvlm.functional.errors import InputError
from fastvlm.language.cache import DecoderCache, KeyValueCache
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.draft_path import DraftPath
from fastvlm.language.layer_calls import LayerCall
from fastvlm.language.positions import Positions
from fastvlm.language.weights_state import identities, weights_state
from fastvlm.runtimes.cuda_graph import Recorder
from fastvlm.runtimes.gpu_layers import GpuLayer, GpuPass, final_norm, gpu_layer, run_layers
from fastvlm.runtimes.triton_kernels import CacheRows
from fastvlm.runtimes.wrapped_decoder import WrappedDecoder

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 32
"""Positions in each row of the widest pass that is computed here; longer ones are prompts."""
IDLE_CACHE_BYTES = 2**31
"""The most bytes of a cache that stay while nothing is decoded: graphs are of its memory."""

Compute = Callable[[Tensor, GpuPass], tuple[Tensor, ...]]
"""What a pass does with hidden states: (batch, width, d_model) to tensors."""


class CudaDecoder(WrappedDecoder):
    """A decoder of the usual form whose passes over replies are CUDA graphs.

    A pass of few positions is hundreds of kernels of microseconds each, which a processor launches
    more slowly than a GPU runs them. Prompts, passes that record gradients and those of training
    are torch's. Weights are those of the model's own modules, read where they lie: what is written
    to them counts at once, and where modules are exchanged all is recorded anew.

    Args:
        split: The decoder in torch, which embeds, makes tables of rotations and knows the family.

    Raises:
        InputError: The model is not on one GPU in 16 or 32 bits, or its decoder is of another form.
    """

    runtime = "cuda"
    title = "The CUDA runtime"
    recomputes = True

    def __init__(self, split: SplitDecoder) -> None:
        super().__init__(split)
        self._turn = RLock()
        self._recorder = Recorder()
        self._drafts: dict[Hashable, tuple[DraftPath, list[GpuLayer]]] = {}
        """What drafts run, which stays, so that nothing else comes to be known as it is."""
        self._layers = self._read()
        self._state = self._weights_state()

    def follow(self) -> int:
        """Record anew where weights, modules or adapters have changed. See `SplitDecoder.follow`.

        Raises:
            InputError: The model can't be decoded here any more: it was moved, or cast, or has
                other modules now.
        """
        with self._turn:
            if self._state != self._weights_state():
                self._layers = self._read()
                self._recorder.forget()
                self._drafts.clear()
                self._state = self._weights_state()
        return IDLE_CACHE_BYTES

    def forward_layers(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, layers: Iterable[int]
    ) -> Tensor:
        """Run some of the target's layers on (batch, new, d_model) hidden states."""
        if not self._decodes(cache, positions):
            return super().forward_layers(x, positions, cache, layers)
        chosen = tuple(layers)
        if 0 in chosen:
            x = self.split.enter(x, positions)

        def compute(x: Tensor, given: GpuPass) -> tuple[Tensor, ...]:
            return (run_layers([self._layers[number] for number in chosen], x, given),)

        return self._run(("layers", chosen), x, (positions, cache, chosen), compute)[0]

    def forward_all(
        self,
        x: Tensor,
        positions: Positions,
        cache: KeyValueCache,
        exit_layer: int = 0,
        *,
        logits: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        """Run all layers on embeddings. See `SplitDecoder.forward_all`."""
        if not self._decodes(cache, positions):
            return super().forward_all(x, positions, cache, exit_layer, logits=logits)
        x = self.split.enter(x, positions)

        def compute(x: Tensor, given: GpuPass) -> tuple[Tensor, ...]:
            exits = (run_layers(self._layers[:exit_layer], x, given),) if exit_layer else ()
            x = run_layers(self._layers[exit_layer:], exits[0] if exits else x, given)
            return *exits, self._logits(x) if logits else x

        whole = range(self.depth)
        found = self._run(("all", exit_layer, logits), x, (positions, cache, whole), compute)
        return found[0] if exit_layer else None, found[-1]

    def draft_step(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, path: DraftPath
    ) -> tuple[Tensor, Tensor]:
        """Run a draft step. See `SplitDecoder.draft_step`."""
        if not self._decodes(cache, positions):
            return super().draft_step(x, positions, cache, path)
        rows = path.rows
        placed = None if rows is None else (rows.data_ptr(), len(rows))
        key = "draft", path.exit_layer, tuple(map(id, path.blocks)), id(path.mlp), placed
        with self._turn:
            if key not in self._drafts:
                calls = self.split.calls.layers[self.depth - len(path.blocks) :]
                own = [self._layer(*one) for one in zip(path.blocks, calls, strict=True)]
                self._drafts[key] = path, own
                self._state = self._weights_state()
            blocks = self._drafts[key][1]
        x = self.split.enter(x, positions)

        def compute(x: Tensor, given: GpuPass) -> tuple[Tensor, ...]:
            exits = x = run_layers(self._layers[: path.exit_layer], x, given)
            x = run_layers(blocks, x, given)
            if path.mlp is not None:
                x = path.mlp(x)
            return exits, self._logits(x[:, -1:], rows)

        numbers = *range(path.exit_layer), *range(self.depth, self.depth + len(blocks))
        exits, logits = self._run(key, x, (positions, cache, numbers), compute)
        return exits, logits

    def _run(
        self,
        key: Hashable,
        x: Tensor,
        given: tuple[Positions, DecoderCache, Sequence[int]],
        compute: Compute,
    ) -> Sequence[Tensor]:
        """Run a pass, recorded if it came before.

        Args:
            key: What tells it from others.
            x: The states that it begins with.
            given: Its positions, the cache, and the layers of the cache that it writes.
            compute: What it does with them.
        """
        positions, cache, numbers = given
        size = *x.shape[:2], -1
        tables = [
            table.expand(size).contiguous()
            for rotary in self.split.rotary.values()
            for table in rotary(x, positions)
        ]

        def whole(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            x, rows, *tables = inputs
            pairs = zip(tables[::2], tables[1::2], strict=True)
            rotations = dict(zip(self.split.rotary, pairs, strict=True))
            return compute(x, GpuPass(cache, CacheRows(*rows), rotations))

        rows = torch.tensor([positions.slots, positions.starts], device=x.device)
        with self._turn:
            found = self._recorder.run(key, cache.memory, whole, [x, rows, *tables])
        cache.note_written(positions, numbers)
        return found

    def _read(self) -> list[GpuLayer]:
        """Return the target's layers as they are computed here.

        Raises:
            InputError: One can't be.
        """
        head = self.lm_head
        parts = [*self.layers, head, self.embedding]
        placed = {(one.device, one.dtype) for part in parts for one in part.parameters()}
        if len(placed) > 1:
            raise self.refusal("its weights are on several devices, or of several precisions")
        [(device, dtype)] = placed
        if dtype not in DTYPES or not computes_on(device):
            raise self.refusal(f"it is in {dtype} on {device}")
        layers = [
            self._layer(*one) for one in zip(self.layers, self.split.calls.layers, strict=True)
        ]
        norm = getattr(self.decoder, self.part_names["norm"])
        if type(norm) is not type(layers[-1].module.input_layernorm):
            raise self.refusal(f"its final norm is a {type(norm).__name__}")
        return layers

    def _weights_state(self) -> Hashable:
        """Return what changes whenever something does that was recorded."""
        modules = [part for path, _ in self._drafts.values() for part in (*path.blocks, path.mlp)]
        drafting = [part for part in dict.fromkeys(modules) if part is not None]
        weights = [weight for part in drafting for weight in part.parameters()]
        return weights_state(self.model), identities(weights)

    def _layer(self, module: nn.Module, call: LayerCall) -> GpuLayer:
        try:
            return gpu_layer(module, call)
        except InputError as error:
            raise self.refusal(f"a layer is not computed here, as {error}") from error

    def _decodes(self, cache: KeyValueCache, positions: Positions) -> TypeGuard[DecoderCache]:
        """Return whether a pass is computed here: of replies alone, short, without gradients."""
        return (
            isinstance(cache, DecoderCache)
            and positions.width <= MAX_WIDTH
            and positions.encoder is None
            and not positions.to_the_end
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(cache.device.type)
            and all(
                prompt is None or start >= len(prompt)
                for prompt, start in zip(positions.prompts, positions.starts, strict=False)
            )
        )

    def _logits(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return logits of states, of all tokens or some: (batch, new, tokens)."""
        norm: nn.Module = getattr(self.decoder, self.part_names["norm"])
        normed = final_norm(norm, self._layers[-1], x.contiguous())
        if rows is None:
            return self.logits(self.split.raw_logits(normed))
        return self.logits(nn.functional.linear(normed, rows))


def computes_on(device: torch.device) -> bool:
    """Return whether these kernels run on a device."""
    return device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret)
