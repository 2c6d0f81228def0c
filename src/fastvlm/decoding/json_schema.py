"""JSON schemas as the grammar library is to read them, and those that have no finite instance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from fastvlm.functional.errors import InputError

MAX_DEPTH = 120
"""The deepest nesting of a schema; the library reads a few levels more."""
VALUES = ("const", "enum", "default", "examples")
"""Keywords whose values are no schemas."""
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose values are schemas by name."""
IGNORED = ("disallow", "divisibleBy", "extends")
"""Keywords of draft 3 that the library takes for annotations, as later drafts do."""

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_HOUR_AND_MINUTE = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_HOUR_AND_MINUTE}:[0-5][0-9](?:[.][0-9]+)?(?:[Zz]|[+-]{_HOUR_AND_MINUTE})"
FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[Tt]{_TIME}$"}
"""Formats of RFC 3339 without leap seconds, which the library allows at any time, as it allows the
29th of February in any year."""


def for_library(schema: Any) -> Any:
    """Return a schema that allows the same, as the library is to read it.

    Args:
        schema: A JSON schema, as `json.loads` returns it.

    Raises:
        InputError: No reply can have it, it is nested too deeply, or it has a keyword that the
            library would ignore.
    """
    if schema is False:
        raise InputError("The json can't be used: no reply can have the schema false.")
    return {} if schema is True else _rewritten(schema, 0)


def _rewritten(schema: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise InputError(
            f"The json can't be used: a schema has at most {MAX_DEPTH} levels, one in another."
        )
    if isinstance(schema, list):
        return [_rewritten(one, depth + 1) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in IGNORED:
            raise InputError(f"The json can't be used: the keyword {key!r} is not supported.")
        if key in MAPS and isinstance(value, dict):
            found[key] = {name: _rewritten(one, depth + 2) for name, one in value.items()}
        else:
            found[key] = value if key in VALUES else _rewritten(value, depth + 1)
    kind = found.get("format")
    if isinstance(kind, str) and kind in FORMATS:
        del found["format"]
        others = found.get("allOf", [])
        if "pattern" not in found:
            found["pattern"] = FORMATS[kind]
        elif isinstance(others, list):
            found["allOf"] = [*others, {"pattern": FORMATS[kind]}]
    return found


def has_finite_reply(schema: Any) -> bool:
    """Return whether a schema may have an instance that ends: False is certain, True isn't.

    A chain whose every link must have a next one has none.

    Args:
        schema: A JSON schema that the library has compiled.
    """
    known: dict[str, bool] = {}
    _ends(schema, known)
    found = [*known]
    targets: dict[str, Any] = {}
    local = not _has_inner_base(schema)
    for reference in found:
        targets[reference] = _target(schema, reference) if local else True
        _ends(targets[reference], known)
        found += [one for one in known if one not in targets and one not in found]
    changed = True
    while changed:
        before = dict(known)
        # Those found last first: others refer to them.
        for reference in reversed(found):
            known[reference] = known[reference] or _ends(targets[reference], known)
        changed = known != before
    return _ends(schema, known)


def _ends(schema: Any, known: dict[str, bool]) -> bool:
    """Return whether a schema has an instance that ends, by what is known of those referred to."""
    if not isinstance(schema, Mapping):
        return schema is not False
    reference = schema.get("$ref")
    if isinstance(reference, str) and not known.setdefault(reference, False):
        return False
    for key, combined in (("allOf", all), ("anyOf", any), ("oneOf", any)):
        if key in schema and not combined(_ends(part, known) for part in schema[key]):
            return False
    types = schema.get("type", "null")
    types = {types} if isinstance(types, str) else {*types}
    if types - {"object", "array"} or "const" in schema or "enum" in schema:
        return True
    return ("object" in types and _object_ends(schema, known)) or (
        "array" in types and _array_ends(schema, known)
    )


def _object_ends(schema: Mapping[str, Any], known: dict[str, bool]) -> bool:
    own = schema.get("properties", {})
    # What a pattern may say of a property is left open.
    other = True if "patternProperties" in schema else schema.get("additionalProperties", True)
    return all(_ends(own.get(name, other), known) for name in schema.get("required", ()))


def _array_ends(schema: Mapping[str, Any], known: dict[str, bool]) -> bool:
    first, rest = schema.get("prefixItems", []), schema.get("items", True)
    if isinstance(rest, list):
        first, rest = rest, schema.get("additionalItems", True)
    least = schema.get("minItems", 0)
    return all(_ends(part, known) for part in first[:least]) and (
        least <= len(first) or _ends(rest, known)
    )


def _target(root: Any, reference: str) -> Any:
    """Return the schema that a reference leads to, or one that ends where that isn't known."""
    place = root
    if not reference.startswith("#"):
        return True
    for part in filter(None, unquote(reference).removeprefix("#").split("/")):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(place, list) and name.isdecimal() and int(name) < len(place):
            place = place[int(name)]
        elif isinstance(place, Mapping) and name in place:
            place = place[name]
        else:
            return True
    return place


def _has_inner_base(root: Any) -> bool:
    """Return whether a part of a schema has an address of its own, which references start from."""
    parts = [*root.values()] if isinstance(root, Mapping) else []
    for part in parts:
        if isinstance(part, Mapping):
            if "$id" in part or "id" in part:
                return True
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return False
