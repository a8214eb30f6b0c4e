"""Reading: every kind of file gives its rows, and every broken one an error that says where it is broken."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from fastft_jax.errors import DataError
from fastft_jax.trainers.data import load_rows
from fastft_jax.trainers.data.rows import iterate
from fastft_jax.trainers.data.split import parse_split, select

HERE = Path(__file__).resolve().parent
ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(10)]


def write(path, rows=ROWS):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        path.write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "csv"])
def test_every_kind_of_file_gives_the_same_rows_and_leaves_the_folder_as_it_was(tmp_path, suffix):
    path = write(tmp_path / f"data.{suffix}")
    rows, found = load_rows(str(path), split="train[2:5]")
    assert list(iterate(rows)) == ROWS[2:5] and found == "prompt_completion"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_json_lines_under_a_json_name_and_line_separators_inside_strings(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "one\u2028two"}\n\n{"text": "three"}', encoding="utf-8")
    assert load_rows(path)[0] == [{"text": "one\u2028two"}, {"text": "three"}]


def test_columns_of_several_types_load_where_arrow_would_refuse(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "hi"}], "tools": "[]"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "tools": [{"name": "f"}]},
    ]
    assert load_rows(write(tmp_path / "a.jsonl", rows)) == (rows, "messages")


def test_csv_values_stay_text_and_may_hold_commas_quotes_and_line_breaks(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('prompt,completion\r\n"a, ""b""\nc",007\r\n'.encode("utf-8-sig"))
    assert load_rows(path)[0] == [{"prompt": 'a, "b"\nc', "completion": "007"}]


def test_a_txt_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    assert load_rows(path) == ([{"text": "one\n\ntwo\n"}], "text")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', "line 2, byte 25"),
        ("a.txt", b"\xe9t\xe9", "line 1, byte 0"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "malformed JSON at line 2"),
        ("a.json", b'[{"text": "ok"},\n{"text"]', "malformed JSON at line 2"),
        ("a.json", b'{"data": 1}', "expected a list of objects"),
        ("a.json", b'["x"]', "row 0 is a str"),
        ("a.json", b"[]", "no rows"),
        ("a.jsonl", b" \n\n", "empty"),
        ("a.txt", b"", "empty"),
        ("a.csv", b"a,b\n1,2\n1\n", "line 3 has 1 values"),
        ("a.csv", b'a,b\n"1,2\n', "malformed CSV"),
        ("a.parquet", b"not parquet", "not a readable parquet"),
        ("a.xlsx", b"?", "unknown kind of file"),
    ],
)
def test_broken_files_are_named_with_the_place(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        load_rows(str(path))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_missing_files_and_folders_without_data_are_errors(tmp_path):
    for source in (tmp_path / "nowhere.json", "./nowhere", "nowhere.jsonl"):
        with pytest.raises(DataError, match="no such file"):
            load_rows(source)
    with pytest.raises(DataError, match="in this folder"):
        load_rows(tmp_path)


def test_a_folder_with_train_and_test_files_trains_on_train_only(tmp_path):
    write(tmp_path / "train-0.jsonl", ROWS[:4])
    write(tmp_path / "train-1.jsonl", ROWS[4:6])
    write(tmp_path / "test.jsonl", ROWS[6:])
    assert load_rows(tmp_path)[0] == ROWS[:6]
    assert load_rows(tmp_path, split="test[:1]+train[-1:]")[0] == [ROWS[6], ROWS[5]]
    with pytest.raises(DataError, match="no file for split 'dev'"):
        load_rows(tmp_path, split="dev")


def test_a_folder_of_unnamed_files_is_the_train_split(tmp_path):
    write(tmp_path / "a.parquet", ROWS[:4])
    write(tmp_path / "b.parquet", ROWS[4:])
    assert list(iterate(load_rows(tmp_path, split="train")[0])) == ROWS
    write(tmp_path / "c.jsonl")
    with pytest.raises(DataError, match="several kinds"):
        load_rows(tmp_path)


@pytest.mark.parametrize(
    "split",
    ["train", "train[:3]", "train[-3:]", "train[25%:75%]", "train[:1]+train[8:]", "train[:15%]", "train[5:200]"],
)
def test_split_expressions_mean_what_they_mean_in_datasets(tmp_path, split):
    path = write(tmp_path / "a.jsonl")
    try:
        theirs = datasets.load_dataset(
            "json", data_files=str(path), split=split, cache_dir=str(tmp_path / "cache")
        ).to_list()
    except ValueError:  # datasets refuses bounds beyond the end; python's slices, and ours, stop there
        theirs = ROWS[5:]
    assert select({"train": ROWS}, split) == theirs
    assert select({"train": datasets.Dataset.from_list(ROWS)}, split).to_list() == theirs


def test_split_expressions_that_are_none_are_errors(tmp_path):
    for split in ("train[", "train[a:b]", "", "train[1]"):
        with pytest.raises(DataError, match="not understood"):
            parse_split(split)
    with pytest.raises(DataError, match="one file is one split"):
        load_rows(write(tmp_path / "a.jsonl"), split="test")


def test_objects_in_memory_are_taken_as_they_are():
    assert load_rows(ROWS)[0] == ROWS
    data = datasets.Dataset.from_list(ROWS)
    assert load_rows(data)[0] is data
    assert load_rows(datasets.DatasetDict(train=data, test=data.select([1])), split="test")[0].to_list() == ROWS[1:2]
    for wrong in ([], datasets.Dataset.from_list([]), {"prompt": ["a"]}, ["text"], type("IterableDataset", (), {})()):
        with pytest.raises(DataError):
            load_rows(wrong)


def test_keys_that_arrow_filled_in_are_taken_out_again():
    calls = [{"name": "f", "arguments": {"city": "Paris"}}, {"name": "g", "arguments": {"n": 1}}]
    rows = [{"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls]
    back = list(iterate(datasets.Dataset.from_list(rows)))
    assert [row["messages"][0]["tool_calls"][0] for row in back] == calls


def test_a_saved_dataset_folder_is_read(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert list(iterate(load_rows(tmp_path / "saved", split="train[:2]")[0])) == ROWS[:2]


def test_the_hub_is_asked_for_ids_and_its_refusals_are_one_line(monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        if path == "who/knows":
            raise ConnectionError("Couldn't reach 'who/knows' on the Hub\nlong story")
        return (
            datasets.Dataset.from_list(ROWS) if split else datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_rows("openai/gsm8k", name="main")[0]) == 10 == len(load_rows("owner/x", split="train[:5]")[0])
    assert asked == [("openai/gsm8k", "main", None), ("owner/x", None, "train[:5]")]
    with pytest.raises(DataError, match="Couldn't reach 'who/knows' on the Hub$"):
        load_rows("who/knows")


def test_tfds_records_become_text_and_its_absence_says_what_to_install(monkeypatch):
    records = [
        {"prompt": b"caf\xc3\xa9", "completion": np.array([b"a", b"b"], object), "n": np.int64(3), "d": {"x": b"y"}}
    ]
    fake = SimpleNamespace(
        data_source=lambda name, split: records if (name, split) == ("glue/sst2", "train") else 1 / 0
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    rows, _ = load_rows("tfds:glue/sst2")
    assert rows == [{"prompt": "café", "completion": ["a", "b"], "n": 3, "d": {"x": "y"}}]
    with pytest.raises(DataError, match="tfds:nope"):
        load_rows("tfds:nope")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"pip install fastft-jax\[tfds\]"):
        load_rows("tfds:glue/sst2")


def test_reading_and_preparing_import_neither_torch_nor_jax(tmp_path):
    path = write(tmp_path / "a.parquet")
    code = (
        "import sys; from fastft_jax.trainers.data import load_rows, prepare; assert not set(sys.modules) & HEAVY\n"
        "from tiny_tokenizer import build_tokenizer\n"
        f"rows, _ = load_rows({str(path)!r}); prepare(rows, build_tokenizer(eos_token='</s>'), max_length=8)\n"
        "assert 'torch' not in sys.modules and 'jax' not in sys.modules"
    )
    heavy = "HEAVY = {'torch', 'jax', 'transformers', 'datasets', 'pyarrow'}\n"
    done = subprocess.run([sys.executable, "-c", heavy + code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
