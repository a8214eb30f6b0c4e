"""YAML as YAML 1.2 reads it, with the line of every option.

PyYAML follows YAML 1.1, where `2e-4` is text and `no` is false; here `2e-4` is a number and only true and false are
booleans. A key given twice is an error, where PyYAML would keep the last.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastft_jax.errors import ConfigError


@dataclass(frozen=True)
class Given:
    """One option as a user gave it, and where: 'file:line' or 'command line'."""

    section: str
    key: str
    value: Any
    where: str

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    problem = f"{key_node.value} is given twice (first on line {seen[key_node.value]})"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen[key_node.value] = line
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = node.value.replace("_", "")
        return int(text, 0) if re.match(r"[-+]?0[xob]", text) else int(text, 10)


_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor(_TAG + "int", _Loader.construct_int)


def parse_value(text: str) -> Any:
    """A value as it would be read in a file; ValueError says what is wrong with it."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(_reason(error)) from None


def read_file(path: str | Path) -> tuple[list[Given], list[str]]:
    """Every option of a file of sections, and what is wrong with its shape (each a line).

    Raises:
        ConfigError: the file cannot be read, or is not YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return _sections(loader, root, path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: {_reason(error)}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _sections(loader: _Loader, root: yaml.Node | None, path: str | Path) -> tuple[list[Given], list[str]]:
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:{root.start_mark.line + 1}: a config is a mapping of sections, such as 'model:'")
    loader.construct_mapping(root)  # refuses a section given twice
    given, problems = [], []
    for section_node, body in root.value:
        section, line = str(section_node.value), section_node.start_mark.line + 1
        if isinstance(body, yaml.MappingNode):
            values = loader.construct_mapping(body, deep=True)  # flattens `<<` into body.value
            for key_node, _ in body.value:
                key = loader.construct_object(key_node, deep=True)
                given.append(Given(section, str(key), values[key], f"{path}:{key_node.start_mark.line + 1}"))
        elif not (isinstance(body, yaml.ScalarNode) and body.tag == _TAG + "null"):
            problems.append(f"{path}:{line}: section {section} must hold options, each on its own line")
    return given, problems


def _reason(error: yaml.YAMLError) -> str:
    text = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return str(text).splitlines()[0]
