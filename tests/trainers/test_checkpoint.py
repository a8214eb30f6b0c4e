"""A checkpoint is complete or absent, comes back bit for bit, and says what is wrong when it cannot."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft_jax.errors import TrainingError
from fastft_jax.trainers.checkpoint import CheckpointStore, find_checkpoint

Pair = namedtuple("Pair", "first second")


def _bits(tree):
    leaves = jax.tree.leaves(tree)
    return [(type(x).__name__, np.asarray(x).dtype.name, np.asarray(x).shape, np.asarray(x).tobytes()) for x in leaves]


def _tree():
    key = jax.random.PRNGKey(3)
    params = {"a": jax.random.normal(key, (5, 3)), "b": jnp.arange(7, dtype=jnp.bfloat16) / 3}
    return {
        "trainable": nnx.State({"layer": {"lora_A": nnx.LoRAParam(params["a"])}}),
        "opt_state": optax.adamw(1e-3).init(params),
        "codes": jnp.arange(256, dtype=jnp.uint8),
        "key": key,
        "host": Pair(np.array([1, -1], np.int64), np.float32(2.5)),
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "empty": np.zeros((0, 4), ml_dtypes.bfloat16),
        "scalars": [3, 0.1, True],
    }


def test_any_tree_comes_back_with_its_structure_types_and_bits(tmp_path):
    store, tree = CheckpointStore(tmp_path / "run"), _tree()
    path = store.save(7, tree, {"epoch": 1.5, "note": "ü"})
    assert path == tmp_path / "run" / "checkpoint-7"
    back, meta = store.restore(7, tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert _bits(back) == _bits(tree)
    assert meta == store.meta(7) == {"epoch": 1.5, "note": "ü"}


def test_it_restores_into_abstract_shapes_as_jax_arrays_where_they_are_wanted(tmp_path):
    store = CheckpointStore(tmp_path)
    tree = {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)}
    store.save(1, tree, {})
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="unpinned_host")
    for sharding in (None, place):
        back, _ = store.restore(1, {"w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16, sharding=sharding)})
        assert isinstance(back["w"], jax.Array)
        assert _bits(back) == _bits(tree)


DTYPES = ["uint8", "int8", "uint32", "int64", "float16", "float32", "float64", "bool", "bfloat16", "float8_e4m3fn"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=4), st.randoms())
def test_host_arrays_of_every_kind_come_back_bit_for_bit(tmp_path_factory, kinds, rng):
    def make(name, shape):
        dtype = np.dtype(bool if name == "bool" else name)
        raw = rng.randbytes(int(np.prod(shape)) * dtype.itemsize)
        array = np.frombuffer(raw, np.uint8) % 2 if name == "bool" else np.frombuffer(raw, dtype)
        return array.astype(dtype).reshape(shape) if name == "bool" else array.reshape(shape)

    tree = [make(name, shape) for name, shape in kinds]
    store = CheckpointStore(tmp_path_factory.mktemp("any"))
    store.save(0, tree, {})
    assert _bits(store.restore(0, tree)[0]) == _bits(tree)


@pytest.mark.parametrize(
    ("like", "said"),
    [
        ({"a": np.zeros(3, np.float32), "new": np.zeros(1)}, r"missing \['new'\]"),
        ({}, r"unexpected \['a'\]"),
        ({"a": np.zeros(4, np.float32)}, r"\['a'\] is float32\[3\], the run has float32\[4\]"),
        ({"a": np.zeros(3, np.float16)}, r"\['a'\] is float32\[3\], the run has float16\[3\]"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_naming_the_leaf(tmp_path, like, said):
    store = CheckpointStore(tmp_path)
    store.save(1, {"a": np.zeros(3, np.float32)}, {})
    with pytest.raises(TrainingError, match=f"checkpoint-1 is not of this run: {said}"):
        store.restore(1, like)


def test_only_the_newest_are_kept_and_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path, save_total_limit=2)
    for step in (9, 10, 100):
        store.save(step, [np.int32(step)], {"n": step})
    assert store.steps() == [10, 100]
    store.save(100, [np.int32(-1)], {"n": -1})
    assert store.restore(100, [np.int32(0)]) == ([-1], {"n": -1})
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-100"]
    store.clear()
    assert store.latest() is None


def test_half_written_and_half_deleted_folders_are_ignored_and_cleared_and_a_finished_one_is_taken(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        store.save(step, [np.int32(step)], {})
    os.rename(tmp_path / "checkpoint-2", tmp_path / "checkpoint-2.partial")  # killed before the last rename
    os.rename(tmp_path / "checkpoint-3", tmp_path / "checkpoint-3.removing")  # killed while deleting
    (tmp_path / "checkpoint-4.partial" / "arrays").mkdir(parents=True)  # killed while writing
    (tmp_path / "checkpoint-9").mkdir()  # nothing in it
    before = sorted(os.listdir(tmp_path))
    store = CheckpointStore(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before  # a dry run makes a store, and must not touch the run beside it
    assert store.steps() == [1, 2]
    assert CheckpointStore(tmp_path).restore(2, [np.int32(0)])[0] == [2]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2", "checkpoint-9"]


def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, [np.arange(10_000)], {})
    largest = max(
        (p for p in (tmp_path / "checkpoint-1" / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(TrainingError, match="checkpoint-1 cannot be read .*remove it"):
        store.restore(1, [np.arange(10_000)])
    (tmp_path / "checkpoint-1" / "manifest.json").write_text("{")
    with pytest.raises(TrainingError, match="manifest.json cannot be read"):
        store.meta(1)


def test_what_to_resume_from_is_found_or_said_to_be_missing(tmp_path):
    store = CheckpointStore(tmp_path)
    assert find_checkpoint(None, tmp_path) is find_checkpoint(False, tmp_path) is None
    with pytest.raises(TrainingError, match="has no complete checkpoint to resume from"):
        find_checkpoint(True, tmp_path)
    with pytest.raises(TrainingError, match=r"no complete checkpoint of step 5 in .* \(steps: none\)"):
        store.meta(5)
    store.save(4, [np.int32(1)], {})
    assert find_checkpoint(True, tmp_path) == find_checkpoint(tmp_path / "checkpoint-4", "elsewhere") == (tmp_path, 4)
    with pytest.raises(TrainingError, match="checkpoint-5 is not a checkpoint"):
        find_checkpoint(str(tmp_path / "checkpoint-5"), tmp_path)


def test_a_disk_known_to_be_too_full_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, [np.zeros(10)], {})
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    with pytest.raises(TrainingError, match=r"no room for checkpoint 2 in .*it needs 8.0 MB \(0.0 MB are free\)"):
        store.save(2, [np.zeros(1_000_000)], {})
    assert os.listdir(tmp_path) == ["checkpoint-1"]


_FILL = """
import resource, signal, sys
import numpy as np
from fastft_jax.errors import TrainingError
from fastft_jax.trainers.checkpoint import CheckpointStore

