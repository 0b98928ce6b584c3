# SPDX-License-Identifier: Apache-2.0
"""What an output may look like, in XGrammar's structural tag format: plain data that the engine compiles.

JSON schemas are brought into the form of which XGrammar enforces every keyword; keywords that it would skip are refused by name.
What remains is stricter than the schema in two ways: members come in the order of `properties`, and an object with `properties`
has no others unless `additionalProperties` says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Format = dict[str, Any]

MAX_CHARS = 128 << 10  # of a grammar's text
MAX_DEPTH = 64
MAX_WHITESPACE = 20  # characters between two tokens of JSON: indented text has its place, an endless blank has not
NUMBERS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"))
STRINGS = frozenset(("minLength", "maxLength", "pattern"))
ARRAYS = frozenset(("items", "prefixItems", "minItems", "maxItems", "additionalItems", "unevaluatedItems"))
OBJECTS = frozenset(
    (
        *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
        *("minProperties", "maxProperties", "unevaluatedProperties"),
    )
)
KEYWORDS: dict[str, frozenset[str]] = {
    "number": NUMBERS,
    "integer": NUMBERS,
    "string": STRINGS | {"format"},
    "array": ARRAYS,
    "object": OBJECTS,
    "boolean": frozenset(),
    "null": frozenset(),
}
ASSERTIONS = frozenset(("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref")).union(NUMBERS, STRINGS, ARRAYS, OBJECTS)
NEVER = (
    *("uniqueItems", "contains", "minContains", "maxContains", "not", "if", "then", "else", "dependentRequired"),
    *("dependentSchemas", "dependencies", "$anchor", "$dynamicAnchor", "$dynamicRef", "$recursiveRef"),
)
FORMATS = frozenset(
    (
        *("date-time", "date", "time", "duration", "uuid", "email", "ipv4", "ipv6", "hostname", "uri", "uri-reference"),
        *("uri-template", "json-pointer", "relative-json-pointer"),
    )
)
PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "number": (int, float),
    "integer": (int,),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
    "boolean": (bool,),
    "null": (type(None),),
}


class GrammarTextError(ValueError):
    """A schema or grammar that cannot be enforced; the message says which part."""


def json_object() -> Format:
    """Any JSON object."""
    return json_schema({"type": "object"})


def json_schema(schema: Any) -> Format:
    """JSON text that satisfies a schema. Raises GrammarTextError."""
    return {"type": "json_schema", "json_schema": checked_schema(schema), "max_whitespace_cnt": MAX_WHITESPACE}


def regex(pattern: str) -> Format:
    """Text that a regular expression matches as a whole."""
    if _has_lookaround(pattern):
        raise GrammarTextError("look-around is not supported in regular expressions")
    return {"type": "regex", "pattern": pattern}


def ebnf(grammar: str) -> Format:
    """Text that the rule `root` of a grammar in EBNF (as in llama.cpp) derives."""
    return {"type": "grammar", "grammar": grammar}


def choice(texts: Sequence[str]) -> Format:
    """One of several texts."""
    return any_of([{"type": "const_string", "value": text} for text in texts])


def any_of(formats: Sequence[Format]) -> Format:
    return formats[0] if len(formats) == 1 else {"type": "or", "elements": list(formats)}


def sequence(formats: Sequence[Format]) -> Format:
    return formats[0] if len(formats) == 1 else {"type": "sequence", "elements": list(formats)}


def literal(text: str, special: Mapping[str, int]) -> list[Format]:
    """A fixed text; where it holds one of the special tokens (text -> id), that token and no other spelling."""
    if not text:
        return []
    if not special:
        return [{"type": "const_string", "value": text}]
    parts = re.split("(" + "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) + ")", text)
    return [
        {"type": "token", "token": special[part]} if part in special else {"type": "const_string", "value": part}
        for part in parts
        if part
    ]


def after_thinking(answer: Format, opening: str, closing: str, special: Mapping[str, int], *, begun: bool) -> Format:
    """An answer behind a thought: one that the prompt has begun, or one that the output may begin with."""
    if closing in special:
        end = special[closing]
        free: Format = {"type": "any_tokens", "exclude_tokens": [end]}
        thought = sequence([*([] if begun else literal(opening, special)), free, {"type": "token", "token": end}])
    else:
        thought = {"type": "tag", "begin": "" if begun else opening, "content": {"type": "any_text"}, "end": closing}
    blank: Format = {"type": "regex", "pattern": "[ \\n]{0,4}"}
    return sequence([thought if begun else {"type": "optional", "content": thought}, blank, answer])


def as_text(answer: Format) -> str:
    """A format as the engine takes it. Raises GrammarTextError when it is too long."""
    try:
        text = json.dumps(answer, ensure_ascii=False)
        text.encode()
    except (RecursionError, UnicodeEncodeError) as error:
        raise GrammarTextError("not valid text, or nested too deeply") from error
    if len(text) > MAX_CHARS:
        raise GrammarTextError(f"too long: {len(text)} characters, at most {MAX_CHARS} are compiled")
    return text


def checked_schema(schema: Any) -> Any:
    """A schema with the same meaning of which every keyword is enforced. Raises GrammarTextError listing those that cannot be."""
    faults: list[str] = []
    made = _Schema(faults).convert(schema, "", 0)
    if faults:
        raise GrammarTextError(f"these parts of the schema are not supported: {', '.join(sorted(set(faults)))}")
    return made


class _Schema:
    """Converts one schema; what cannot be enforced is noted in `faults` by its place."""

    def __init__(self, faults: list[str]) -> None:
        self._faults = faults

    def convert(self, schema: Any, where: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise GrammarTextError(f"the schema is nested more than {MAX_DEPTH} levels deep")
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            if schema is not False:
                raise GrammarTextError(f"schema{where}: expected an object or a boolean, got {type(schema).__name__}")
            return False
        self._faults += [f"{where}/{name}" for name in NEVER if schema.get(name) not in (None, False)]
        made = self._body(schema, where, depth)
        for name in ("$defs", "definitions"):
            if isinstance(schema.get(name), dict):
                made[name] = self._each(schema[name], f"{where}/{name}", depth)
        return made

    def _body(self, schema: dict[str, Any], where: str, depth: int) -> dict[str, Any]:
        if "$ref" in schema:
            self._alone(schema, "$ref", where)
            if not str(schema["$ref"]).startswith("#"):
                self._faults.append(f"{where}/$ref to another document")
            return {"$ref": schema["$ref"]}
        for name in ("anyOf", "oneOf", "allOf"):
            if name in schema:
                return self._combined(schema, name, where, depth)
        if "const" in schema or "enum" in schema:
            return self._values(schema, where)
        kinds = schema.get("type", self._implied(schema, where))
        if kinds is None:
            return {}
        if isinstance(kinds, str):
            return self._typed(schema, kinds, where, depth)
        if not isinstance(kinds, list) or not kinds:
            raise GrammarTextError(f"schema{where}/type: expected the name of a type or a list of them")
        return {"anyOf": [self._typed(schema, kind, where, depth) for kind in kinds]}

    def _alone(self, schema: dict[str, Any], name: str, where: str) -> None:
        """Assertions beside a reference or a combination would be skipped."""
        others = sorted(ASSERTIONS.intersection(schema) - {name})
        self._faults += [f"{where}/{other} beside {name}" for other in others]

    def _each(self, schemas: Any, where: str, depth: int) -> dict[str, Any]:
        if not isinstance(schemas, dict):
            raise GrammarTextError(f"schema{where}: expected an object")
        return {name: self.convert(one, f"{where}/{name}", depth + 1) for name, one in schemas.items()}

    def _combined(self, schema: dict[str, Any], name: str, where: str, depth: int) -> dict[str, Any]:
        self._alone(schema, name, where)
        parts = schema[name]
        if not isinstance(parts, list) or not parts:
            raise GrammarTextError(f"schema{where}/{name}: expected a non-empty list")
        if name == "allOf" and len(parts) > 1:
            self._faults.append(f"{where}/allOf of several schemas")
        made = [self.convert(part, f"{where}/{name}/{index}", depth + 1) for index, part in enumerate(parts)]
        return made[0] if len(made) == 1 and isinstance(made[0], dict) else {"anyOf": made}

    def _values(self, schema: dict[str, Any], where: str) -> dict[str, Any]:
        """enum or const, without the values that `type` excludes."""
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list):
            raise GrammarTextError(f"schema{where}/enum: expected a list")
        others = sorted(ASSERTIONS.intersection(schema) - {"const", "enum", "type"})
        self._faults += [f"{where}/{other} beside enum or const" for other in others]
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        kept = [value for value in values if not kinds or any(_is_of(value, kind) for kind in kinds)]
        if not kept:
            raise GrammarTextError(f"schema{where}: no value is allowed")
        if any(map(_holds_huge, kept)):
            self._faults.append(f"{where}: integers of more than 64 bits")
        return {"enum": kept}

    def _implied(self, schema: dict[str, Any], where: str) -> str | None:
        """The type that the other keywords speak of, if there is only one."""
        families = {"number": NUMBERS, "string": STRINGS, "array": ARRAYS, "object": OBJECTS}
        found = [kind for kind, names in families.items() if names.intersection(schema)]
        if len(found) > 1:
            self._faults.append(f"{where or '/'} with keywords of several types and no type")
        return found[0] if found else None

    def _typed(self, schema: dict[str, Any], kind: str, where: str, depth: int) -> dict[str, Any]:
        if kind not in KEYWORDS:
            raise GrammarTextError(f"schema{where}/type: unknown type {kind!r}")
        own = {name: schema[name] for name in KEYWORDS[kind] if name in schema}
        made: dict[str, Any]
        if kind == "object":
            made = self._object(own, where, depth)
        elif kind == "array":
            made = self._array(own, where, depth)
        elif kind == "string":
            made = self._string(own, where)
        else:
            made = own
            if "multipleOf" in own and (kind == "number" or len(own) > 1):
                self._faults.append(f"{where}/multipleOf with bounds or of numbers that are no integers")
        return {"type": kind, **made}

    def _string(self, own: dict[str, Any], where: str) -> dict[str, Any]:
        if own.get("format") not in FORMATS:
            own.pop("format", None)  # an annotation
        if "pattern" in own:
            own["pattern"] = self._pattern(own["pattern"], f"{where}/pattern")
        if len(own) > 1 and ("pattern" in own or "format" in own):
            self._faults += [f"{where}/{name} beside pattern or format" for name in sorted(own)[:-1]]
        return own

    def _pattern(self, pattern: Any, where: str) -> str:
        if not isinstance(pattern, str):
            raise GrammarTextError(f"schema{where}: expected a string")
        if _has_lookaround(pattern):
            self._faults.append(f"{where} with look-around")
        return _as_whole(pattern)

    def _array(self, own: dict[str, Any], where: str, depth: int) -> dict[str, Any]:
        if isinstance(own.get("items"), list):  # as before draft 2020
            own["prefixItems"] = own.pop("items")
            if "additionalItems" in own:
                own["items"] = own["additionalItems"]
        own.pop("additionalItems", None)
        if "prefixItems" in own:
            if not isinstance(own["prefixItems"], list):
                raise GrammarTextError(f"schema{where}/prefixItems: expected a list")
            own["prefixItems"] = [
                self.convert(item, f"{where}/prefixItems/{index}", depth + 1) for index, item in enumerate(own["prefixItems"])
            ]
        for name in ("items", "unevaluatedItems"):
            if name in own:
                own[name] = self.convert(own[name], f"{where}/{name}", depth + 1)
        shortest = own.get("minItems", 0)
        if not {"items", "unevaluatedItems"}.intersection(own) and (
            "prefixItems" not in own or (isinstance(shortest, int) and shortest > len(own["prefixItems"]))
        ):
            own["items"] = {}
        return own

    def _object(self, own: dict[str, Any], where: str, depth: int) -> dict[str, Any]:
        properties = self._each(own.get("properties", {}), f"{where}/properties", depth)
        patterns = self._each(own.get("patternProperties", {}), f"{where}/patternProperties", depth)
        for name in ("additionalProperties", "unevaluatedProperties"):
            if name in own:
                own[name] = self.convert(own[name], f"{where}/{name}", depth + 1)
        others = own.get("additionalProperties", {})
        required = own.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise GrammarTextError(f"schema{where}/required: expected a list of names")
        for name in required:
            if name not in properties:
                if others is False or patterns:
                    self._faults.append(f"{where}/required: {name!r}, which is not in properties")
                properties[name] = others
        if "propertyNames" in own:
            own["propertyNames"] = self.convert(own["propertyNames"], f"{where}/propertyNames", depth + 1)
            if properties or patterns:
                self._faults.append(f"{where}/propertyNames beside properties or patternProperties")
        if patterns:
            place = f"{where}/patternProperties"
            own["patternProperties"] = {self._pattern(name, place): one for name, one in patterns.items()}
        if properties:
            own["properties"] = properties
        elif not {"additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"}.intersection(own):
            own["additionalProperties"] = {}
        return own


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, PYTHON_TYPES.get(kind, ()))


def _holds_huge(value: Any) -> bool:
    """Whether a JSON value has an integer that XGrammar would round."""
    if isinstance(value, dict | list):
        return any(map(_holds_huge, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def _has_lookaround(pattern: str) -> bool:
    return re.search(r"(?<!\\)\(\?(=|!|<=|<!)", pattern) is not None


def _as_whole(pattern: str) -> str:
    """A pattern that is searched for as one that matches the whole string. One with a bare alternative must match as it is."""
    bare = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "x", pattern)
    while "(" in bare:
        inner = re.sub(r"\([^()]*\)", "x", bare)
        if inner == bare:
            break
        bare = inner
    if "|" in bare:
        return pattern
    start = "" if pattern.startswith("^") else ".*"
    return start + pattern + ("" if bare.endswith("$") else ".*")
