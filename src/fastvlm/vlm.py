"""Load a vision-language model; stream or generate its replies."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastvlm import embedded
from fastvlm.checkpoints import load_checkpoint
from fastvlm.decoding import Decoding, Drafter, Request
from fastvlm.decoding.drafters import Drafters, DraftOptions
from fastvlm.decoding.prefix import Prefix, PrefixStore
from fastvlm.decoding.sampling import SamplingOptions, selection_of
from fastvlm.decoding.text import ReplyText
from fastvlm.drafting import ImitationNetwork
from fastvlm.drafting.directory import load_draft
from fastvlm.functional.errors import InputError
from fastvlm.functional.statistics import DecodingStatistics
from fastvlm.language import split_decoder
from fastvlm.vision.configuration import REDUCTION
from fastvlm.vision.fastvithd import FastViTHD
from fastvlm.vision.pictures import Picture, PictureOptions, prepare

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
        tokenizer: Its tokenizer, with a chat template.
        network: The imitation network that drafts, if there is one.
        prefix_bytes: The most memory for what is kept of pictures for the next question.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        network: ImitationNetwork | None = None,
        *,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        tower = getattr(model.base_model, "vision_tower", None)
        if not isinstance(tower, FastViTHD):
            raise InputError(
                f"{type(model).__name__} has no FastViTHD encoder; so far fastvlm prepares"
                " pictures for models with one."
            )
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"The tokenizer of {type(model).__name__} has no chat template, so fastvlm can't"
                " tell how a prompt is put to it; set tokenizer.chat_template."
            )
        self.model, self.tokenizer, self.network = model.eval(), tokenizer, network
        # Folding is exact, so nobody who loads a model for inference wants the branches.
        tower.fuse()
        self.decoder = split_decoder(model)
        self.drafters = Drafters(self.decoder, network)
        self.prefixes = PrefixStore(prefix_bytes)
        self.image_size: int = tower.config.image_size
        ends = model.generation_config.eos_token_id
        self.end_tokens = frozenset([ends] if isinstance(ends, int) else ends or ())

    def tokens(self, prompt: str, pictures: int, visual: int | None = None) -> list[int]:
        """Return a prompt's tokens, with a placeholder for every visual token.

        Args:
            prompt: The text.
            pictures: Pictures that stand before it.
            visual: Visual tokens of each; None for those of a picture as the model takes it.
        """
        visual = (self.image_size // REDUCTION) ** 2 if visual is None else visual
        content: list[dict[str, str]] = [{"type": "image"}] * pictures
        chat: list[dict[str, Any]] = [
            {"role": "user", "content": [*content, {"type": "text", "text": prompt}]}
        ]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        image = self.model.config.image_token_id
        expanded: list[int] = []
        for token in self.tokenizer.encode(text, add_special_tokens=False):
            expanded += [token] * visual if token == image else [token]
        return expanded

    @torch.inference_mode()
    def request(
        self, prompt: str, picture: Picture | None = None, **options: Unpack[RequestOptions]
    ) -> Request:
        """Return a request whose picture is encoded, unless it is still known from another one.

        Raises:
            InputError: The picture can't be read, the prompt has a placeholder of its own, or an
                option is out of range.
        """
        started = time.perf_counter()
        tokens, embeddings, prefix = self.encoded(prompt, picture, **among(PictureOptions, options))
        return Request(
            tokens,
            embeddings,
            options.get("max_new_tokens", 256),
            self.end_tokens,
            prefix,
            started,
            selection=selection_of(tokens, **among(SamplingOptions, options)),
            text=ReplyText(self.tokenizer, options.get("stop", ())),
        )

    def encoded(
        self, prompt: str, picture: Picture | None, **options: Unpack[PictureOptions]
    ) -> tuple[list[int], Tensor, Prefix | None]:
        """Return a prompt's tokens, their embeddings, (length, d_model), and what is kept of it."""
        if picture is None:
            tokens = self.tokens(prompt, pictures=0)
            row = torch.tensor(tokens, device=self.decoder.device)
            if bool((row == self.model.config.image_token_id).any()):
                raise InputError(
                    "The prompt has a picture's placeholder, but no picture was given."
                )
            return tokens, self.decoder.embed(row), None
        shown: PictureOptions = {"image_size": self.image_size, **options}
        views = prepare(picture, **shown)
        visual = len(views) * (views.shape[-1] // REDUCTION) ** 2
        tokens = self.tokens(prompt, pictures=1, visual=visual)
        row = torch.tensor(tokens, device=self.decoder.device)
        places = row == self.model.config.image_token_id
        if int(places.sum()) != visual:
            raise InputError("The prompt must not contain the picture's placeholder itself.")
        prefix = self.prefix(views, tokens[: int(places.nonzero()[-1]) + 1])
        features = self.visual_features(views) if prefix is None else prefix.features
        embeddings = self.decoder.embed(row).masked_scatter(places[:, None], features)
        return tokens, embeddings, prefix

    def visual_features(self, views: Tensor) -> Tensor:
        """Encode what `prepare` made of a picture: (visual tokens, d_model)."""
        pixels = views.to(self.decoder.device, self.decoder.dtype)
        return self.model.get_image_features(pixels).pooler_output.flatten(0, 1)

    def prefix(self, views: Tensor, tokens: list[int]) -> Prefix | None:
        """Return what is known of a picture, which is encoded where nothing is.

        Args:
            views: (views, 3, size, size) in [0, 1].
            tokens: The prompt up to the picture's last visual token.

        Returns:
            None where nothing is kept.
        """
        if not self.prefixes.limit:
            return None
        digest = hashlib.blake2b(views.numpy().tobytes(), digest_size=16)
        digest.update(repr(views.shape).encode())
        picture = digest.hexdigest()
        known = self.prefixes.find(picture)
        if known is not None and known.tokens == tokens:
            return known
        features = self.visual_features(views) if known is None else known.features
        return self.prefixes.keep(picture, tokens, features)

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
        drafters = self.drafters if network is None else Drafters(self.decoder, network)
        return drafters.make(strategy, **options)

    def stream(
        self,
        prompt: str,
        picture: Picture | None = None,
        *,
        drafter: Drafter | None = None,
        **options: Unpack[RequestOptions],
    ) -> ReplyStream:
        """Return a reply as a stream of pieces; its `reply` is there when it has ended.

        Args:
            prompt: What is asked of the picture.
            picture: A path or a Pillow image; None for a question without a picture.
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
        prompt: str,
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
        pictures: Sequence[Picture],
        *,
        drafter: Drafter | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Reply]:
        """Return a reply to each prompt about its picture, decoded together.

        Raises:
            InputError: As `stream`, or the prompts and the pictures differ in number.
        """
        if len(prompts) != len(pictures):
            raise InputError(
                f"A batch has a picture for each prompt; got {len(prompts)} prompts and"
                f" {len(pictures)} pictures."
            )
        requests = [
            self.request(prompt, picture, **options)
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]
        for _ in Decoding(self.decoder, drafter or self.drafter(), requests):
            pass
        return [self.reply(request) for request in requests]

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
            DecodingStatistics.of(
                request.started, request.times, request.proposed, request.accepted
            ),
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

    Raises:
        CheckpointError: The model or the draft is missing or broken, or the draft was made for
            another model.
        InputError: The model's family is not known.
    """
    if model is None:
        model, draft = embedded.MODEL, embedded.DRAFT if draft is None else draft
    target, tokenizer = load_checkpoint(model, dtype, device)
    network = None if draft is None else load_draft(draft, target)
    return VisionLanguageModel(target, tokenizer, network, prefix_bytes=prefix_bytes)
