"""What every section of options shares: strict types, unknown names refused with the nearest one, errors of one line.

pydantic checks the values; this module turns what it says into lines a user can act on and raises them all at once, as
one `ConfigError` (an `UnsupportedOption` where one of them asks for something that is not built).
"""

import difflib
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fastft_jax.errors import ConfigError


class UnsupportedOption(ConfigError, NotImplementedError):
    """A known option of Unsloth, PEFT, TRL or transformers whose promise fastft-jax does not keep (yet)."""


@dataclass(frozen=True)
class Elsewhere:
    """A name that others use for something offered here under another name; `where` finishes 'use ...'."""

    where: str


@dataclass(frozen=True)
class NotBuilt:
    """A name that others use for something fastft-jax does not do; `why` is a clause that says what happens instead."""

    why: str


@dataclass(frozen=True)
class Problem:
    """One thing wrong: the option's name ('' for the section as a whole), what to say, and whether it is unbuilt."""

    key: str
    message: str
    unsupported: bool = False


def whole(value: Any) -> Any:
    """A whole number in whatever dress (1e3, numpy.int64) as an int; anything else as it is, for pydantic to refuse."""
    if isinstance(value, bool) or isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    return value.__index__() if hasattr(value, "__index__") else value


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def listed(value: Any) -> Any:
    """Tuples and sets are as good as lists (a set's order means nothing, so it is sorted)."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


Int = Annotated[int, BeforeValidator(whole)]
AtLeastOne = Annotated[int, BeforeValidator(whole), Field(ge=1)]
NotNegative = Annotated[int, BeforeValidator(whole), Field(ge=0)]
PathText = Annotated[str, BeforeValidator(_path), Field(min_length=1)]
Texts = Annotated[list[str], BeforeValidator(listed)]


class Options(BaseModel):
    """Base of every section. `known_elsewhere` explains names of other tools that a user may try here."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        validate_assignment=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )

    known_elsewhere: ClassVar[dict[str, Elsewhere | NotBuilt]] = {}
    secrets: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            _raise(type(self), error)

    def __setattr__(self, name: str, value: Any) -> None:
        before, given = dict(self.__dict__), set(self.__pydantic_fields_set__)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            # pydantic leaves the refused value in place when it is a check across options that refuses it
            self.__dict__.update(before)
            object.__setattr__(self, "__pydantic_fields_set__", given)
            _raise(type(self), error)

    @classmethod
    def check(cls, values: dict[str, Any]) -> tuple[Self | None, list[Problem]]:
        """The section made of `values`, or None and everything that is wrong with them."""
        instance = cls.__new__(cls)
        try:
            cls.__pydantic_validator__.validate_python(values, self_instance=instance)
        except ValidationError as error:
            return None, problems(cls, error)
        return instance, []


def _raise(section: type[Options], error: ValidationError) -> None:
    found = problems(section, error)
    kind = UnsupportedOption if any(p.unsupported for p in found) else ConfigError
    raise kind("\n".join(f"{section.__name__}: {p.message}" for p in found)) from None


def problems(section: type[Options], error: ValidationError) -> list[Problem]:
    """One `Problem` for every option that is wrong (a union's several complaints about one value are one problem)."""
    grouped: dict[str, list[dict]] = {}
    for item in error.errors(include_url=False):
        grouped.setdefault(str(item["loc"][0]) if item["loc"] else "", []).append(item)
    return [_problem(section, key, items) for key, items in grouped.items()]


def _problem(section: type[Options], key: str, items: list[dict]) -> Problem:
    first = items[0]
    if first["type"] in ("extra_forbidden", "no_such_attribute"):
        return unknown(section, key)
    if first["type"] == "missing":
        return Problem(key, f"{key} is required")
    if first["type"] in ("value_error", "assertion_error"):
        cause = first["ctx"]["error"]
        text = str(cause) if str(cause).startswith(key) else f"{key}: {cause}"
        return Problem(key, text, isinstance(cause, NotImplementedError))
    if key in section.secrets:
        has = "has a value of the wrong kind"
    else:
        inside = len(first["loc"]) > 1 and len(items) == 1
        has = f"{'holds' if inside else 'is'} {shown(first['input'])}"
    wanted = list(dict.fromkeys(_wanted(item) for item in items))
    return Problem(key, f"{key} {has}; it must be {' or '.join(wanted)}")


def unknown(section: type[Options], key: str, names: Any = None) -> Problem:
    """What to say about a name that `section` does not have; `names` are those it has (its fields, if None)."""
    known = section.known_elsewhere.get(key)
    if isinstance(known, Elsewhere):
        return Problem(key, f"{key} is not an option here: use {known.where}")
    if isinstance(known, NotBuilt):
        return Problem(key, f"{key} is not supported: {known.why}", unsupported=True)
    return Problem(key, f"there is no option {key}{did_you_mean(key, names or section.model_fields)}")


def did_you_mean(name: str, names: Any) -> str:
    """'; did you mean X?' for the nearest of `names`, else the start of their list."""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    near = near or [other for other in names if name in other.split("_")][:1]
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(names)}" if len(names) <= 16 else ""


def shown(value: Any) -> str:
    """A value as the user would write it, short."""
    text = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    text = text or ("null" if value is None else repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_too_short": "non-empty text",
    "too_short": "non-empty text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "none_required": "null",
}


def _wanted(item: dict) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        return "one of " + context["expected"].replace("'", "").replace(" or ", ", ")
    for name, words in (("gt", "greater than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most")):
        if name in context and kind.startswith(("greater", "less")):
            return f"{words} {context[name]:g}"
    return _KINDS.get(kind, item["msg"])


def fingerprint(values: dict[str, Any]) -> str:
    """SHA-256 of `values` as canonical JSON: equal for equal options, whatever order they were given in."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
