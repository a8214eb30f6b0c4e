"""The small files of a model folder: config.json, generation_config.json, the tokenizer with its chat template.

They are copied byte for byte from where the model was loaded; what an export must change in them, and only that, is
written anew.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastft_jax.convert.atomic import write_bytes
from fastft_jax.convert.tokenizer import load_tokenizer
from fastft_jax.errors import CheckpointError, ConfigError

TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
BESIDE = ("generation_config.json", "preprocessor_config.json", "processor_config.json")


def write_config(folder: Path, source: Path, values: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """config.json: the source's own bytes where `values` are what it says and nothing changes, else `values | changes`.

    A change to None takes the key out. A text decoder inside (`text_config`) gets those whose key it has, too.
    """
    wanted = changed(values, changes)
    path = source / "config.json"
    if path.is_file():
        raw = path.read_bytes()
        if json.loads(raw) == wanted:
            write_bytes(folder / "config.json", raw)
            return
    write_bytes(folder / "config.json", (json.dumps(wanted, indent=2) + "\n").encode())


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's values after `changes`."""
    wanted = {key: value for key, value in (dict(values) | dict(changes)).items() if changes.get(key, 0) is not None}
    if isinstance(inner := wanted.get("text_config"), dict):
        here = {key: value for key, value in changes.items() if key in inner}
        wanted["text_config"] = changed(inner, here)
    return wanted


def refuse_to_replace(final: Path, *sources: Path | None) -> None:
    """ConfigError where writing the folder `final` would take away one that is read: itself, or a folder around it."""
    for source in sources:
        if source is not None and Path(source).resolve().is_relative_to(final.resolve()):
            raise ConfigError(f"{final} holds what is exported ({source}): choose another folder")


def copy_beside(folder: Path, source: Path) -> None:
    """generation_config.json, a processor's settings and a model's own code, where the source has them."""
    if not source.is_dir():
        warnings.warn(f"{source} is gone: generation_config.json is not copied from it", stacklevel=2)
    for name in (*BESIDE, *own_code(source)):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def own_code(source: Path) -> list[str]:
    """The files that config.json's auto_map names ("modeling_x.XForCausalLM"), for transformers; never run here."""
    path = source / "config.json"
    named = json.loads(path.read_bytes()).get("auto_map") if path.is_file() else None
    classes = [c for c in named.values() if isinstance(c, str)] if isinstance(named, dict) else []
    modules = {c.rpartition(".")[0] for c in classes if "--" not in c}  # REPOSITORY--module.Class lies elsewhere
    return sorted(f"{module}.py" for module in modules if module.isidentifier())


def write_tokenizer(folder: Path, source: Path, tokenizer: Any | None) -> None:
    """The tokenizer's files as they lie in `source`; as `tokenizer` writes them where it has changed since (tokens,
    chat template)."""
    if source.is_dir():
        for name in TOKENIZER:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if tokenizer is None or _same(load_tokenizer(folder, warn=False), tokenizer):
        return
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # its Rust part raises a bare Exception for a full disk
        raise CheckpointError(f"the tokenizer cannot be saved in {folder}: {error}") from error


def _same(stored: Any | None, tokenizer: Any) -> bool:
    if stored is None:
        return False
    text = [t.backend_tokenizer.to_str() for t in (stored, tokenizer) if hasattr(t, "backend_tokenizer")]
    return (
        len(text) == 2
        and text[0] == text[1]
        and stored.chat_template == tokenizer.chat_template
        and stored.special_tokens_map == tokenizer.special_tokens_map
    )
