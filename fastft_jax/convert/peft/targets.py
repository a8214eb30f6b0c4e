"""Which modules an adapter touches: PEFT's matching rules, on module paths alone.

Rules read from PEFT 0.21 (`check_target_module_exists`, `_maybe_include_all_linear_layers`, `_set_trainable`) and
tested against it.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from fastft_jax.errors import ConfigError

ALL_LINEAR = "all-linear"
_OUTPUT_HEADS = ("lm_head", "output")  # InternLM2 calls it output


def match_targets(
    target_modules: str | Iterable[str],
    module_paths: Sequence[str],
    layers_to_transform: int | Collection[int] | None = None,
    layers_pattern: str | Collection[str] | None = None,
    exclude_modules: str | Collection[str] | None = None,
    modules_to_save: Collection[str] | None = None,
) -> list[str]:
    """The adapted modules among `module_paths` (every linear module of the model, `lm_head` too), in that order.

    - a list: a path matches when it is, or ends with "." and, one of the entries. `layers_to_transform` then keeps
      only those layers; the layer is the first number behind `layers_pattern` (any name, when none is given). A path
      that stands in the list in full is not filtered;
    - "all-linear" (any case): every path but the output head;
    - any other string: a regular expression for the whole path;
    - `exclude_modules` (same two forms) and everything under `modules_to_save` never match.

    As in PEFT, entries of a list that match nothing are ignored while another one matches; `require_targets` refuses
    them. Raises ConfigError when nothing matches, or when the options contradict each other.
    """
    if target_modules is None:
        raise ConfigError('target_modules is missing: give a list of module names or "all-linear"')
    if isinstance(target_modules, str):
        if layers_to_transform is not None or layers_pattern is not None:
            raise ConfigError(
                "layers_to_transform and layers_pattern need target_modules as a list; it is the string "
                f"{target_modules!r}: put the layers into the expression, or write a list"
            )
    else:
        target_modules = list(dict.fromkeys(target_modules))
        if not all(isinstance(target, str) and target for target in target_modules):
            raise ConfigError(f"target_modules must be a list of module names, got {target_modules!r}")
    if layers_pattern and layers_to_transform is None:
        raise ConfigError("layers_pattern without layers_to_transform has no effect: give both or neither")

    kept = [
        path
        for path in module_paths
        if not _selected(exclude_modules, path, "exclude_modules") and not _inside(modules_to_save, path)
    ]
    if isinstance(target_modules, str):
        if target_modules.lower() == ALL_LINEAR:
            found = [path for path in kept if path.rpartition(".")[2] not in _OUTPUT_HEADS]
        else:
            found = [path for path in kept if _fullmatch(target_modules, path, "target_modules")]
    else:
        exact, suffixes = set(target_modules), tuple("." + target for target in target_modules)
        layers = _wanted_layers(layers_to_transform)
        found = [
            path
            for path in kept
            if path in exact
            or (path.endswith(suffixes) and (layers is None or _layer_of(path, layers_pattern) in layers))
        ]
    if not found:
        raise ConfigError(_nothing_matched(target_modules, module_paths, kept, layers_to_transform))
    return found


def require_targets(target_modules: str | Iterable[str], module_paths: Sequence[str]) -> None:
    """ConfigError for entries of a list that name no module at all: misspelt, or meant for another family."""
    entries = [] if isinstance(target_modules, str) else target_modules
    unmatched = [t for t in entries if not any(path == t or path.endswith("." + t) for path in module_paths)]
    if unmatched:
        raise ConfigError(f"target_modules: no module is called {', '.join(unmatched)}{_hint(unmatched, module_paths)}")


def condense_targets(matched: Collection[str], module_paths: Sequence[str]) -> list[str]:
    """`matched` as adapter_config.json should list it: leaf names where these select the same modules, else full paths.

    What "all-linear" stands for, in the form every reader of adapters understands.
    """
    leaves = sorted({path.rpartition(".")[2] for path in matched})
    same = {path for path in module_paths if path.rpartition(".")[2] in leaves}
    return leaves if same == set(matched) else sorted(matched)


def match_saved_modules(modules_to_save: Iterable[str], module_paths: Sequence[str]) -> list[str]:
    """The modules trained in full: paths that end with an entry. ConfigError for an entry that names none."""
    found = []
    for entry in modules_to_save:
        hits = [path for path in module_paths if path.endswith(entry)]
        if not hits:
            raise ConfigError(f"modules_to_save: no module is called {entry!r}{_hint([entry], module_paths)}")
        found += hits
    return [path for path in module_paths if path in set(found)]


def value_of(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """A module's rank or alpha: that of the first key that, as an expression, is the end of its path from a dot on."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)


