"""Load a vision-language model; stream or generate its replies."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastvlm import embedded
from fastvlm.checkpoints import load_checkpoint
from fastvlm.decoding import (
    Autoregressive,
    Decoding,
    Drafter,
    PromptLookup,
    Request,
    SelfSpeculative,
    SkippedLayers,
)
from fastvlm.decoding.layer_search import LayerChoice, find_skipped_layers
from fastvlm.decoding.prefix import Prefix, PrefixStore
from fastvlm.decoding.skipping import skipped_by_default
from fastvlm.drafting import (
    AdaptiveLength,
    ConfidenceLength,
    DraftLength,
    FixedLength,
    ImitationNetwork,
)
from fastvlm.drafting.directory import load_draft
from fastvlm.functional.errors import InputError
from fastvlm.functional.statistics import DecodingStatistics
from fastvlm.language import split_decoder
from fastvlm.vision.configuration import REDUCTION
from fastvlm.vision.fastvithd import FastViTHD
from fastvlm.vision.pictures import Picture, PictureOptions, prepare

PREFIX_BYTES = 256 * 2**20
"""Memory for what is kept of pictures: a dozen and more at 1024 px, of FastVLM-0.5B in bfloat16."""
MAX_DRAFT = 24
"""The most tokens in a draft, where neither the caller nor the draft says another number."""
STRATEGIES = ("autoregressive", "imitation", "early-exit", "skip", "lookup")


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
        self.prefixes = PrefixStore(prefix_bytes)
        self._adaptive: WeakKeyDictionary[nn.Module, dict[Hashable, AdaptiveLength]]
        self._adaptive = WeakKeyDictionary()
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
        self,
        prompt: str,
        picture: Picture | None = None,
        *,
        max_new_tokens: int = 256,
        **options: Unpack[PictureOptions],
    ) -> Request:
        """Return a request whose picture is encoded, unless it is still known from another one.

        Raises:
            InputError: The picture can't be read, the prompt has a placeholder of its own, or an
                option is out of range.
        """
        started = time.perf_counter()
        if picture is None:
            tokens = self.tokens(prompt, pictures=0)
            row = torch.tensor(tokens, device=self.decoder.device)
            if bool((row == self.model.config.image_token_id).any()):
                raise InputError(
                    "The prompt has a picture's placeholder, but no picture was given."
                )
            embeddings = self.decoder.embed(row)
            return Request(tokens, embeddings, max_new_tokens, self.end_tokens, None, started)
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
        return Request(tokens, embeddings, max_new_tokens, self.end_tokens, prefix, started)

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
        num_speculative_tokens: int | None = None,
        confidence: float | None = None,
        exit_layer: int | None = None,
        skipped_layers: Iterable[int] | None = None,
        network: ImitationNetwork | None = None,
    ) -> Drafter:
        """Return a way of drafting.

        Args:
            strategy: One of `STRATEGIES`; None for `imitation` where there is a draft, and for
                `autoregressive` where there is none.
            num_speculative_tokens: The most tokens in a draft; None for what the draft records, and
                where it records nothing, 24 (for `lookup`: 10).
            confidence: The drafter's own probability below which a draft ends; 0 for drafts of
                fixed length, None for what the draft records. Where it records nothing, drafts
                adapt to what is accepted and to what this machine takes, see `AdaptiveLength`.
            exit_layer: For `early-exit`: the layers that draft.
            skipped_layers: For `skip`: the layers that don't draft, counted from 0, as
                `find_skipped_layers` finds them; None for every second one of the middle half.
            network: The network to draft with, if not the model's own draft.

        Raises:
            InputError: The strategy is unknown, needs a draft that isn't there, or an option is
                out of range.
        """
        network = network or self.network
        strategy = strategy or ("imitation" if network is not None else "autoregressive")
        if strategy == "autoregressive":
            return Autoregressive()
        if strategy == "lookup":
            return PromptLookup(10 if num_speculative_tokens is None else num_speculative_tokens)
        if strategy == "early-exit":
            layer = exit_layer or max(1, self.decoder.depth // 4)
            length = self.draft_length(self.model, layer, num_speculative_tokens, confidence)
            return SelfSpeculative(self.decoder, layer, None, length, name="early-exit")
        if strategy == "skip":
            depth = self.decoder.depth
            skipped = skipped_by_default(depth) if skipped_layers is None else skipped_layers
            skipped = tuple(sorted(set(skipped)))
            length = self.draft_length(self.model, skipped, num_speculative_tokens, confidence)
            return SkippedLayers(self.decoder, skipped, length)
        if strategy != "imitation":
            raise InputError(f"The strategies are {', '.join(STRATEGIES)}; got {strategy!r}.")
        if network is None:
            raise InputError("The strategy 'imitation' needs a draft; load the model with one.")
        config = network.config
        length = self.draft_length(
            network,
            config.exit_layer,
            config.num_speculative_tokens
            if num_speculative_tokens is None
            else num_speculative_tokens,
            config.confidence if confidence is None else confidence,
        )
        return SelfSpeculative(self.decoder, config.exit_layer, network, length)

    def draft_length(
        self, owner: nn.Module, layers: Hashable, maximum: int | None, confidence: float | None
    ) -> DraftLength:
        """Return how long drafts go on.

        What adaptive drafts have learnt about a drafter is kept from one request to the next.

        Args:
            owner: What drafts: a network, or the target itself.
            layers: Which layers of the target draft.
            maximum: The most tokens in a draft; None for the usual maximum.
            confidence: As for `drafter`; None for drafts that adapt.

        Raises:
            InputError: The maximum or the confidence is out of range.
        """
        maximum = MAX_DRAFT if maximum is None else maximum
        if confidence is not None:
            return ConfidenceLength(maximum, confidence) if confidence else FixedLength(maximum)
        known = self._adaptive.setdefault(owner, {})
        if (layers, maximum) not in known:
            known[layers, maximum] = AdaptiveLength(maximum)
        return known[layers, maximum]

    def find_skipped_layers(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Picture],
        *,
        max_new_tokens: int = 64,
        **options: Unpack[PictureOptions],
    ) -> LayerChoice:
        """Search for the layers that the strategy `skip` leaves out, on samples.

        Args:
            prompts: What is asked, as later on; a few are enough.
            pictures: Of what, one for each prompt.
            max_new_tokens: The most tokens of each sample's reply.
            options: How the pictures are shown, see `PictureOptions`.

        Raises:
            InputError: As `generate_batch`, or no reply is long enough to learn from.
        """
        requests = self.requests(prompts, pictures, max_new_tokens=max_new_tokens, **options)
        return find_skipped_layers(self.decoder, requests)

    def stream(
        self,
        prompt: str,
        picture: Picture | None = None,
        *,
        max_new_tokens: int = 256,
        drafter: Drafter | None = None,
        **options: Unpack[PictureOptions],
    ) -> ReplyStream:
        """Return a reply as a stream of pieces; its `reply` is there when it has ended.

        Args:
            prompt: What is asked of the picture.
            picture: A path or a Pillow image; None for a question without a picture.
            max_new_tokens: The most tokens of the reply.
            drafter: What `drafter` returned; None for the model's best.
            options: How the picture is shown, see `PictureOptions`.

        Raises:
            InputError: The picture can't be read, the prompt is longer than the context, or an
                option is out of range.
        """
        request = self.request(prompt, picture, max_new_tokens=max_new_tokens, **options)
        return ReplyStream(self, request, drafter or self.drafter())

    def generate(
        self,
        prompt: str,
        picture: Picture | None = None,
        *,
        max_new_tokens: int = 256,
        drafter: Drafter | None = None,
        **options: Unpack[PictureOptions],
    ) -> Reply:
        """Return a whole reply. See `stream`."""
        stream = self.stream(
            prompt, picture, max_new_tokens=max_new_tokens, drafter=drafter, **options
        )
        for _ in stream:
            pass
        return stream.reply

    def generate_batch(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Picture],
        *,
        max_new_tokens: int = 256,
        drafter: Drafter | None = None,
        **options: Unpack[PictureOptions],
    ) -> list[Reply]:
        """Return a reply to each prompt about its picture, decoded together.

        Raises:
            InputError: As `stream`, or the prompts and the pictures differ in number.
        """
        requests = self.requests(prompts, pictures, max_new_tokens=max_new_tokens, **options)
        for _ in Decoding(self.decoder, drafter or self.drafter(), requests):
            pass
        return [self.reply(request) for request in requests]

    def requests(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Picture],
        *,
        max_new_tokens: int,
        **options: Unpack[PictureOptions],
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
            self.request(prompt, picture, max_new_tokens=max_new_tokens, **options)
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]

    def text(self, tokens: list[int]) -> str:
        """Return the text of a reply's tokens, without special tokens."""
        # One list of tokens is decoded to one string; the stubs don't tell it from a list of them.
        return cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True))

    def reply(self, request: Request) -> Reply:
        """Return what a finished request decoded."""
        return Reply(
            self.text(request.reply).strip(),
            request.reply,
            request.drafted,
            DecodingStatistics.of(
                request.started, request.times, request.proposed, request.accepted
            ),
        )


class ReplyStream:
    """A reply that is being decoded: iterate over its pieces, then read `reply`."""

    def __init__(self, vlm: VisionLanguageModel, request: Request, drafter: Drafter) -> None:
        self.vlm, self.request = vlm, request
        self.decoding = Decoding(vlm.decoder, drafter, [request])

    def __iter__(self) -> Iterator[Piece]:
        """Yield a piece for each token whose text is final."""
        shown, start = "", 0
        for [gained] in self.decoding:
            known = len(self.request.reply)
            for end in range(known - gained + 1, known + 1):
                text = self.vlm.text(self.request.reply[:end])
                # A character may be made of several tokens: half of it is not shown.
                if text.endswith("\N{REPLACEMENT CHARACTER}") and not self.request.finished:
                    continue
                yield Piece(
                    text[len(shown) :],
                    tuple(self.request.reply[start:end]),
                    tuple(self.request.drafted[start:end]),
                )
                shown, start = text, end

    @property
    def reply(self) -> Reply:
        """The whole reply; what is decoded so far, while the stream goes on."""
        return self.vlm.reply(self.request)


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
