"""Strategies as they are typed, and the drafters that they name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm import embedded
from fastvlm.functional.errors import InputError

if TYPE_CHECKING:
    from fastvlm.decoding import Drafter
    from fastvlm.vlm import VisionLanguageModel

AUTOREGRESSIVE, EARLY_EXIT, SKIP = "autoregressive", "early-exit", "skip"
ALWAYS = ("transformers", AUTOREGRESSIVE)
WITHOUT_DRAFT = (EARLY_EXIT, SKIP, "lookup")
SEARCHED = 2
"""Pictures, the first ones, on whose replies the layers to skip are searched for."""
TYPED = re.compile(r"(?P<kind>[^@:]+)(?:@(?P<layer>[1-9]\d*))?(?::(?P<length>[1-9]\d*))?")

DraftsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--draft",
        metavar="[NAME=]DIR",
        help="A draft made for this model, measured as the strategy NAME (without one:"
        " imitation). Give it again to compare several.",
        show_default="those that ship, for the model that ships: imitation and imitation-mlp",
    ),
]
StrategiesOption = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="What to measure, separated by commas: early-exit, skip, lookup, and the drafts'"
        " names; early-exit@4 drafts with 4 layers, lookup:8 drafts 8 tokens at a time."
        " autoregressive is always measured.",
        show_default="all",
    ),
]


@dataclass(frozen=True, slots=True)
class Strategy:
    """A strategy as it is typed: `early-exit@4:8`.

    Args:
        name: All of it.
        kind: The part before `@` and `:`, a draft's name or one of `WITHOUT_DRAFT`.
        exit_layer: The layers that draft (`@4`); None for the strategy's own.
        draft_length: Tokens of every draft (`:8`); None for the strategy's own rule.
    """

    name: str
    kind: str
    exit_layer: int | None = None
    draft_length: int | None = None

    @classmethod
    def of(cls, typed: str, known: Sequence[str]) -> Strategy:
        """Read what was typed.

        Args:
            typed: The strategy.
            known: The kinds that there are.

        Raises:
            InputError: There is no such strategy, or it has no such setting.
        """
        found = TYPED.fullmatch(typed)
        kind = typed if found is None else found["kind"]
        if kind.startswith("imitation") and kind not in known:
            raise InputError(
                f"The strategy {kind!r} needs a draft of that name; give it with"
                f" --draft {kind}=DIR."
            )
        if found is None or kind not in known:
            raise InputError(f"The strategies here are {', '.join(known)}; got {typed!r}.")
        layer, length = (None if part is None else int(part) for part in found.groups()[1:])
        if layer is not None and kind != EARLY_EXIT:
            raise InputError(f"Only {EARLY_EXIT} takes an exit layer; got {typed!r}.")
        if length is not None and kind == AUTOREGRESSIVE:
            raise InputError(
                f"{AUTOREGRESSIVE} drafts nothing, so it has no length; got {typed!r}."
            )
        return cls(typed, kind, layer, length)


def named_drafts(given: Sequence[str] | None, model: str | None) -> dict[str, Path]:
    """Return the drafts' directories by the names of their strategies.

    Raises:
        InputError: Two drafts have the same name, or one has a name that means something else.
    """
    if not given:
        if model is not None:
            return {}
        mlp = embedded.FOLDER / "draft-mlp"
        return {"imitation": embedded.DRAFT} | ({"imitation-mlp": mlp} if mlp.is_dir() else {})
    drafts: dict[str, Path] = {}
    for draft in given:
        name, equals, directory = draft.partition("=")
        if not equals or Path(draft).is_dir():
            name, directory = "imitation", draft
        if not name or name in (*ALWAYS, *WITHOUT_DRAFT) or set(name) & set("@:,"):
            raise InputError(f"A draft can't be called {name!r}; got --draft {draft}.")
        if name in drafts:
            raise InputError(
                f"Two drafts are called {name!r}; give each a name of its own, as in"
                " --draft NAME=DIR."
            )
        drafts[name] = Path(directory)
    return drafts


def chosen_strategies(wanted: str | None, drafts: Mapping[str, Path]) -> list[Strategy]:
    """Return what to measure besides `transformers`, in the order given.

    Raises:
        InputError: A strategy is unknown, or needs a draft that isn't there.
    """
    known = [AUTOREGRESSIVE, *drafts, *WITHOUT_DRAFT]
    names = known if wanted is None else [name.strip() for name in wanted.split(",")]
    chosen = [name for name in names if name and name not in ALWAYS]
    return [Strategy.of(name, known) for name in dict.fromkeys([AUTOREGRESSIVE, *chosen])]


def needs_search(chosen: Sequence[Strategy], skipped: Sequence[int] | None) -> bool:
    """Return whether the layers to skip have to be searched for."""
    return skipped is None and any(strategy.kind == SKIP for strategy in chosen)


def named_drafters(
    vlm: VisionLanguageModel,
    chosen: Sequence[Strategy],
    drafts: Mapping[str, Path],
    skipped: Sequence[int] | None = None,
) -> dict[str, Drafter]:
    """Return the strategies to measure, by name.

    Raises:
        CheckpointError: A draft is missing, broken or made for another model.
        InputError: A setting is out of range.
    """
    from fastvlm.drafting.directory import load_draft

    networks = {
        kind: load_draft(drafts[kind], vlm.model)
        for kind in {strategy.kind for strategy in chosen}
        if kind in drafts
    }
    return {
        strategy.name: vlm.drafter(
            "imitation" if strategy.kind in networks else strategy.kind,
            network=networks.get(strategy.kind),
            exit_layer=strategy.exit_layer,
            num_speculative_tokens=strategy.draft_length,
            # Drafts of one length don't end where the drafter is unsure.
            confidence=None if strategy.draft_length is None else 0.0,
            skipped_layers=skipped,
        )
        for strategy in chosen
    }


def describe(strategy: Strategy, drafter: Drafter) -> dict[str, Any]:
    """Return what a strategy is, for the record."""
    network = getattr(drafter, "network", None)
    skipped = getattr(drafter, "skipped", None)
    return {
        "kind": strategy.kind,
        "exit_layer": drafter.exit_layer or None,
        "draft_length": strategy.draft_length,
        "network": None
        if network is None
        else {
            "kind": network.config.kind,
            "num_speculative_tokens": network.config.num_speculative_tokens,
            "confidence": network.config.confidence,
        },
        "skipped_layers": None if skipped is None else list(skipped),
    }
