"""What all verbs have in common: options in groups, values that are checked, help that fits."""

from __future__ import annotations

import math
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import partial
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from fastvlm.functional.options import Option

LARGEST_TOLD = 65536
"""What an option may at most be is told up to here: what is larger is no limit in practice."""
HELP_CELLS = 100
"""The most cells of a line of help."""
TABLE_CELLS = 70
"""Cells from which an option's help stands beside its name, not below it."""


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """Let a verb take its options in groups.

    Args:
        verb: A function; each of its parameters whose type is a dataclass stands for those fields
            of it that are annotated as options. A parameter's default gives the fields' defaults.

    Returns:
        The verb as typer takes it, with an option for each field.
    """
    hints = get_type_hints(verb, include_extras=True)
    flat: list[Parameter] = []
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    for name, parameter in signature(verb).parameters.items():
        if is_dataclass(hints[name]):
            usual = None if parameter.default is Parameter.empty else parameter.default
            options = list(_options_of(hints[name], usual))
            build = hints[name] if usual is None else partial(replace, usual)
            groups[name] = build, [option.name for option in options]
            flat += options
        else:
            kind = Parameter.KEYWORD_ONLY
            flat.append(parameter.replace(kind=kind, annotation=_as_typer_has_it(hints[name])))

    def call(**given: Any) -> None:
        for name, (build, options) in groups.items():
            given[name] = build(**{option: given.pop(option) for option in options})
        verb(**given)

    call.__doc__, call.__name__ = verb.__doc__, verb.__name__
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    call.__signature__ = Signature(flat)  # type: ignore[attr-defined]
    return call


def _options_of(group: Any, usual: Any) -> Iterator[Parameter]:
    """Yield the options that a dataclass's fields are.

    Args:
        group: The dataclass.
        usual: One of it, whose values are the defaults; None for the class's own defaults.
    """
    hints = get_type_hints(group, include_extras=True)
    for one in fields(group):
        hint = hints[one.name]
        if get_origin(hint) is not Annotated:
            continue
        default = Parameter.empty if one.default is MISSING else one.default
        if one.default_factory is not MISSING:
            default = one.default_factory()
        if usual is not None:
            default = getattr(usual, one.name)
        yield Parameter(
            one.name, Parameter.KEYWORD_ONLY, default=default, annotation=_as_typer_has_it(hint)
        )


def _as_typer_has_it(hint: Any) -> Any:
    """Return an annotation with typer's option in the place of our own."""
    kind, *rest = get_args(hint)
    own = next((one for one in rest if isinstance(one, Option)), None)
    if own is None:
        return hint
    names = () if own.flag is None else (own.flag,)
    option = typer.Option(*names, metavar=own.metavar, min=own.min, max=own.max, help=own.help)
    return Annotated[kind, option]


# Typer has its own copy of click or uses the installed one, depending on its version.
ClickFormatter: Any = typer.Context.formatter_class


def each_of(*choices: str) -> Callable[[list[str] | None], list[str] | None]:
    """Return a callback for an option that may be given several times: typer has no choices there.

    Args:
        choices: What it may be.
    """

    def check(given: list[str] | None) -> list[str] | None:
        for one in given or ():
            if one not in choices:
                raise typer.BadParameter(f"{one!r} is none of {', '.join(choices)}.")
        return given

    return check


