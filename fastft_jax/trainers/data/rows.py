"""Reading a data set: from a path, a hub id, `tfds:NAME` or an object in memory to a sequence of Python rows.

A row is a dict of columns. JSON is read with Python's own parser, because Arrow wants one type a column and chat data
often has several (a message's content may be a string or a list of parts). Nothing is written beside the source.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft_jax.errors import DataError
from fastft_jax.trainers.data.formats import column_names, detect_format
from fastft_jax.trainers.data.split import parse_split, select

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]
Rows = "Sequence[Row] | datasets.Dataset"

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")
_SPLIT_NAMES = ("train", "validation", "valid", "dev", "eval", "test")
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def load_rows(
    source: "str | Path | Sequence[Row] | datasets.Dataset",
    *,
    split: str | None = None,
    name: str | None = None,
    data_format: str | None = None,
) -> "tuple[Rows, str]":
    """Read `source` and say which format its columns have.

    source: a .json, .jsonl, .parquet, .csv or .txt file, or a folder of files of one of these kinds; a folder written
        by `Dataset.save_to_disk`; a Hugging Face hub id; `tfds:NAME`; or a `datasets.Dataset`, a list of dicts.
    split: as in `datasets`: "train", "train[:100]", "train[10%:20%]+test". Without one: "train" where there is one.
    name: the configuration of a hub data set with several.
    data_format: overrides detection (see `formats.FORMATS`).

    Returns the rows (a list of dicts, or a `datasets.Dataset` where Arrow holds them already) and the format's name.
    Raises DataError when nothing can be read, naming the file and the line.
    """
    if isinstance(source, str | Path):
        rows = _load_path(str(source), split, name)
    else:
        rows = _from_memory(source, split)
    if len(rows) == 0:
        raise DataError(f"{_describe(source)}: no rows" + (f" in split {split!r}" if split else ""))
    if not column_names(rows):
        raise DataError(f"{_describe(source)}: the rows have no columns")
    return rows, detect_format(rows, data_format)


def iterate(rows: "Rows") -> Iterator[Row]:
    """The rows as Python dicts. Arrow fills keys that a nested record does not have with None: those are taken out."""
    if isinstance(rows, list | tuple):
        yield from rows
        return
    for row in rows:
        yield {key: _without_none(value) for key, value in row.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _describe(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__} given"


def _from_memory(source: Any, split: str | None) -> "Rows":
    kind = type(source).__name__
    if kind in ("IterableDataset", "IterableDatasetDict"):
        raise DataError(
            f"a streamed {kind} has no length; materialise it first, e.g. Dataset.from_list(list(ds.take(n)))"
        )
    if isinstance(source, dict):  # datasets.DatasetDict is one
        wanted = parse_split(split)[0].name if split else "train"
        if not all(hasattr(part, "column_names") for part in source.values()):
            raise DataError("a dict is no data set: give a list of dicts, one a row, or a datasets.Dataset")
        if wanted not in source:
            raise DataError(f"no split {wanted!r}; this data set has {', '.join(map(repr, source))}")
        return select({key: source[key] for key in source}, split or wanted)
    if not hasattr(source, "column_names"):
        source = list(source)
        for number, row in enumerate(source):
            if not isinstance(row, dict):
                raise DataError(f"row {number} is a {type(row).__name__}, not a dict of columns")
    return select({"train": source}, split) if split else source


def _load_path(source: str, split: str | None, name: str | None) -> "Rows":
    if source.startswith("tfds:"):
        return _load_tfds(source.removeprefix("tfds:"), split)
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path, split)
    if path.is_file():
        rows = read_file(path)
        if not split:
            return rows
        names = [part.name for part in parse_split(split)]
        if any(part != "train" and part not in path.stem for part in names):
            raise DataError(f"{path}: one file is one split, 'train'; split={split!r} asks for another")
        return select(dict.fromkeys(names, rows), split)
    if path.suffix.lower() in SUFFIXES or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise DataError(f"{source}: no such file or folder")
    return _load_hub(source, split, name)


def _load_folder(folder: Path, split: str | None) -> "Rows":
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        import datasets

        return _from_memory(datasets.load_from_disk(str(folder)), split)
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.name not in _METADATA
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise DataError(f"{folder}: no {', '.join(SUFFIXES)} file in this folder")

    def of_split(wanted: str) -> list[Path]:
        word = re.compile(rf"(?:^|[^A-Za-z]){re.escape(wanted)}(?:[^A-Za-z]|$)")
        return [file for file in files if word.search(str(file.relative_to(folder)))]

    if split is None:
        # With train and test files side by side, taking all of them would train on the test set.
        named = any(of_split(known) for known in _SPLIT_NAMES)
        chosen = {"train": of_split("train") if named else files}
        if not chosen["train"]:
            raise DataError(f"{folder}: no file is named train; give split= one of the names in: {_listing(files)}")
        split = "train"
    else:
        chosen = {part.name: of_split(part.name) for part in parse_split(split)}
        if list(chosen) == ["train"] and not chosen["train"] and not any(of_split(known) for known in _SPLIT_NAMES):
            chosen["train"] = files
    for wanted, members in chosen.items():
        if not members:
            raise DataError(f"{folder}: no file for split {wanted!r}; found {_listing(files)}")
        kinds = {file.suffix.lower() for file in members}
        if len(kinds) > 1:
            raise DataError(f"{folder}: files of several kinds ({', '.join(sorted(kinds))}); name one file instead")
    return select({key: _concatenate([read_file(file) for file in members]) for key, members in chosen.items()}, split)


def _listing(files: list[Path]) -> str:
    return ", ".join(file.name for file in files[:8]) + (", ..." if len(files) > 8 else "")


def _concatenate(parts: list["Rows"]) -> "Rows":
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, list) for part in parts):
        return [row for part in parts for row in part]
    import datasets

    return datasets.concatenate_datasets(parts)


def read_file(path: Path) -> "Rows":
    """The rows of one local file, by its suffix. A .txt file is one row, {"text": the whole file}."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    if suffix == ".txt":
        return [{"text": text}]
    rows = _read_csv(path, text) if suffix == ".csv" else _read_json(path, text, lines=suffix == ".jsonl")
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: not UTF-8 at line {line}, byte {error.start} (0x{data[error.start]:02x}); save it as UTF-8"
        ) from None


