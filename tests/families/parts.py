"""What the small models of families share: sizes, lively weights, prompts and replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Inputs = dict[str, Tensor]
Family = tuple[PreTrainedModel, Callable[[int], Inputs]]
"""A model, and what makes inputs for a batch of so many rows."""


class MakeInputs(Protocol):
    """Makes inputs for a batch, with any number of images in each row."""

    def __call__(self, rows: int, images_per_row: int = 1) -> Inputs: ...


NewerFamily = tuple[PreTrainedModel, MakeInputs]
"""A model, and what makes inputs for it; models of text alone are shown no images."""


IMAGE, END, PAD, START = 96, 1, 0, 2
DEPTH = 4
ROTARY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large weights, so that random models don't just repeat one token.
    "initializer_range": 0.3,
    "vocab_size": 97,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": START,
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 32,
    "vocab_size": 97,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": START,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": DEPTH,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "vocab_size": 97,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "decoder_start_token_id": PAD,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SIGLIP: dict[str, Any] = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
PATCHES = 16
"""Patches of an image, or of a tile of one."""
WINDOW = 4
"""How far the newer families' layers of sliding windows and chunks see."""
FIRST_SPECIAL = 80
"""From here on, tokens of the newer families' prompts stand for something."""


def finished(model: PreTrainedModel, gain: float = 3.0) -> PreTrainedModel:
    """Return a model in float64, with large weights outside a decoder of the rotary kind.

    Args:
        model: The model.
        gain: How large: what leaves a layer, against what entered.
    """
    torch.manual_seed(7)
    large = {id(part) for part in rotary_parts(model)}
    for part in model.children():
        enliven(part, large, gain)
    return model.double().eval()


def rotary_parts(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a rotary decoder and its LM head, whose configuration sets weights."""
    return [
        part
        for name, module in model.named_modules()
        if hasattr(module, "rotary_emb") or name == "lm_head"
        for part in module.modules()
    ]


@torch.no_grad()
def lively(
    model: PreTrainedModel, gain: float = 3.0, shift: float = 1.0, tied: float = 0.2
) -> PreTrainedModel:
    """Return a model in float64 as `finished` does, with norms, biases and gates that count too.

    Args:
        model: The model.
        gain: How large weights are: what leaves a layer, against what entered.
        shift: How far the weights of norms, biases and gates lie from where they start.
        tied: A factor for embeddings that are also the head.
    """
    finished(model, gain)
    for part in model.parameters():
        if part.squeeze().ndim <= 1:
            part.add_(torch.randn_like(part), alpha=shift)
        elif not part.any():
            part.normal_(std=gain * part.shape[0] ** -0.5)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embeddings.weight:
        # Beside larger embeddings layers count for little, and a tied model repeats its last token.
        embeddings.weight.mul_(tied)
    if head is not None:
        head.weight[END] *= 0.7  # replies that end at once show little
    return model


@torch.no_grad()
def enliven(module: nn.Module, but: set[int], gain: float) -> None:
    """Give weights values that make a difference, and query tokens values at all."""
    for name, part in module.named_modules():
        if id(part) in but:
            continue
        if isinstance(part, nn.Conv2d | nn.Conv3d | nn.Linear):
            part.weight.normal_(std=gain * part.weight[0].numel() ** -0.5)
            if part.bias is not None:
                part.bias.normal_(std=0.1)
        elif isinstance(part, nn.Embedding):
            # Where positions count for little, tied models repeat a token.
            places = name.endswith(("embed_positions", "relative_attention_bias"))
            part.weight.normal_(std=3.0 if places else 0.5)


def written(lengths: Sequence[int], visual: Sequence[int]) -> Inputs:
    """Return prompts of visual tokens and text of some lengths, padded on the left."""
    random = torch.Generator().manual_seed(3)
    rows = []
    for number, length in zip(visual, lengths, strict=True):
        text = torch.randint(3, IMAGE, (length,), generator=random).tolist()
        rows.append([text[0], *[IMAGE] * number, *text[1:]])
    return padded(rows)


def prompts(blocks: Sequence[Sequence[Sequence[int]]], *, even: bool = False) -> Inputs:
    """Return prompts with visual tokens between their words, padded on the left.

    Args:
        blocks: For each row, the tokens that stand for each of its images.
        even: Whether all texts are of the same length.
    """
    random = torch.Generator().manual_seed(3)
    rows = []
    for shown, some in zip(blocks, lengths(len(blocks)), strict=True):
        # No prompt is shorter than a window or a chunk of attention.
        length = WINDOW + (8 if even else some)
        row = torch.randint(3, FIRST_SPECIAL, (length,), generator=random).tolist()
        for number, block in enumerate(reversed(shown)):
            place = len(shown) - number
            row[place:place] = block
        rows.append(row)
    return padded(rows)


def shared_out(blocks: Sequence[Sequence[int]], rows: int) -> list[Sequence[Sequence[int]]]:
    """Return for each row as many of the blocks, in order."""
    each = len(blocks) // rows
    return [blocks[row * each : (row + 1) * each] for row in range(rows)]


def padded(rows: Sequence[Sequence[int]]) -> Inputs:
    """Return token ids of rows of different lengths, padded on the left."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        ),
    }


