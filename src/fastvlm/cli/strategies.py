"""Parsing and making the strategies named on a command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm.cli.loading import UsageError, usage
from fastvlm.example import example

if TYPE_CHECKING:
    from fastvlm.decoding import Strategy
    from fastvlm.vlm import VisionLanguageModel

AUTOREGRESSIVE, CASCADE, EARLY_EXIT = "autoregressive", "cascade", "early-exit"
LAYER_SKIP, PROMPT_LOOKUP = "layer-skip", "prompt-lookup"
ALWAYS_MEASURED = ("transformers", AUTOREGRESSIVE)
STRATEGIES_WITHOUT_DRAFT = (EARLY_EXIT, LAYER_SKIP, PROMPT_LOOKUP)
LAYER_SEARCH_IMAGES = 2
"""The number of images, the first ones, on whose replies layers to skip are searched for."""
STRATEGY_PATTERN = re.compile(
    r"(?P<kind>[^@:]+)(?:@(?P<layer>[1-9]\d{0,8}))?(?::(?P<length>[1-9]\d{0,8}))?"
)

DraftsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--draft",
        metavar="[NAME=]DIR",
        help="A draft made for this model, measured as the strategy NAME (without one:"
        " imitation). Give it again to compare several.",
        show_default="for the example model its own: imitation and imitation-mlp",
    ),
]
StrategiesOption = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="What to measure, separated by commas: early-exit, layer-skip, prompt-lookup, the"
        " drafts' names, and cascade (the first draft with prompt lookup); early-exit@4 drafts with"
        " 4 layers, prompt-lookup:8 drafts 8 tokens at a time."
        " autoregressive is always measured.",
        show_default="all",
    ),
]


@dataclass(frozen=True, slots=True)
class TypedStrategy:
    """A strategy as typed: `early-exit@4:8`.

    Args:
        name: The whole text.
        kind: The part before `@` and `:`, a draft's name or one of `STRATEGIES_WITHOUT_DRAFT`.
        exit_layer: The layers that draft (`@4`); None for the strategy's default.
        draft_length: Tokens in every draft (`:8`); None for the strategy's own rule.
    """

    name: str
    kind: str
    exit_layer: int | None = None
    draft_length: int | None = None

    @classmethod
    def of(cls, typed: str, known: Sequence[str]) -> TypedStrategy:
        """Parse a strategy.

        Args:
            typed: The strategy as typed.
            known: All kinds.

        Raises:
            UsageError: There is no such strategy, or it has no such setting.
        """
        found = STRATEGY_PATTERN.fullmatch(typed)
        kind = typed if found is None else found["kind"]
        if kind.startswith("imitation") and kind not in known:
            raise UsageError(
                f"The strategy {kind!r} needs a draft of that name; give it with"
                f" --draft {kind}=DIR."
            )
        if kind == CASCADE and kind not in known:
            raise UsageError(f"The strategy {kind!r} needs a draft; give it with --draft DIR.")
        if found is None or kind not in known:
            raise UsageError(f"The strategies here are {', '.join(known)}; got {typed!r}.")
        layer, length = (None if part is None else int(part) for part in found.groups()[1:])
        if layer is not None and kind != EARLY_EXIT:
            raise UsageError(f"Only {EARLY_EXIT} takes an exit layer; got {typed!r}.")
        if length is not None and kind == AUTOREGRESSIVE:
            raise UsageError(
                f"{AUTOREGRESSIVE} drafts nothing, so it has no length; got {typed!r}."
            )
        return cls(typed, kind, layer, length)


def named_drafts(given: Sequence[str] | None, model: str | None) -> dict[str, Path]:
    """Return the drafts' directories by the names of their strategies.

    Raises:
        UsageError: Two drafts have the same name, or a name is reserved.
    """
    if not given:
        if model is not None:
            return {}
        return {"imitation": example().DRAFT, "imitation-mlp": example().DRAFT_MLP}
    drafts: dict[str, Path] = {}
    for draft in given:
        name, equals, directory = draft.partition("=")
        if not equals or Path(draft).is_dir():
            name, directory = "imitation", draft
        if (
            not name
            or name in (*ALWAYS_MEASURED, CASCADE, *STRATEGIES_WITHOUT_DRAFT)
            or set(name) & set("@:,")
        ):
            raise UsageError(f"A draft can't be called {name!r}; got --draft {draft}.")
        if name in drafts:
            raise UsageError(
                f"Two drafts are called {name!r}; give each a name of its own, as in"
                " --draft NAME=DIR."
            )
        drafts[name] = Path(directory)
    return drafts


def chosen_strategies(wanted: str | None, drafts: Mapping[str, Path]) -> list[TypedStrategy]:
    """Return the strategies to measure besides `transformers`, in the order given.

    Raises:
        UsageError: A strategy is unknown, or needs a draft that isn't given.
    """
    known = [AUTOREGRESSIVE, *drafts, *([CASCADE] if drafts else []), *STRATEGIES_WITHOUT_DRAFT]
    names = known if wanted is None else [name.strip() for name in wanted.split(",")]
    if not any(names):
        raise UsageError(f"--strategies names none; there are {', '.join(known)}.")
    chosen = [name for name in names if name and name not in ALWAYS_MEASURED]
    return [TypedStrategy.of(name, known) for name in dict.fromkeys([AUTOREGRESSIVE, *chosen])]


def needs_search(chosen: Sequence[TypedStrategy], skipped: Sequence[int] | None) -> bool:
    """Return whether the layers to skip have to be searched for.

    Raises:
        UsageError: Layers to skip are given without the strategy `layer-skip`.
    """
    skips = any(one.kind == LAYER_SKIP for one in chosen)
    if skipped is not None and not skips:
        raise UsageError(f"--skipped-layers is for {LAYER_SKIP}, which is not measured here.")
    return skips and skipped is None


def named_strategies(
    vlm: VisionLanguageModel,
    chosen: Sequence[TypedStrategy],
    drafts: Mapping[str, Path],
    skipped: Sequence[int] | None = None,
) -> dict[str, Strategy]:
    """Return the strategies to measure, by name.

    Args:
        vlm: The model.
        chosen: The strategies as they were typed.
        drafts: The drafts' directories, by the names of their strategies.
        skipped: The layers that layer-skip leaves out; None for its default.

    Raises:
        CheckpointError: A draft is missing, broken or made for another model.
        UsageError: A setting is out of range.
    """
    from fastvlm.drafting.directory import load_draft

    draft_of = {name: name for name in drafts} | {CASCADE: next(iter(drafts), "")}
    wanted = {draft_of[one.kind] for one in chosen if one.kind in draft_of}
    networks = {name: load_draft(drafts[name], vlm.model) for name in sorted(wanted)}
    with usage():
        return {
            one.name: vlm.strategy(
                "imitation" if one.kind in drafts else one.kind,
                network=networks.get(draft_of.get(one.kind, "")),
                **options_of(one, skipped),
            )
            for one in chosen
        }


def options_of(typed: TypedStrategy, skipped: Sequence[int] | None) -> dict[str, Any]:
    """Return a strategy's options, as `VisionLanguageModel.strategy` takes them.

    Args:
        typed: The strategy.
        skipped: The layers that `layer-skip` leaves out; None for its default.
    """
    options: dict[str, Any] = {
        "exit_layer": typed.exit_layer,
        "num_speculative_tokens": typed.draft_length,
    }
    if typed.draft_length is not None:
        # Drafts of one length don't end where the drafter is unsure.
        options["confidence"] = 0.0
    if typed.kind == LAYER_SKIP:
        options["skipped_layers"] = skipped
    return options


def describe(typed: TypedStrategy, strategy: Strategy) -> dict[str, Any]:
    """Return a strategy's settings for the JSON output."""
    from fastvlm.functional.digests import digest_of_weights

    network = getattr(strategy, "network", None)
    skipped = getattr(strategy, "skipped", None)
    return {
        "kind": typed.kind,
        "exit_layer": strategy.exit_layer or None,
        "draft_length": typed.draft_length,
        "network": None
        if network is None
        else {
            "kind": network.config.kind,
            "num_speculative_tokens": network.config.num_speculative_tokens,
            "confidence": network.config.confidence,
            "weights": digest_of_weights(network),
        },
        "skipped_layers": None if skipped is None else list(skipped),
    }
