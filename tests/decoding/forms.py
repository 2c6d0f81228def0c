"""Forms of replies that several tests ask for."""

from __future__ import annotations

from typing import Any

from fastvlm.decoding import StructuredOutput

LIST = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
BOX = {
    "type": "object",
    "properties": {
        "label": {"enum": ["circle", "square", "triangle"]},
        "box": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
        "sure": {"type": "boolean"},
    },
    "required": ["label", "box"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "string": {"type": "string", "maxLength": 12},
    "long string": {"type": "string"},
    "empty string": {"type": "string", "maxLength": 0},
    "integer": {"type": "integer", "minimum": -20, "maximum": 20},
    "number": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    "above": {"type": "integer", "exclusiveMinimum": 99, "maximum": 1000},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 70},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "types": {"type": ["boolean", "null", "integer"]},
    "enum": {"enum": ["red", "green", 3, None, False]},
    "const": {"const": {"a": [1, "two"]}},
    "unicode": {"enum": ["für", "日本語", "\N{GRINNING FACE}"]},
    "unicode key": {"type": "object", "properties": {"größe": {"type": "boolean"}},
                    "required": ["größe"], "additionalProperties": False},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,5}-[0-9]{3}$"},
    "unanchored pattern": {"type": "string", "pattern": "[0-9]x", "maxLength": 10},
    "unicode pattern": {"type": "string", "pattern": "^[äöü]{3}$"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "uuid": {"type": "string", "format": "uuid"},
    "lengths": {"type": "string", "minLength": 3, "maxLength": 5},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["a", "b"]}],
              "items": False, "minItems": 2},
    "no array": {"type": "array", "maxItems": 0},
    "object": BOX,
    "optional": {**BOX, "required": []},
    "nested": {"type": "object", "properties": {"in": {"type": "object", "properties": {
        "deep": BOX}, "required": ["deep"], "additionalProperties": False}}, "required": ["in"],
        "additionalProperties": False},
    "any of": {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 5, "maximum": 7}]},
    "one of": {"oneOf": [
        {"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "boolean"}},
         "required": ["kind", "x"], "additionalProperties": False},
        {"type": "object", "properties": {"kind": {"const": "b"}, "y": {"type": "null"}},
         "required": ["kind", "y"], "additionalProperties": False}]},
    "all of": {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 12}]},
    "reference": LIST,
    "values": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    "boxes": {"type": "array", "items": BOX, "maxItems": 2},
    "anything": {},
}  # fmt: skip
OTHERS = {
    "json object": StructuredOutput("json_object"),
    "regex": StructuredOutput("regex", "(yes|no), [0-9]{2,4} [äß]+!"),
    "choice": StructuredOutput("choice", ["circle", "circles", "a.b*", "für \n", "<|end|>"]),
    "grammar": StructuredOutput(
        "grammar", 'start: sum\nsum: term | sum "+" term\nterm: /[0-9]{1,2}/ | "(" sum ")"'
    ),
}
FORMS = {**{name: StructuredOutput("json", one) for name, one in SCHEMAS.items()}, **OTHERS}
