"""Load a vision-language model; stream or generate its replies."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastvlm.checkpoints import LoadOptions, load_checkpoint
from fastvlm.checkpoints.processors import tokenizer_of
from fastvlm.decoding import Engine, Request, Strategy
from fastvlm.decoding.engine import MAX_SLOTS
from fastvlm.decoding.layer_search import LayerChoice, find_skipped_layers
from fastvlm.decoding.options import split_options
from fastvlm.decoding.reply import Piece, Reply, ReplyStream
from fastvlm.decoding.strategy_factory import StrategyFactory
from fastvlm.drafting import ImitationNetwork
from fastvlm.drafting.directory import load_draft
from fastvlm.example import example
from fastvlm.functional.errors import InputError
from fastvlm.functional.lru import LruBytes
from fastvlm.functional.messages import Prompt
from fastvlm.language import split_decoder
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.generator import end_tokens
from fastvlm.prompts import FastViTHDPromptBuilder, prompt_builder
from fastvlm.request_builder import PlannedRequest, RequestBuilder
from fastvlm.runtimes import decoder_of, split_load_options
from fastvlm.vision.configuration import REDUCTION
from fastvlm.vision.fastvithd import FastViTHD
from fastvlm.vision.loading import ImageInput

__all__ = ["Piece", "Reply", "ReplyStream", "VisionLanguageModel", "load"]

PREFIX_BYTES = 256 * 2**20
"""Default cache size in bytes: a dozen images and more at 1024 px, for FastVLM-0.5B in bfloat16."""


class VisionLanguageModel:
    """A vision-language model with an engine that decodes its replies self-speculatively.

    It may be called from any number of threads: their requests share the engine's batch. The model
    itself is not changed, and changes that the caller makes to it between requests (weights,
    adapters, precision, size) are followed.

    Args:
        model: The target, as `transformers` loads it, in evaluation mode.
        processor: Its processor; its tokenizer, for a model of text alone or one around FastViTHD.
        network: The imitation network that drafts, if there is one.
        prefix_bytes: The maximum memory for image features and states of earlier prompts, in bytes;
            0 keeps nothing.
        max_slots: The maximum number of requests decoded together; others wait.
        max_cache_bytes: The maximum bytes of their keys and values, see `Engine`.
        decoder: What decodes the model, see `decoder_of`; None for the model's own modules.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        network: ImitationNetwork | None = None,
        *,
        prefix_bytes: int = PREFIX_BYTES,
        max_slots: int = MAX_SLOTS,
        max_cache_bytes: int | None = None,
        decoder: SplitDecoder | None = None,
    ) -> None:
        if model.training:
            warnings.warn(
                f"{type(model).__name__} is in training mode, and decodes as it is; call"
                " model.eval() for its usual replies.",
                stacklevel=2,
            )
        self.model, self.network = model, network
        self.processor, self.tokenizer = processor, tokenizer_of(processor)
        self.decoder = split_decoder(model) if decoder is None else decoder
        self.prompts = prompt_builder(model, processor, self.decoder)
        self.engine = Engine(self.decoder, max_slots=max_slots, max_cache_bytes=max_cache_bytes)
        self.strategies = StrategyFactory(self.decoder, network)
        self.lru = LruBytes(prefix_bytes)
        self.builder = RequestBuilder(model, self.tokenizer, self.decoder, self.prompts, self.lru)

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a reply."""
        return end_tokens(self.model)

    @property
    def fastvithd(self) -> FastViTHDPromptBuilder:
        """The prompt builder of a model around FastViTHD, which can count visual tokens beforehand.

        Raises:
            InputError: The model has another encoder, or none.
        """
        if not isinstance(self.prompts, FastViTHDPromptBuilder):
            raise InputError(
                f"{type(self.model).__name__} has no FastViTHD encoder, which this needs: how an"
                " image is shown is its own processor's matter."
            )
        return self.prompts

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that a model around FastViTHD was made for."""
        return self.fastvithd.image_size

    def tokens(self, prompt: str, images: int, visual: int | None = None) -> list[int]:
        """Return the tokens of a question, with a placeholder for every visual token.

        Args:
            prompt: The text.
            images: The number of images before the text.
            visual: Visual tokens of each image; None for the number that the model uses by default.

        Raises:
            InputError: The model is not one around FastViTHD.
        """
        visual = (self.image_size // REDUCTION) ** 2 if visual is None else visual
        shown = [{"type": "image"}] * images
        content = [*shown, {"type": "text", "text": prompt}]
        return self.fastvithd.tokens([{"role": "user", "content": content}], [visual] * images)

    def strategy(
        self, name: str | None = None, *, network: ImitationNetwork | None = None, **options: Any
    ) -> Strategy:
        """Return a strategy; the same object when the same is asked for again.

        Args:
            name: `autoregressive`, `imitation`, `cascade`, `early-exit`, `layer-skip` or
                `prompt-lookup`; None for `cascade` with a draft and `autoregressive` without one.
            network: The network to draft with, if not the model's own draft.
            options: How drafts are made, see `StrategyFactory.make`.

        Raises:
            InputError: The strategy is unknown, needs a draft that isn't there, doesn't take an
                option, or an option is out of range.
        """
        return self.strategies.make(name, network=network, **options)

    def request(
        self,
        prompt: Prompt,
        image: ImageInput | None = None,
        *,
        strategy: Strategy | str | None = None,
        **options: Any,
    ) -> Request:
        """Return a request, with its images encoded unless their features are cached.

        Args:
            prompt: A question about the image, a dialogue with images (`Message`), or tokens.
            image: An image, see `load_image`, or a list of several; None for a question without
                one, or a dialogue.
            strategy: What `strategy` returned, or a strategy's name; None for the model's default.
            options: Fields of `SamplingParams`, `ImageOptions` and `Scheduling`.

        Raises:
            InputError: An image can't be read, the prompt has a placeholder of its own, or an
                option is unknown or out of range.
        """
        [request] = self.builder.build(
            [self.planned_request(prompt, image, strategy=strategy, **options)]
        )
        if request.error is not None:
            raise request.error
        return request

    def planned_request(
        self,
        prompt: Prompt,
        image: ImageInput | None = None,
        *,
        strategy: Strategy | str | None = None,
        **options: Any,
    ) -> PlannedRequest:
        """Return what `builder` makes a request of, beside others. For the arguments see `request`.

        Raises:
            InputError: An option is unknown or out of range.
        """
        chosen = self.strategies.chosen(strategy)
        return PlannedRequest(prompt, image, split_options(options), chosen)

    def stream(
        self,
        prompt: Prompt,
        image: ImageInput | None = None,
        *,
        strategy: Strategy | str | None = None,
        **options: Any,
    ) -> ReplyStream:
        """Return a reply as a stream of pieces; the stream's `reply` is the reply so far.

        In a dialogue, what was computed for earlier turns is reused. For the arguments and errors
        see `request`.
        """
        request = self.request(prompt, image, strategy=strategy, **options)
        return ReplyStream(self.engine, request, self.tokenizer)

    def generate(
        self,
        prompt: Prompt,
        image: ImageInput | None = None,
        *,
        strategy: Strategy | str | None = None,
        **options: Any,
    ) -> Reply:
        """Return a reply. For the arguments and errors see `request`."""
        request = self.request(prompt, image, strategy=strategy, **options)
        self.engine.run_all([request])
        if request.error is not None:
            raise request.error
        return self.reply(request)

    def generate_batch(
        self,
        prompts: Sequence[str],
        images: Sequence[ImageInput | None],
        *,
        strategy: Strategy | str | None = None,
        **options: Any,
    ) -> list[Reply]:
        """Return replies to several prompts, decoded together.

        An error in one prompt, such as an image that can't be read, becomes that reply's `error`.
        Row r of a sampled batch is drawn with the seed + r.

        Args:
            prompts: The prompts.
            images: The image of each prompt, or None.
            strategy: See `request`.
            options: See `request`.

        Raises:
            InputError: The prompts and the images differ in number, or an option is unknown or out
                of range.
        """
        requests = self.requests(prompts, images, strategy=strategy, **options)
        return [self.reply(request) for request in self.engine.run_all(requests)]

    def requests(
        self,
        prompts: Sequence[Prompt],
        images: Sequence[ImageInput | None],
        *,
        strategy: Strategy | str | None = None,
        **options: Any,
    ) -> Iterator[Request]:
        """Return an iterator over the requests of a batch, which builds them as they are reached.

        For the arguments and errors see `generate_batch`.
        """
        if isinstance(prompts, str) or len(prompts) != len(images):
            raise InputError(
                f"A batch has an image for each prompt; got {len(prompts)} prompts and"
                f" {len(images)} images."
            )
        split, chosen = split_options(options), self.strategies.chosen(strategy)

        return self.builder.all(
            PlannedRequest(
                prompt, image, replace(split, sampling=split.sampling.for_row(row)), chosen
            )
            for row, (prompt, image) in enumerate(zip(prompts, images, strict=True))
        )

    def find_skipped_layers(
        self, prompts: Sequence[str], images: Sequence[ImageInput | None], **options: Any
    ) -> LayerChoice:
        """Search for the layers that the strategy `layer-skip` leaves out, on sample prompts.

        Args:
            prompts: Prompts like those to be answered later; a few are enough.
            images: The image of each prompt, or None.
            options: See `request`; replies have at most 64 tokens, if no other number is given.

        Raises:
            InputError: As `generate_batch`, or no reply is long enough to learn from.
        """
        options = {"max_new_tokens": 64, **options}
        samples = list(self.requests(prompts, images, strategy="autoregressive", **options))
        return find_skipped_layers(self.decoder, samples)

    def reply(self, request: Request) -> Reply:
        """Return what a request has decoded."""
        return Reply.of(request, self.tokenizer)


def load(
    model: str | Path | None = None,
    draft: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    prefix_bytes: int = PREFIX_BYTES,
    max_slots: int = MAX_SLOTS,
    max_cache_bytes: int | None = None,
    **options: Unpack[LoadOptions],
) -> VisionLanguageModel:
    """Load a model, and a draft that was made for it.

    Args:
        model: A directory in Apple's layout or in `transformers`', or a name on the Hugging Face
            hub; None for the example model, with its own draft.
        draft: A draft's directory; None to decode without one.
        dtype: The precision to compute in.
        device: The device; the CPU, if neither it nor a `device_map` is given.
        prefix_bytes: The maximum bytes of image features and states of earlier prompts, with which
            a second question about an image costs its own text only; 0 keeps nothing.
        max_slots: The maximum number of requests decoded together; others wait.
        max_cache_bytes: The maximum bytes of their keys and values; others wait. None for half of
            the memory that the device has left.
        options: `runtime`, `quantize` and `packed_bytes`, see `RuntimeOptions`; and options for
            `transformers`: `revision`, `token`, `device_map`, `quantization_config`,
            `attn_implementation`, `trust_remote_code`.

    Raises:
        CheckpointError: The model or the draft is missing or broken, or the draft can't draft for
            the model.
        InputError: The model's family is not supported, its processor has no chat template, or an
            option is unknown.
    """
    runtime, pretrained = split_load_options(options)
    if model is None:
        model, draft = example().MODEL, example().DRAFT if draft is None else draft
    target, processor = load_checkpoint(model, dtype, device, pretrained)
    tower = getattr(target.base_model, "vision_tower", None)
    if isinstance(tower, FastViTHD):
        # Folding is exact, so nobody who loads a model for inference wants the branches.
        tower.fuse()
    network = None if draft is None else load_draft(draft, target)
    return VisionLanguageModel(
        target.eval(),
        processor,
        network,
        prefix_bytes=prefix_bytes,
        max_slots=max_slots,
        max_cache_bytes=max_cache_bytes,
        decoder=decoder_of(target, network, runtime),
    )
