"""Load a vision-language model; stream or generate its replies."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastvlm import embedded
from fastvlm.checkpoints import load_checkpoint
from fastvlm.checkpoints.processors import tokenizer_of
from fastvlm.decoding import Decoding, Drafter, Request
from fastvlm.decoding.drafters import Drafters, DraftOptions
from fastvlm.decoding.layer_search import LayerChoice, find_skipped_layers
from fastvlm.decoding.prefix_cache import PrefixCache
from fastvlm.decoding.sampling import SamplingOptions, selection_of
from fastvlm.decoding.text import ReplyText
from fastvlm.drafting import ImitationNetwork
from fastvlm.drafting.directory import load_draft
from fastvlm.functional.errors import InputError
from fastvlm.functional.lru import LruBytes
from fastvlm.functional.statistics import DecodingStatistics
from fastvlm.language import split_decoder
from fastvlm.language.inputs import end_tokens
from fastvlm.language.packed import PACKED_BYTES, pack, pack_decoder
from fastvlm.prompts import (
    FastViTHDPromptBuilder,
    ImageFeatureCache,
    Message,
    prompt_builder,
    question,
)
from fastvlm.vision.configuration import REDUCTION
from fastvlm.vision.fastvithd import FastViTHD
from fastvlm.vision.pictures import Picture, PictureOptions

PREFIX_BYTES = 256 * 2**20
"""Memory for what is kept of pictures: a dozen and more at 1024 px, of FastVLM-0.5B in bfloat16."""


class RequestOptions(PictureOptions, SamplingOptions, total=False):
    """How a picture is shown, how tokens are drawn, and where the reply ends.

    Args:
        max_new_tokens: The most tokens of the reply; 256, if not given.
        stop: Strings that end the reply, which they are no part of.
    """

    max_new_tokens: int
    stop: Sequence[str]


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a reply as it streams.

    Args:
        text: Text that is final; never half a character.
        tokens: The tokens that it is made of.
        drafted: Whether each of them was drafted and accepted.
    """

    text: str
    tokens: tuple[int, ...]
    drafted: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply.

    Args:
        text: Its text, without special tokens.
        tokens: Its tokens, the end token included.
        drafted: Whether each token was drafted and accepted.
        statistics: How it was decoded.
    """

    text: str
    tokens: list[int]
    drafted: list[bool]
    statistics: DecodingStatistics


class VisionLanguageModel:
    """A vision-language model, split for self-speculative decoding.

    Args:
        model: The target, as `transformers` loads it.
        processor: Its processor; its tokenizer, for a model of text alone or one around FastViTHD.
        network: The imitation network that drafts, if there is one.
        prefix_bytes: The most memory for what is kept of pictures for the next question.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        network: ImitationNetwork | None = None,
        *,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        self.model, self.network = model.eval(), network
        self.processor, self.tokenizer = processor, tokenizer_of(processor)
        self.decoder = split_decoder(model)
        self.prompts = prompt_builder(model, processor, self.decoder)
        self.drafters = Drafters(self.decoder, network)
        self.lru = LruBytes(prefix_bytes)
        self.prefixes, self.features = PrefixCache(self.lru), ImageFeatureCache(self.lru)
        self.end_tokens = end_tokens(model)

    @property
    def fastvithd(self) -> FastViTHDPromptBuilder:
        """What makes the prompts of a model around FastViTHD, and knows their length beforehand.

        Raises:
            InputError: The model has another encoder, or none.
        """
        if not isinstance(self.prompts, FastViTHDPromptBuilder):
            raise InputError(
                f"{type(self.model).__name__} has no FastViTHD encoder, which this needs: how a"
                " picture is shown is its own processor's matter."
            )
        return self.prompts

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that a model around FastViTHD was made for."""
        return self.fastvithd.image_size

    def tokens(self, prompt: str, pictures: int, visual: int | None = None) -> list[int]:
        """Return the tokens of a question, with a placeholder for every visual token.

        Args:
            prompt: The text.
            pictures: Pictures that stand before it.
            visual: Visual tokens of each; None for those of a picture as the model takes it.

        Raises:
            InputError: The model is not one around FastViTHD.
        """
        visual = (self.image_size // REDUCTION) ** 2 if visual is None else visual
        shown = [{"type": "image"}] * pictures
        content = [*shown, {"type": "text", "text": prompt}]
        return self.fastvithd.tokens([{"role": "user", "content": content}], [visual] * pictures)

    def request(
        self,
        prompt: str | Sequence[Message],
        picture: Picture | None = None,
        **options: Unpack[RequestOptions],
    ) -> Request:
        """Return a request whose pictures are encoded, unless they are still known from another.

        Raises:
            InputError: A picture can't be read, the prompt has a placeholder of its own, or an
                option is out of range.
        """
        started = time.perf_counter()
        if not isinstance(prompt, str) and picture is not None:
            raise InputError("A dialogue's pictures stand in its messages; leave out the picture.")
        messages = question(prompt, picture) if isinstance(prompt, str) else prompt
        shown = among(PictureOptions, options)
        cache = self.features if self.lru.limit else None
        encoded = self.prompts.decoder_inputs(messages, cache, **shown)
        return Request(
            encoded.token_ids,
            encoded.embeddings,
            options.get("max_new_tokens", 256),
            self.end_tokens,
            keys=encoded.keys or [],
            store=self.prefixes if cache is not None and encoded.keys is not None else None,
            positions=encoded.position_ids,
            memory=encoded.encoder_states,
            started=started,
            selection=selection_of(encoded.token_ids, **among(SamplingOptions, options)),
            text=ReplyText(self.tokenizer, options.get("stop", ())),
        )

    def drafter(
        self,
        strategy: str | None = None,
        *,
        network: ImitationNetwork | None = None,
        **options: Unpack[DraftOptions],
    ) -> Drafter:
        """Return a way of drafting. See `Drafters.make`.

        Args:
            strategy: One of `STRATEGIES`; None for the model's best.
            network: The network to draft with, if not the model's own draft.
            options: How drafts are made, see `DraftOptions`.
        """
        return self.drafters.make(strategy, network=network, **options)

    def find_skipped_layers(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Picture | None],
        **options: Unpack[RequestOptions],
    ) -> LayerChoice:
        """Search for the layers that the strategy `skip` leaves out, on samples.

        Args:
            prompts: What is asked, as later on; a few are enough.
            pictures: Of what, one for each prompt.
            options: As for `generate_batch`; 64 tokens of each reply, if no other number is given.

        Raises:
            InputError: As `generate_batch`, or no reply is long enough to learn from.
        """
        shorter: RequestOptions = {"max_new_tokens": 64, **options}
        requests = self.requests(prompts, pictures, **shorter)
        return find_skipped_layers(self.decoder, requests)

    def stream(
        self,
        prompt: str | Sequence[Message],
        picture: Picture | None = None,
        *,
        drafter: Drafter | None = None,
        **options: Unpack[RequestOptions],
    ) -> ReplyStream:
        """Return a reply as a stream of pieces; its `reply` is there when it has ended.

        Args:
            prompt: What is asked of the picture, or a whole dialogue with its pictures, see
                `Message`. What an earlier turn has computed is not computed again.
            picture: A path or a Pillow image; None for a question without a picture, or a dialogue.
            drafter: What `drafter` returned; None for the model's best.
            options: How the picture is shown, how tokens are drawn, and where the reply ends; see
                `RequestOptions`.

        Raises:
            InputError: The picture can't be read, the prompt is longer than the context, or an
                option is out of range.
        """
        request = self.request(prompt, picture, **options)
        return ReplyStream(self, request, drafter or self.drafter())

    def generate(
        self,
        prompt: str | Sequence[Message],
        picture: Picture | None = None,
        *,
        drafter: Drafter | None = None,
        **options: Unpack[RequestOptions],
    ) -> Reply:
        """Return a whole reply. See `stream`."""
        stream = self.stream(prompt, picture, drafter=drafter, **options)
        for _ in stream:
            pass
        return stream.reply

    def generate_batch(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Picture | None],
        *,
        drafter: Drafter | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Reply]:
        """Return a reply to each prompt about its picture, decoded together.

        Raises:
            InputError: As `stream`, or the prompts and the pictures differ in number.
        """
        requests = self.requests(prompts, pictures, **options)
        for _ in Decoding(self.decoder, drafter or self.drafter(), requests):
            pass
        return [self.reply(request) for request in requests]

    def requests(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Picture | None],
        **options: Unpack[RequestOptions],
    ) -> list[Request]:
        """Return a request for each prompt about its picture.

        Raises:
            InputError: As `request`, or the prompts and the pictures differ in number.
        """
        if len(prompts) != len(pictures):
            raise InputError(
                f"A batch has a picture for each prompt; got {len(prompts)} prompts and"
                f" {len(pictures)} pictures."
            )
        return [
            self.request(prompt, picture, **options)
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]

    def text(self, request: Request) -> ReplyText:
        """Return a request's text, up to its last token."""
        if request.text is None:
            request.text = ReplyText(self.tokenizer)
        request.text.follow(request.reply)
        return request.text

    def reply(self, request: Request) -> Reply:
        """Return what a finished request decoded."""
        text = self.text(request)
        if request.finished:
            text.end()
        return Reply(
            text.final.strip(),
            request.reply,
            request.drafted,
            request.statistics,
        )


