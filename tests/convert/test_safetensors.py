"""Safetensors files against the safetensors library itself, and every way in which a folder can be broken."""

import json
import os
import struct
import subprocess
import sys
import textwrap

import ml_dtypes  # noqa: F401  registers bfloat16 and float8 with numpy
import numpy as np
import pytest
import safetensors
import safetensors.numpy as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft_jax.convert.safetensors import (
    Checkpoint,
    SafetensorsFile,
    write_safetensors,
    write_sharded,
    writer,
)
from fastft_jax.errors import CheckpointError, ConfigError

DTYPES = (
    "bool uint8 int8 float8_e5m2 float8_e4m3fn float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz int16 uint16 float16 "
    "bfloat16 int32 uint32 float32 complex64 float64 int64 uint64"
).split()


@st.composite
def arrays(draw):
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    size = dtype.itemsize * int(np.prod(shape))
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    if dtype == np.bool_:
        raw = raw & 1
    array = raw.view(dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array  # a transposed view is not contiguous


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


def raw_bytes(array):
    return array.dtype, array.shape, array.tobytes()


def dense(tensors):
    """The library wants row-major arrays (np.ascontiguousarray would turn a scalar into a vector)."""
    return {name: array.copy(order="C") for name, array in tensors.items()}


@settings(max_examples=50, deadline=None)
@given(tensors=st.dictionaries(names, arrays(), max_size=6))
def test_files_are_byte_identical_to_the_librarys_and_read_back_bit_exactly(tmp_path_factory, tensors):
    path = tmp_path_factory.getbasetemp() / "property.safetensors"
    write_safetensors(path, tensors)
    assert path.read_bytes() == oracle.save(dense(tensors), {"format": "pt"})
    file = SafetensorsFile(path)
    assert {name: raw_bytes(file.read(name)) for name in file.tensors} == {
        name: raw_bytes(array) for name, array in tensors.items()
    }
    theirs = dict(safetensors.deserialize(path.read_bytes()))  # its numpy reader does not know float8
    assert {name: bytes(entry["data"]) for name, entry in theirs.items()} == {
        name: file.read(name).tobytes() for name in file.tensors
    }
    if not any("float8" in str(array.dtype) for array in tensors.values()):
        for name, expected in oracle.load_file(path).items():
            assert raw_bytes(file.read(name)) == raw_bytes(expected)


def test_without_metadata_and_with_other_metadata_the_bytes_are_the_librarys_too(tmp_path):
    tensors = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    for metadata in (None, {}, {"note": "é\n"}):
        write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
        assert (tmp_path / "x.safetensors").read_bytes() == oracle.save(tensors, metadata)


def test_big_endian_arrays_are_stored_little_endian(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"w": np.arange(5, dtype=">i4")})
    assert oracle.load_file(tmp_path / "x.safetensors")["w"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "tensors", [{"w": np.array(["a"])}, {"w": np.zeros(2, np.complex128)}, {"__metadata__": np.zeros(1)}]
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, tensors):
    with pytest.raises(CheckpointError):
        write_safetensors(tmp_path / "x.safetensors", tensors)
    assert not list(tmp_path.iterdir())


def test_large_tensors_are_read_in_parallel_slices_bit_exactly(tmp_path):
    big = np.random.default_rng(0).integers(0, 256, (65 << 20) + 3, np.uint8)
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(3, np.uint8), "big": big})
    assert np.array_equal(Checkpoint.open(tmp_path).read("big"), big)


# --- folders -------------------------------------------------------------------------------------------------------


def some_tensors(n=6):
    rng = np.random.default_rng(1)
    return {f"layers.{i}.weight": rng.normal(size=(8, 16)).astype("bfloat16") for i in range(n)}


def layout_of(tensors):
    return {name: (array.dtype, array.shape) for name, array in tensors.items()}