class HelpFormatter(ClickFormatter):
    """Help in plain text, as narrow as the terminal is."""

    def __init__(self, width: int | None = None, max_width: int | None = None) -> None:
        cells = shutil.get_terminal_size().columns
        super().__init__(width=width or min(max(cells, 20), max_width or HELP_CELLS))

    def write_dl(self, rows: Sequence[tuple[str, str]], *_: Any, **__: Any) -> None:
        """Write names and what they mean: beside one another, or below where that is narrow."""
        rows = [(_plain_name(name), _plain_help(told)) for name, told in rows]
        longest = max((len(name) for name, _ in rows), default=0)
        # Options have long names; verbs and subcommands short ones.
        beside = self.width >= TABLE_CELLS or longest + 2 <= self.width // 3
        column = min(longest, 30) + 2 if beside else 4
        indent = " " * (self.current_indent + column)
        for name, told in rows:
            first = textwrap.fill(
                name,
                self.width,
                initial_indent=" " * self.current_indent,
                subsequent_indent=" " * (self.current_indent + 4),
                break_long_words=False,
                break_on_hyphens=False,
            )
            lines = textwrap.wrap(
                told,
                self.width,
                initial_indent=indent,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
            if lines and beside and len(name) + 2 <= column:
                lines[0] = f"{first:<{len(indent)}}{lines[0].lstrip()}"
            else:
                lines.insert(0, first)
            self.write("".join(f"{line}\n" for line in lines))


def _plain_name(name: str) -> str:
    """Return an option's or argument's name without its type; with its choices."""
    return re.sub(r" <([^>]*)>", lambda kind: f" {kind[1]}" * ("|" in kind[1]), name)


def _plain_help(told: str) -> str:
    """Return help on one line, with ranges and defaults in words."""
    told = re.sub(r"\[default: \((.*)\)(?=;|\])", r"[default: \1", " ".join(told.split()))
    return re.sub(r"([-.\de]+)<=x<=([-.\de]+)", _range, told)


def _range(found: re.Match[str]) -> str:
    low, high = found[1], found[2]
    return f"{low} or more" if float(high) > LARGEST_TOLD else f"{low} to {high}"


class HelpContext(typer.Context):
    """A context whose help is written by our formatter."""

    formatter_class = HelpFormatter


def _check_values(command: Any, context: Any, raw: dict[str, Any]) -> None:
    """Refuse what no option means, and read text in UTF-8 where the locale did not.

    Args:
        command: The verb.
        context: Its context, with the values as they were understood.
        raw: The values as they were typed, by the parameters' names.

    Raises:
        typer.BadParameter: A number isn't finite, a path is empty, or a text isn't one.
    """
    for parameter in command.params:
        name = parameter.name
        if name not in raw or name not in context.params:
            continue
        typed = raw[name] if isinstance(raw[name], list | tuple) else [raw[name]]
        value = context.params[name]
        several = isinstance(value, list | tuple)
        if not several and len(typed) > 1:
            typed = typed[-1:]
        try:
            read = [_read(*pair) for pair in zip(typed, value if several else [value], strict=True)]
        except ValueError as error:
            raise typer.BadParameter(str(error), ctx=context, param=parameter) from None
        context.params[name] = type(value)(read) if several else read[0]


def _read(typed: Any, value: Any) -> Any:
    """Return a value; a text that the locale couldn't read, read as UTF-8."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{typed} is no finite number.")
    if isinstance(value, Path) and not typed:
        raise ValueError("It is empty, where a path is needed.")
    if isinstance(typed, str) and "\0" in typed:
        raise ValueError("It has a character that neither a path nor a text can have: NUL.")
    if isinstance(value, str):
        try:
            return value.encode("utf-8", "surrogateescape").decode("utf-8")
        except UnicodeError:
            shown = value.encode("utf-8", "backslashreplace").decode()
            raise ValueError(f"{shown} is no text in UTF-8.") from None
    return value


class _CheckedValues:
    """A command whose values are checked once they are understood."""

    context_class: Any = HelpContext

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read a command line, and refuse values that no option means."""
        command: Any = self
        raw, _, _ = command.make_parser(ctx).parse_args(args=list(args))
        rest: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
        if not ctx.resilient_parsing:
            _check_values(command, ctx, raw)
        return rest


class Command(_CheckedValues, TyperCommand):
    """A verb."""


class Group(_CheckedValues, TyperGroup):
    """A verb with verbs below it."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 (typer gives it)
        """Write the verbs and the whole first sentence of each one's help."""
        shown = {name: command for name, command in self.commands.items() if not command.hidden}
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, one.get_short_help_str(limit=1000)) for name, one in shown.items()]
            )


def add_verb(app: typer.Typer, verb: Callable[..., None]) -> None:
    """Add a verb to those of an application."""
    app.command(cls=Command)(grouped(verb))


def verbs(help_text: str, **options: Any) -> typer.Typer:
    """Return an application without verbs, which says what it has when it is called alone.

    Args:
        help_text: What its verbs are for.
        options: As `typer.Typer` takes them.
    """
    options = {"no_args_is_help": True, "add_completion": False, **options}
    return typer.Typer(cls=Group, help=help_text, rich_markup_mode=None,
                       pretty_exceptions_enable=False, **options)  # fmt: skip
