"""GGUF's block types: our encoders against llama.cpp's own bytes, and the recipes that mix them against its rules."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest

from fastft_jax.convert.gguf import encode, recipes
from fastft_jax.convert.gguf.imatrix import check_imatrix, read_imatrix
from fastft_jax.errors import CheckpointError, ConfigError

BLOCK_TYPES = [kind for kind in encode.TYPES if kind not in ("F32", "F16", "BF16")]


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def golden(shared_data):
    return np.load(shared_data / "gguf" / "ggml_quant_golden.npz")


def bytes_of(kind, w, pool) -> np.ndarray:
    return np.concatenate(list(encode.encode(kind, w, pool)))


def decoded(kind, data, shape) -> np.ndarray:
    rows = data.reshape(shape[0], -1)
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_bytes_equal_llama_cpps_reference_quantiser(kind, golden, pool):
    """Normal and heavy-tailed rows, outliers, zeros, a constant: every byte (ggml_quantize_chunk, no weights)."""
    np.testing.assert_array_equal(bytes_of(kind, golden["x"], pool).reshape(golden[kind].shape), golden[kind])


# Root mean square error over that of the values, of normal values: a step between codes is 3.5 to 5 sigma / 2^bits, and
# rounding within it leaves step / sqrt(12). A bit lost anywhere would double it.
@pytest.mark.parametrize(
    ("kind", "bound"),
    [("Q8_0", 0.007), ("Q6_K", 0.022), ("Q5_K", 0.043), ("Q5_0", 0.055), ("Q4_K", 0.085), ("Q4_0", 0.11)]
    + [("Q3_K", 0.19), ("Q2_K", 0.35), ("BF16", 0.002), ("F16", 0.0003), ("F32", 0.0)],
)
def test_error_is_that_of_the_bits(kind, bound, pool):
    w = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    w[3] *= 1e-3
    w[4] *= 30
    data = bytes_of(kind, w, pool)
    assert data.size == encode.encoded_bytes(kind, w.shape)
    error = np.sqrt(np.mean((decoded(kind, data, w.shape) - w) ** 2, axis=1) / np.mean(w**2, axis=1))
    assert error.max() <= bound


@pytest.mark.parametrize("kind", encode.TYPES)
def test_pieces_join_to_the_bytes_of_the_whole(kind, pool, monkeypatch):
    w = np.random.default_rng(1).standard_normal((5, 768)).astype(np.float32)
    whole = bytes_of(kind, w, pool)
    monkeypatch.setattr(encode, "_CHUNK", 256)
    np.testing.assert_array_equal(bytes_of(kind, w, pool), whole)


def test_a_row_that_is_no_multiple_of_the_block_is_refused(pool):
    with pytest.raises(ValueError, match="300 are no multiple of Q4_K's blocks of 256"):
        list(encode.encode("Q4_K", np.zeros((2, 300), np.float32), pool))


LLAMA_8B = recipes.Shape("llama", layers=32, heads=32, kv_heads=8, tied=False)


def types(method, model=LLAMA_8B) -> dict[str, list[int]]:
    """type -> layers, for each kind of tensor that the rules treat apart."""
    out = {}
    for part in ("attn_v", "attn_k", "attn_output", "ffn_down", "ffn_up"):
        for layer in range(model.layers):
            kind = recipes.tensor_type(method, f"blk.{layer}.{part}.weight", (4096, 4096), model)
            out.setdefault(part, {}).setdefault(kind, []).append(layer)
    return out


def test_q4_k_m_is_the_published_mixture_of_llama_8b():
    """Meta-Llama-3.1-8B Q4_K_M as released: 16 of 32 layers of attn_v and ffn_down in Q6_K, the head too."""
    better = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    rest = sorted(set(range(32)) - set(better))
    found = types("q4_k_m")
    assert found["attn_v"] == found["ffn_down"] == {"Q6_K": better, "Q4_K": rest}
    assert found["attn_k"] == found["attn_output"] == found["ffn_up"] == {"Q4_K": list(range(32))}
    assert recipes.tensor_type("q4_k_m", "output.weight", (128256, 4096), LLAMA_8B) == "Q6_K"
    assert recipes.tensor_type("q4_k_m", "token_embd.weight", (128256, 4096), LLAMA_8B) == "Q4_K"
    for vector in ("output_norm.weight", "blk.3.attn_norm.weight", "blk.3.attn_q.bias"):
        assert recipes.tensor_type("q4_k_m", vector, (4096,), LLAMA_8B) == "F32"


def test_grouped_queries_and_seventy_billion_get_better_values():
    mha = recipes.Shape("llama", 32, 32, 32, tied=False)
    seventy = recipes.Shape("llama", 80, 64, 8, tied=False)
    assert types("q2_k")["attn_v"] == {"Q4_K": list(range(32))}
    assert types("q2_k", mha)["attn_v"] == {"Q3_K": list(range(32))}
    assert set(types("q4_k_s", seventy)["attn_v"]) == {"Q5_K"}
    assert types("q4_k_s")["attn_v"] == types("q4_k_s")["ffn_down"] == {"Q5_K": [0, 1, 2, 3], "Q4_K": [*range(4, 32)]}


def test_narrow_rows_fall_back_as_in_llama_cpp():
    assert [recipes.fitting("Q4_K", n) for n in (512, 96, 172)] == ["Q4_K", "Q5_0", "F16"]
    assert recipes.fitting("Q6_K", 64) == "Q8_0" and recipes.fitting("Q3_K", 32) == "Q4_0"


def test_an_unknown_method_lists_the_known():
    assert recipes.resolve_method("Q4_K_M") == "q4_k_m"
    with pytest.raises(ConfigError, match="'q4_k_xl' is not one of f32, f16"):
        recipes.resolve_method("q4_k_xl")


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_importance_moves_the_error_to_columns_that_do_not_matter(kind, pool, monkeypatch):
    """The weighted error falls against the plain encoder's; in pieces that cut rows, the bytes stay the same."""
    rng = np.random.default_rng(2)
    w = rng.standard_normal((8, 768)).astype(np.float32)
    importance = rng.lognormal(sigma=2, size=768).astype(np.float32)
    plain, weighted = (np.concatenate(list(encode.encode(kind, w, pool, i))) for i in (None, importance))
    errors = [float((importance * (decoded(kind, data, w.shape) - w) ** 2).sum()) for data in (plain, weighted)]
    assert errors[1] < 0.9 * errors[0]
    monkeypatch.setattr(encode, "_CHUNK", 512)
    np.testing.assert_array_equal(np.concatenate(list(encode.encode(kind, w, pool, importance))), weighted)