class ReplyStream:
    """A reply that is being decoded: iterate over its pieces, then read `reply`.

    Whoever stops iterating cancels the rest; nothing more is computed.
    """

    def __init__(self, vlm: VisionLanguageModel, request: Request, drafter: Drafter) -> None:
        self.vlm, self.request = vlm, request
        self.decoding = Decoding(vlm.decoder, drafter, [request])

    def __iter__(self) -> Iterator[Piece]:
        """Yield a piece whenever text has become final, and at last one for what is left."""
        request, text = self.request, self.vlm.text(self.request)
        shown = start = 0
        for [gained] in self.decoding:
            known = len(request.reply)
            # Text that is searched for stop strings has been followed to the end of the cycle.
            for end in [known] if text.stop else range(known - gained + 1, known + 1):
                text.follow(request.reply[:end])
                if request.finished and end == known:
                    text.end()
                elif len(text.final) == shown:
                    continue
                tokens, drafted = request.reply[start:end], request.drafted[start:end]
                yield Piece(text.final[shown:], tuple(tokens), tuple(drafted))
                shown, start = len(text.final), end

    @property
    def reply(self) -> Reply:
        """The whole reply; what is decoded so far, while the stream goes on."""
        return self.vlm.reply(self.request)


def among(options: Any, given: Mapping[str, Any]) -> Any:
    """Return those of the given options that a `TypedDict` names."""
    return {name: given[name] for name in options.__annotations__ if name in given}


