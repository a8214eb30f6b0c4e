"""A trained adapter into the forms that others read.

    python -m fastft_jax.export --adapter DIR --to peft,merged_16bit,merged_4bit --out DIR [--base original]

Every form gets a folder of its own under --out, which appears whole or not at all. Exit codes: 0 done, 1 an export
failed (those before it stay), 2 wrong options.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft_jax.command_line import guarded
from fastft_jax.convert.gguf import FORMS as GGUF_FORMS
from fastft_jax.errors import CheckpointError, ConfigError

ROWS, ROW_LENGTH = 8, 256  # at most so many rows to compare on, and tokens of each


@dataclass(frozen=True)
class Settings:
    """What every kind of export may ask for."""

    base: str | None = None
    dtype: str | None = None
    max_shard_size: int | str = "5GB"
    overwrite: bool = False
    verify: bool = True
    rows: Sequence[Sequence[int]] | None = None  # token ids to compare on
    token: str | None = None


@dataclass(frozen=True)
class Kind:
    """A form to export to: `write(model, tokenizer, folder, argument, settings)` returns what to say of it.

    `argument` is what follows a colon ("gguf:q4_k_m"); `arguments` are those allowed, none for a kind without.
    """

    write: Callable[[Any, Any, Path, str | None, Settings], Any]
    arguments: tuple[str, ...] = ()


def _peft(model: Any, tokenizer: Any, folder: Path, argument: str | None, settings: Settings) -> Any:
    return model.save_pretrained_merged(folder, tokenizer, "lora", overwrite=settings.overwrite, verify=settings.verify)


def _merged(method: str) -> Callable[..., Any]:
    def write(model: Any, tokenizer: Any, folder: Path, argument: str | None, settings: Settings) -> Any:
        return model.save_pretrained_merged(folder, tokenizer, method, **vars(settings))

    return write


def _gguf(model: Any, tokenizer: Any, folder: Path, argument: str | None, settings: Settings) -> Any:
    return model.save_pretrained_gguf(folder, tokenizer, argument, verify=settings.verify, rows=settings.rows)


# A further form is a line here.
KINDS: dict[str, Kind] = {
    "peft": Kind(_peft),
    "merged_16bit": Kind(_merged("merged_16bit")),
    "merged_4bit": Kind(_merged("merged_4bit")),
    "gguf": Kind(_gguf, GGUF_FORMS),
}


def parse_kinds(texts: Sequence[str]) -> list[str]:
    """["peft,merged_16bit"] -> ["peft", "merged_16bit"]; ConfigError for a kind that there is not."""
    kinds = [part.strip() for text in texts for part in str(text).split(",") if part.strip()]
    for text in kinds:
        name, _, argument = text.partition(":")
        if name not in KINDS:
            raise ConfigError(f"{text!r} is not a form to export to; there are {', '.join(KINDS)}")
        allowed = KINDS[name].arguments
        if allowed and argument not in allowed:
            raise ConfigError(f"{text!r}: write {name}: and one of {', '.join(allowed)}")
        if argument and not allowed:
            raise ConfigError(f"{text!r}: {name} takes nothing after a colon")
    return list(dict.fromkeys(kinds))


def folder_of(kind: str, out: Path) -> Path:
    return out / kind.replace(":", "-")


def check_targets(kinds: Sequence[str], out: Path, overwrite: bool) -> None:
    """ConfigError where an export's folder holds something already: said before hours of work, not after."""
    for kind in kinds:
        folder = folder_of(kind, out)
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise ConfigError(f"{folder} exists and is not empty: choose another folder, or ask to overwrite it")
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} exists and is not a folder: choose another one")


def export(model: Any, tokenizer: Any, kinds: Sequence[str], out: str | Path, settings: Settings) -> Iterator[str]:
    """Write the model in each of `kinds` under `out`; yields a line for each once it is done.

    Raises as `save_pretrained_merged` does. An export that fails leaves nothing of itself; those before it stay.
    """
    kinds, out = parse_kinds(kinds), Path(out).expanduser()
    check_targets(kinds, out, settings.overwrite)
    for kind in kinds:
        name, _, argument = kind.partition(":")
        said = KINDS[name].write(model, tokenizer, folder_of(kind, out), argument or None, settings)
        yield f"{kind}: {said}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastft_jax.export", description="Export a trained adapter.")
    parser.add_argument("--adapter", required=True, help="folder or hub id of the adapter (or of a plain model)")
    parser.add_argument("--to", required=True, action="append", metavar="KIND,...", help=", ".join(KINDS))
    parser.add_argument("--out", required=True, help="folder in which each export gets its own")
    parser.add_argument(
        "--base", help="merge onto: original (the 16-bit base), or its folder; else what was trained on"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of merged 16-bit weights")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--rows", help="text file, whose first lines are compared on; else a few sentences")
    parser.add_argument("--overwrite", action="store_true", help="replace export folders that are there already")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="read each back")
    parser.add_argument("--load-in-16bit", action="store_true", help="the adapter was trained on a base in 16 bits")
    parser.add_argument("--token", help="Hugging Face token; better kept in HF_TOKEN")
    arguments = parser.parse_args(argv)
    return guarded(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    kinds, out = parse_kinds(arguments.to), Path(arguments.out).expanduser()
    if not kinds:
        raise ConfigError(f"--to names no form to export to; there are {', '.join(KINDS)}")
    check_targets(kinds, out, arguments.overwrite)
    from fastft_jax.language_model import FastLanguageModel

    in_4bit = not arguments.load_in_16bit and _trained_in_4bit(Path(arguments.adapter))
    model, tokenizer = FastLanguageModel.from_pretrained(arguments.adapter, load_in_4bit=in_4bit, token=arguments.token)
    rows = None if arguments.rows is None else _rows(Path(arguments.rows), tokenizer)
    settings = Settings(
        base=arguments.base,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        overwrite=arguments.overwrite,
        verify=arguments.verify,
        rows=rows,
        token=arguments.token,
    )
    for line in export(model, tokenizer, kinds, out, settings):
        print(line)
    return 0


def _trained_in_4bit(adapter: Path) -> bool:
    """What the run that made the adapter recorded of its base; an NF4 base where it recorded nothing."""
    try:
        recorded = json.loads((adapter / "run.json").read_text(encoding="utf-8"))
        return bool(recorded["config"]["model"]["load_in_4bit"])
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _rows(path: Path, tokenizer: Any) -> list[list[int]]:
    if tokenizer is None:
        raise ConfigError(f"--rows {path} is text, and the adapter's folder has no tokenizer to read it with")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"--rows {path} cannot be read: {error}") from error
    if not lines:
        raise ConfigError(f"--rows {path} holds no text")
    return [tokenizer(line)["input_ids"][:ROW_LENGTH] for line in lines[:ROWS]]


if __name__ == "__main__":
    sys.exit(main())