def imatrix(path, tensors):
    writer = gguf.GGUFWriter(path, "imatrix")
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_importance_matrix_holds_means_and_is_this_models(tmp_path):
    whole = {"a.weight.in_sum2": [[2.0, 6.0]], "a.weight.counts": [[4.0]]}
    never = {"b.weight.in_sum2": [[0.0, 0.0]], "b.weight.counts": [[0.0]]}
    experts = {"e.weight.in_sum2": [[2.0, 6.0], [3.0, 5.0], [0.0, 0.0]], "e.weight.counts": [[4.0], [1.0], [0.0]]}
    means = read_imatrix(imatrix(tmp_path / "m.gguf", whole | never | experts))
    np.testing.assert_array_equal(means["a.weight"], [0.5, 1.5])
    np.testing.assert_array_equal(means["b.weight"], [1, 1])
    np.testing.assert_array_equal(means["e.weight"], [[0.5, 1.5], [3, 5], [1, 1]])
    check_imatrix("m", means, {"a.weight": (3, 2), "b.weight": (2,), "e.weight": (3, 7, 2)})
    with pytest.raises(CheckpointError, match="e.weight has 3 experts of 2 columns, this model's has 4 experts of 2"):
        check_imatrix("m", means, {"e.weight": (4, 7, 2)})
    with pytest.raises(CheckpointError, match="a.weight has 2 columns, this model's has 3"):
        check_imatrix("m", means, {"a.weight": (2, 3)})
    with pytest.raises(CheckpointError, match="which this model does not have"):
        check_imatrix("m", means, {"c.weight": (2, 2)})
    for tensors, message in (
        ({"a.weight.in_sum2": [[1.0]]}, "a.weight has no counts"),
        ({"a.weight.in_sum2": [[np.inf]], "a.weight.counts": [[1.0]]}, "not finite"),
        ({"a.weight": [[1.0]]}, "is not an importance matrix"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_imatrix(imatrix(tmp_path / "wrong.gguf", tensors))