def load(
    model: str | Path | None = None,
    draft: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    prefix_bytes: int = PREFIX_BYTES,
    packed_bytes: int = PACKED_BYTES,
) -> VisionLanguageModel:
    """Load a model, and a draft that was made for it.

    Args:
        model: A directory in Apple's layout or in `transformers`', or a name on the Hugging Face
            hub; None for the model that ships with fastvlm, with its own draft.
        draft: A draft's directory; None to decode without one.
        dtype: The precision to compute in.
        device: Where to compute.
        prefix_bytes: The most memory for what is kept of pictures, so that a second question about
            one costs its own text only; 0 keeps nothing.
        packed_bytes: The most memory for a second copy of the decoder's weights, with which a CPU
            verifies faster in float32 (see `pack_decoder`); 0 makes none.

    Raises:
        CheckpointError: The model or the draft is missing or broken, or the draft was made for
            another model.
        InputError: The model's family is not known, or its processor has no chat template.
    """
    if model is None:
        model, draft = embedded.MODEL, embedded.DRAFT if draft is None else draft
    target, processor = load_checkpoint(model, dtype, device)
    tower = getattr(target.base_model, "vision_tower", None)
    if isinstance(tower, FastViTHD):
        # Fusing is exact, so nobody who loads a model for inference wants the branches.
        tower.fuse()
    network = None if draft is None else load_draft(draft, target)
    taken = pack_decoder(target, packed_bytes)
    if network is not None:
        pack([network], packed_bytes - taken)
    return VisionLanguageModel(target, processor, network, prefix_bytes=prefix_bytes)