def _read_json(path: Path, text: str, lines: bool) -> list[Row]:
    if not lines:
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise DataError(f"{path}: malformed JSON at line {error.lineno}: {error.msg}") from None
            lines = True  # one object a line under a .json name, as many data sets have it
    if lines:
        rows = []
        # split("\n"), not splitlines(): a JSON string may hold U+2028 and other line breaks as they are.
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: malformed JSON at line {number}: {error.msg}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, found one {type(rows).__name__}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is a {type(row).__name__}, not an object with columns")
    return rows


def _read_csv(path: Path, text: str) -> list[Row]:
    """Every value stays a string: 007 and 1e3 are text to a language model."""
    import io

    limit = csv.field_size_limit(2**31 - 1)  # the module's one global: set for this call, then put back
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader)
        rows = []
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                raise DataError(f"{path}: line {reader.line_num} has {len(values)} values, the header {len(header)}")
            rows.append(dict(zip(header, values, strict=True)))
        return rows
    except csv.Error as error:
        raise DataError(f"{path}: malformed CSV at line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> "Rows":
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        return datasets.Dataset(pyarrow.parquet.read_table(path))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable parquet file: {_first_line(error)}") from None


def _load_hub(source: str, split: str | None, name: str | None) -> "Rows":
    import datasets

    try:
        loaded = datasets.load_dataset(source, name, split=split)
    except Exception as error:  # datasets raises a dozen unrelated classes for "not there" and "no network"
        raise DataError(f"{source}: cannot be loaded from the hub: {_first_line(error)}") from error
    return _from_memory(loaded, None)


def _load_tfds(name: str, split: str | None) -> list[Row]:
    """`tfds.data_source`: random access without TensorFlow."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise DataError(f"tfds:{name} needs tensorflow-datasets: pip install fastft-jax[tfds]") from None
    try:
        records = tfds.data_source(name, split=split or "train")
    except Exception as error:  # as with the hub: many unrelated classes
        raise DataError(f"tfds:{name}: {_first_line(error)}") from error
    return [{key: _plain(value, f"tfds:{name} row {i}") for key, value in row.items()} for i, row in enumerate(records)]


def _plain(value: Any, where: str) -> Any:
    """numpy and bytes, as tensorflow-datasets hands them out, to str, int, float, list, dict."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise DataError(f"{where}: not UTF-8") from None
    if isinstance(value, dict):
        return {key: _plain(item, where) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
        return _plain(value, where) if isinstance(value, bytes | list) else value
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