def check_pattern(pattern: Mapping[str, Any], option: str, module_paths: Sequence[str] | None = None) -> None:
    """ConfigError for a rank_pattern or alpha_pattern with a key that is no expression, or that matches none of
    `module_paths` (if given), or with a value that is no rank (a whole number from 1) or no alpha (a positive one)."""
    if not isinstance(pattern, Mapping):
        raise ConfigError(f"{option} must map module names to numbers, got {pattern!r}")
    for key, value in pattern.items():
        kind = int if option == "rank_pattern" else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
            what = "a whole number of at least 1" if kind is int else "a positive number"
            raise ConfigError(f"{option}[{key!r}] must be {what}, got {value!r}")
        try:
            expression = re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            raise ConfigError(f"{option}: {key!r} is not a regular expression ({error})") from error
        if module_paths is not None and not any(map(expression.match, module_paths)):
            raise ConfigError(f"{option}: {key!r} matches none of the adapted modules{_hint([key], module_paths)}")


def _fullmatch(expression: str, path: str, option: str) -> bool:
    try:
        return re.fullmatch(expression, path) is not None
    except re.error as error:
        raise ConfigError(f"{option}: {expression!r} is not a regular expression ({error})") from error


def _selected(entries: str | Collection[str] | None, path: str, option: str) -> bool:
    if not entries:
        return False
    if isinstance(entries, str):
        return _fullmatch(entries, path, option)
    return any(path == entry or path.endswith("." + entry) for entry in entries)


def _inside(modules: Collection[str] | None, path: str) -> bool:
    """Whether the path is one of the modules, or lies under one (entries are expressions, as in PEFT)."""
    return any(re.match(rf"(^|.*\.){module}($|\..*)", path) for module in modules or ())


def _wanted_layers(layers: int | Collection[int] | None) -> set[int] | None:
    if layers is None:
        return None
    if isinstance(layers, int):
        return {layers}
    return set(layers) or None  # an empty list filters nothing


def _layer_of(path: str, layers_pattern: str | Collection[str] | None) -> int | None:
    """The layer a path belongs to: the first number after the name of a list of layers, None outside of any."""
    if not layers_pattern:
        # the list's name must itself follow a dot ("model.layers.3."), so the number is at least the third segment
        segments = path.split(".")
        return next((int(s) for s in segments[2:-1] if s.isdecimal()), None)
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    for pattern in patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path):
            return int(match[1])
    return None


def trained_tokens(indices: Collection[int] | Mapping[str, Collection[int]], vocab_size: int) -> list[int]:
    """The ids in trainable_token_indices, a list or {"embed_tokens": list}. ConfigError for ids that are there twice or
    not in the vocabulary."""
    ids = list(indices["embed_tokens"] if isinstance(indices, Mapping) else indices)
    if not ids or len(set(ids)) < len(ids) or not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
        raise ConfigError(
            f"trainable_token_indices={indices!r} must list different tokens, by their ids from 0 to {vocab_size - 1}"
        )
    return ids


def _nothing_matched(
    targets: str | list[str], module_paths: Sequence[str], kept: Sequence[str], layers: int | Collection[int] | None
) -> str:
    if isinstance(targets, str):
        leaf = any(path.rpartition(".")[2] == targets for path in module_paths)
        why = f"; a string is an expression for the whole path, write [{targets!r}] for a name" if leaf else ""
        return f"target_modules {targets!r} matches no module{why or _hint([targets], module_paths)}"
    if not [path for path in module_paths if _selected(targets, path, "")]:
        return f"target_modules {targets} match no module{_hint(targets, module_paths)}"
    if not [path for path in kept if _selected(targets, path, "")]:
        return f"target_modules {targets}: every match is in exclude_modules or modules_to_save"
    return f"target_modules {targets}: no match is in layers_to_transform={layers}"


def _hint(wanted: Iterable[str], module_paths: Sequence[str]) -> str:
    leaves = sorted({path.rpartition(".")[2] for path in module_paths})
    near = [m for want in wanted for m in difflib.get_close_matches(want.rpartition(".")[2], leaves, n=1)]
    suggestion = f" (did you mean {', '.join(dict.fromkeys(near))}?)" if near else ""
    return f"{suggestion}; the modules are {', '.join(leaves)}"