@pytest.fixture
def sharded(tmp_path):
    """Three shards of two tensors each."""
    tensors = some_tensors()
    write_sharded(tmp_path, layout_of(tensors), tensors.__getitem__, 600)
    return tmp_path


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_sharded_folders_are_what_transformers_writes_and_reads(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model.save_pretrained(theirs, max_shard_size="5KB")
    checkpoint = Checkpoint.open(theirs)
    state = model.state_dict()
    assert set(checkpoint.names) == set(state)
    for name in checkpoint.names:
        assert np.array_equal(checkpoint.read(name).view(np.uint16), state[name].view(torch.uint16).numpy())

    ours.mkdir()
    layout = {name: checkpoint.info(name) for name in checkpoint.names}
    files = write_sharded(ours, layout, checkpoint.read, "5KB")
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in state.values())
    config.save_pretrained(ours)
    again = LlamaForCausalLM.from_pretrained(ours).state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_one_shard_needs_no_index(tmp_path):
    tensors = some_tensors(2)
    assert write_sharded(tmp_path, layout_of(tensors), tensors.__getitem__, "1MB") == ["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == oracle.save(tensors, {"format": "pt"})


def test_a_tensor_larger_than_the_shard_size_gets_a_shard_of_its_own(tmp_path):
    tensors = {"a": np.zeros(10, np.uint8), "b": np.zeros(100, np.uint8), "c": np.zeros(10, np.uint8)}
    assert len(write_sharded(tmp_path, layout_of(tensors), tensors.__getitem__, 50)) == 3
    assert Checkpoint.open(tmp_path).names == ("a", "b", "c")


@pytest.mark.parametrize("size, expected", [("5GB", 5 * 10**9), ("1.5 KiB", 1536), (7, 7), ("200kb", 200_000)])
def test_sizes_are_read_as_transformers_reads_them(size, expected):
    assert writer.parse_size(size) == expected


@pytest.mark.parametrize("size", ["five", "5XB", "0", -1, ""])
def test_a_wrong_size_is_a_config_error(size):
    with pytest.raises(ConfigError):
        writer.parse_size(size)


def test_a_single_file_wins_over_an_index_as_in_transformers(sharded):
    write_safetensors(sharded / "model.safetensors", {"only": np.zeros(1, np.float32)})
    assert Checkpoint.open(sharded).names == ("only",)


def test_missing_and_unexpected_names_are_told_in_order(sharded):
    checkpoint = Checkpoint.open(sharded)
    assert checkpoint.missing(["z", "layers.1.weight", "a"]) == ["z", "a"]
    assert checkpoint.unexpected(["layers.1.weight"]) == [f"layers.{i}.weight" for i in (0, 2, 3, 4, 5)]
    assert "layers.0.weight" in checkpoint and "z" not in checkpoint
    with pytest.raises(
        CheckpointError, match=r"no tensor 'layer.1.weight'; the nearest name there is 'layers.1.weight'"
    ):
        checkpoint.read("layer.1.weight")


def test_links_of_the_hubs_cache_are_followed(sharded, tmp_path_factory):
    """A snapshot holds links to ../../blobs/<hash>: they leave the folder, and that is fine."""
    root = tmp_path_factory.mktemp("hub")
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for file in sharded.iterdir():
        blob = root / "blobs" / str(abs(hash(file.name)))
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    assert len(Checkpoint.open(snapshot).names) == 6


def refused(folder, *words):
    """The error names what the reader needs, in at most two lines of reasonable length."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert message.count("\n") <= 1 and len(message) < 600


def test_no_folder_a_file_and_an_empty_folder_are_told_apart(tmp_path):
    refused(tmp_path / "absent", "absent does not exist")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no weights", "found nothing")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "empty", "is an adapter")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused_and_the_converter_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02")
    refused(tmp_path, name, "safetensors only; convert with scripts/convert_bin_to_safetensors.py")


def test_missing_shards_are_listed(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "lacks 1 of 3 shards: model-00002-of-00003.safetensors")
    (sharded / "model-00003-of-00003.safetensors").unlink()
    refused(sharded, "lacks 2 of 3 shards: model-00002-of-00003.safetensors, model-00003-of-00003.safetensors")


@pytest.mark.parametrize("entry", ["../x.safetensors", "/x.safetensors", "a/../../x", "..\\x", "C:\\x", "", 3, None])
def test_an_index_entry_that_points_outside_the_folder_is_refused(sharded, entry):
    (sharded.parent / "x.safetensors").write_bytes((sharded / "model-00001-of-00003.safetensors").read_bytes())
    edit_index(sharded, lambda index: index["weight_map"].update({"layers.0.weight": entry}))
    refused(sharded, "layers.0.weight", "points outside the folder")


@pytest.mark.parametrize(
    "text, word",
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "lists 'a' twice"),
        ("\udcff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_malformed_index_is_refused(sharded, text, word):
    (sharded / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(sharded, "model.safetensors.index.json", word)


def test_a_tensor_absent_from_the_shard_that_the_index_names_is_refused(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update({"extra": "model-00002-of-00003.safetensors"}))
    refused(sharded, "model-00002-of-00003.safetensors does not hold 'extra'")


def test_a_tensor_in_two_shards_is_refused(sharded):
    write_safetensors(sharded / "model-00003-of-00003.safetensors", some_tensors())
    refused(sharded, "'layers.0.weight' is in both model-00001-of-00003.safetensors and model-00003-of-00003")


@pytest.mark.parametrize("keep", [0, 7, 8, 20, -1, -300])
def test_a_truncated_file_is_refused_wherever_it_ends(sharded, keep):
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(sharded, "model-00002-of-00003.safetensors", "is truncated")


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(tmp_path, "Git LFS pointer", "git lfs pull")


def test_a_dangling_link_is_refused(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("../blobs/none")
    refused(tmp_path, "model.safetensors cannot be read")


def header_file(path, header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header, word",
    [
        (b"not json", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"w": 1, "w": 2}', "lists 'w' twice"),
        ({"w": 3}, "no dtype, shape and data_offsets"),
        ({"w": entry("F4")}, "dtype 'F4', which is not one of BOOL, U8"),
        ({"w": entry(["F32"])}, "dtype"),
        ({"w": entry(shape=(-2,))}, "shape [-2]"),
        ({"w": entry(shape=(2.0,))}, "shape [2.0]"),
        ({"w": entry(offsets=(8, 0))}, "needs 8 bytes"),
        ({"w": entry(offsets=(0, 4))}, "needs 8 bytes, its data_offsets [0, 4] hold 4"),
        ({"w": entry(offsets=(0,))}, "data_offsets [0]"),
        ({"w": entry(offsets=(-8, 0))}, "data_offsets [-8, 0]"),
        ({"w": entry(shape=(2**40, 2**40), offsets=(0, 8))}, "hold 8"),
        ({"w": entry(shape=(1000,), offsets=(0, 4000))}, "is truncated"),
        ({"v": entry(), "w": entry(offsets=(4, 12))}, "tensors 'v' and 'w' overlap"),
        ({"v": entry(), "w": entry()}, "overlap"),
        ({"w": entry(offsets=(8, 16))}, "8 bytes before tensor 'w'"),
        ({"w": entry(shape=(1,), offsets=(0, 4))}, "4 bytes after the last tensor"),
        ({"__metadata__": ["x"], "w": entry()}, "__metadata__"),
    ],
)
def test_a_header_that_does_not_describe_the_file_is_refused(tmp_path, header, word):
    header_file(tmp_path / "model.safetensors", header)
    if "F4" not in str(header):  # a real dtype of the format, but numpy has none for it
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize((tmp_path / "model.safetensors").read_bytes())
    refused(tmp_path, "model.safetensors", word)


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_an_absurd_header_length_is_refused_without_reading_it(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    refused(tmp_path, "is not a safetensors file", str(length))


@settings(max_examples=50, deadline=None)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_byte_gives_a_checkpoint_error_or_a_readable_file(tmp_path_factory, position, value):
    """No other exception comes out of the reader, whatever the damage, and no reading beyond the file."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    raw = bytearray(oracle.save(some_tensors(2), {"format": "pt"}))
    raw[position] = value
    (folder / "model.safetensors").write_bytes(raw)
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError:
        return
    assert sum(checkpoint.read(name).nbytes for name in checkpoint.names) == 2 * 8 * 16 * 2


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_not_garbage(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"w": np.ones(100, np.float32)})
    checkpoint = Checkpoint.open(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(CheckpointError, match="became shorter while tensor 'w'"):
        checkpoint.read("w")


# --- memory --------------------------------------------------------------------------------------------------------


def test_reading_a_checkpoint_tensor_by_tensor_takes_the_memory_of_one_tensor(tmp_path):
    """310 MB in tensors of 30 MB and one of 70 MB (read in slices): the peak grows by that one, plus 30 MB of a freed
    one that the allocator holds on to, and 16 for the reading threads' stacks. A memory map or a kept buffer would show
    up as 310 MB."""
    sizes = {f"w{i}": 30_000_000 for i in range(8)} | {"large": 70_000_000}
    layout = {name: (np.dtype(np.uint8), (size,)) for name, size in sizes.items()}
    write_sharded(tmp_path, layout, lambda name: np.ones(sizes[name], np.uint8), "100MB", durable=False)
    code = """
        import sys
        from fastft_jax.convert.safetensors import Checkpoint

        def peak():  # kB; getrusage's would begin at the peak of the process that started this one
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

        checkpoint = Checkpoint.open(sys.argv[1])
        before = peak()
        for name in checkpoint.names:
            array = checkpoint.read(name)
            assert array[0] == array[-1] == 1
            del array
        print(peak() - before)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) * 1024 < 70_000_000 + 30_000_000 + (16 << 20)