store, noise = CheckpointStore(sys.argv[1]), np.random.default_rng(0).integers(0, 255, 10**6, np.uint8)
store.save(1, [noise], {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.save(2, [noise], {})
except TrainingError as error:
    print(error)
"""


def test_a_write_that_fails_half_way_leaves_the_older_checkpoint_and_no_rubbish(tmp_path):
    """A limit on file sizes makes the kernel refuse a write in the middle, as a full disk does."""
    done = subprocess.run([sys.executable, "-c", _FILL, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"no room for checkpoint 2 in {tmp_path}: it needs 1.0 MB (File too large); free some, or lower "
        "save_total_limit. Older checkpoints are intact\n"
    )
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    assert CheckpointStore(tmp_path).restore(1, [np.zeros(10**6, np.uint8)])[0][0].any()


_SAVER = """
import os, sys, warnings
import numpy as np
import orbax.checkpoint
from fastft_jax.trainers.checkpoint import CheckpointStore

def save_forever():
    store = CheckpointStore(sys.argv[1], save_total_limit=2)
    step = (store.latest() or 0) + 1
    while True:
        rng = np.random.default_rng(step)
        store.save(step, {"a": rng.integers(0, 255, 10**6, np.uint8), "b": [rng.standard_normal(9)] * 20}, {"n": step})
        step += 1

warnings.simplefilter("ignore")  # jax warns of forks, but nothing of it has run yet
for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        save_forever()
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


def test_killed_at_any_moment_the_newest_checkpoint_is_complete_and_exact(tmp_path):
    """kill -9 at random moments of processes that do nothing but save; each goes on from what the last one left.

    They are forks of one process, because importing jax and orbax five times would take most of the test's time.
    """
    rng = random.Random(0)
    command = [sys.executable, "-c", _SAVER, str(tmp_path)]
    reached = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saver:
        for _ in range(6):
            print("go", file=saver.stdin, flush=True)
            pid = int(saver.stdout.readline())
            deadline = time.monotonic() + 60
            while max(_steps(tmp_path), default=0) <= reached and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))  # a save takes some 0.03 s
            os.kill(pid, signal.SIGKILL)
            assert saver.stdout.readline() == "dead\n"
            store = CheckpointStore(tmp_path)
            step = store.latest()
            assert step is not None and step > reached
            again = np.random.default_rng(step)
            expected = {"a": again.integers(0, 255, 10**6, np.uint8), "b": [again.standard_normal(9)] * 20}
            back, meta = store.restore(step, expected)
            assert _bits(back) == _bits(expected) and meta == {"n": step}
            assert len(store.steps()) <= 3  # a kill may fall between completing the new one and deleting the old
            assert not [name for name in os.listdir(tmp_path) if "." in name]
            reached = step
        saver.stdin.close()


def _steps(folder):
    """Complete checkpoints, seen from outside: opening a store would clear what the saver is writing."""
    found = []
    for manifest in folder.glob("checkpoint-*/manifest.json"):
        if "." not in manifest.parent.name:
            try:
                found.append(json.loads(manifest.read_text())["step"])
            except (OSError, ValueError):
                continue
    return found