PER_TOKEN = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "image_embeds_position_mask",
    "cross_attention_mask",
)
"""Inputs that have an entry for each token."""


def together(shown: Inputs, asked: Inputs) -> Inputs:
    """Return rows with images and rows of text as one batch.

    Args:
        shown: Inputs of the rows with images.
        asked: Inputs of the rows of text.
    """
    more = len(asked["input_ids"])
    longest = max(len(given["input_ids"][0]) for given in (shown, asked))
    at_the_end = not bool(asked["attention_mask"][:, -1].all())
    # Else images stand one after another, whatever row they are in.
    by_row = not shown.keys().isdisjoint(("aspect_ratio_ids", "pixel_attention_mask"))

    def long(value: Tensor) -> Tensor:
        missing = value.new_zeros(len(value), longest - value.shape[1], *value.shape[2:])
        return torch.cat((value, missing) if at_the_end else (missing, value), 1)

    found = {}
    for name, value in shown.items():
        if name in PER_TOKEN:
            other = asked.get(name, value.new_zeros(more, 1, *value.shape[2:]))
            found[name] = torch.cat((long(value), long(other)))
        elif by_row:
            found[name] = torch.cat((value, value.new_zeros(more, *value.shape[1:])))
        else:
            found[name] = value
    if "aspect_ratio_mask" in found:
        # As the processor has it: each image has a first tile.
        found["aspect_ratio_mask"][..., 0] = 1
    return found


def of_one_size(
    block: Sequence[int],
    *shape: int,
    tiles: int = 1,
    finish: Callable[[Inputs], Mapping[str, Tensor]] | None = None,
) -> MakeInputs:
    """Return what makes inputs of images that all take the same tokens.

    Args:
        block: The tokens that stand for an image.
        shape: The shape of the pixels that the model takes for an image or a tile of one.
        tiles: How many tiles an image has.
        finish: Returns what else belongs to the inputs.
    """

    def inputs(rows: int, images_per_row: int = 1) -> Inputs:
        made = prompts([[block] * images_per_row] * rows)
        if images_per_row:
            made["pixel_values"] = images(rows * images_per_row * tiles, *(shape or (3, 32, 32)))
        return {**made, **(finish(made) if finish else {})}

    return inputs


def lengths(rows: int) -> list[int]:
    """Return how long the text of each row is."""
    return [5, 9, 3, 7, 4, 11, 6, 8][:rows]


def images(*shape: int) -> Tensor:
    """Return random images."""
    random = torch.Generator().manual_seed(4)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def replies(model: PreTrainedModel, inputs: Inputs, limit: int, **options: Any) -> list[list[int]]:
    """Return transformers' own greedy replies, each up to its end token."""
    out = model.generate(**inputs, max_new_tokens=limit, do_sample=False, **options)
    if model.config.is_encoder_decoder or model.get_decoder().config.is_encoder_decoder:
        start = 1
    else:
        start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    found = out[:, start:].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in found]
