"""Which class a kernel is in, and what a profile's rows add up to."""

import pytest
from test_bench_hlo import TEXT

from fastft_jax.bench.hlo import Program
from fastft_jax.bench.profile import Speeds, as_record, classify, lines, summarise
from fastft_jax.bench.trace import Event, busy

HERE = "/opt/x/fastft_jax/"
STEP = f"{HERE}trainers/step.py:make_train_step.<locals>.step"
BENCH = f"{HERE}bench/measure.py:Bench.run"
BODY = "jit(step)/transpose(jvp())/while/body/checkpoint/"


@pytest.mark.parametrize(
    ("kind", "name", "hlo_op", "scope", "at"),
    [
        ("GEMM", "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "", "", ""),
        ("GEMM", "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "cublas-gemm.8", BODY + "attention/dot_general", ""),
        ("GEMM", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "", "", ""),
        ("GEMM", "cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8", "", "", ""),
        ("GEMM", "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>(Params)", "", "", ""),
        ("GEMM", "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "", "", ""),
        ("GEMM", "gemm_fusion_dot_general_46", "", BODY + "mlp/dot_general", "quant/lora_linear.py:lora_linear"),
        ("GEMM", "void cublasLt::splitKreduce_kernel<32, 16, int, float>(...)", "", "", ""),
        ("GEMM", "loop_reduce_fusion_2", "loop_reduce_fusion.2", BODY + "mlp/dot_general", ""),
        ("LoRA", "nvjet_tst_64x32", "cublas-gemm.9", "jit(step)/jvp()/while/body/mlp/lora/dot_general", ""),
        ("attention", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128", "", "", ""),
        ("attention", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "custom-call.3", "", ""),
        ("attention", "attention_backward_dkdv", "pallas_call.4", BODY + "attention/pallas_call", ""),
        ("attention", "loop_add_fusion", "", BODY + "attention/add", "pallas_kernels/attention/cudnn.py:attention"),
        ("dequant", "nf4_dequantize_double", "pallas_call.30", BODY + "attention/nf4_dequantize_double", ""),
        ("fp8 scales", "fp8_rescale_add", "pallas_call.9", BODY + "mlp/fp8_rescale_add/pallas_call", ""),
        ("dequant", "kernel_7", "pallas_call.30", BODY + "mlp/nf4_dequantize/pallas_call", ""),
        ("loss", "nvjet_tst_128", "cublas-gemm.1", "", "pallas_kernels/linear_cross_entropy/reference.py:_dot"),
        ("loss", "input_reduce_fusion", "", "", "pallas_kernels/linear_cross_entropy/reference.py:scan_chunks"),
        ("optimizer", "loop_select_fusion", "", "jit(step)/vmap()/select_n", "quant/blockwise.py:quantize"),
        ("optimizer", "input_reduce_fusion_21", "", "jit(step)/reduce_sum", "optax/tree_utils/_tree_math.py:tree_sum"),
        ("optimizer", "adamw_8bit", "pallas_call.2", "jit(step)/adamw_8bit/pallas_call", ""),
        ("norm/rope/glu", "fp8_silu_glu_backward", "", "", "pallas_kernels/fp8/glu.py:rescale_glu_backward"),
        ("norm/rope/glu", "fp8_rms_norm_3", "", "", ""),
        ("norm/rope/glu", "rms_norm_forward", "pallas_call.8", "jit(step)/rms_norm_forward/pallas_call", ""),
        ("norm/rope/glu", "add_rms_norm_backward", "", "", ""),
        ("norm/rope/glu", "rope_qkv", "", "", ""),
        ("norm/rope/glu", "glu_backward", "", "", ""),
        ("norm/rope/glu", "silu_glu", "pallas_call.9", BODY + "mlp/silu_glu/pallas_call", ""),
        ("norm/rope/glu", "kernel_1", "pallas_call.9", BODY + "attention/rope_qkv_norm_backward/pallas_call", ""),
        ("GEMM", "quantised_matvec", "", "", ""),
        ("loss", "cross_entropy_gradient", "", "", ""),
        ("copies", "uninitialised", "", "", ""),
        ("norm/rope/glu", "input_reduce_fusion_7", "", BODY + "add", "pallas_kernels/rms_norm/__init__.py:rms_norm"),
        ("norm/rope/glu", "input_concatenate_fusion", "", BODY, "pallas_kernels/rope/__init__.py:apply_rope"),
        ("copies", "MemcpyD2D", "copy.3", "", ""),
        ("copies", "MemcpyH2D", "dynamic-slice-start.1", "", ""),
        ("copies", "Memset", "", "", ""),
        ("copies", "loop_dynamic_update_slice_fusion_18", "", BODY, "quant/lora_linear.py:lora"),
        ("copies", "loop_dynamic_slice_fusion_4", "fusion-start.43", BODY + "dynamic_slice", ""),
        ("copies", "loop_broadcast_fusion_6", "", "jit(step)/jvp()/broadcast_in_dim", ""),
        ("copies", "input_concatenate_fusion_3", "", BODY + "mlp/concatenate", "quant/lora_linear.py:lora_linear"),
        ("copies", "wrapped_transpose", "", "", ""),
        ("copies", "copy_53", "", "", ""),
        ("other", "loop_add_fusion_2", "", BODY + "mlp/add", "models/decoder.py:DecoderLayer.__call__"),
        ("other", "wrapped_add", "", "", ""),
    ],
)  # fmt: skip
def test_kernels_by_the_names_xla_and_the_libraries_give_them(kind, name, hlo_op, scope, at):
    frames = [*([HERE + at if not at.startswith("optax") else "/opt/" + at] if at else []), STEP, BENCH]
    assert classify(name, hlo_op, scope, frames) == kind


MS = 1e6  # nanoseconds
PRODUCT = 2 * 1024 * 1536 * 1152


def _events(step: float):
    """A step of 10 ms: a product, decoding, a fusion, half of it beside a copy, then nothing for a while."""
    at = lambda name, op, start, ms, **more: Event(name, op, "", step + start * MS, ms * MS, **more)  # noqa: E731
    return [
        at("nvjet_tst_256", "cublas-gemm.5", 0, 4),
        at("nf4_dequantize_double", "pallas_call.31", 4, 1),
        at("loop_multiply_fusion_3", "", 5, 3),
        at("MemcpyD2D", "", 6.5, 2, copied=1000),
        at("Memset", "", 9.5, 0.5),
    ]


def test_rows_idle_and_overlap_add_up_to_the_step():
    speeds = Speeds(peak=1e12, sustained=0.5e12, copy=1e9)
    profile = summarise(_events(0) + _events(10 * MS), 2, program=Program(TEXT), lora_width=64, speeds=speeds)
    rows = {row.name: row for row in profile.rows}
    assert {name: row.milliseconds for name, row in rows.items()} == pytest.approx(
        {"GEMM": 4, "dequant": 1, "norm/rope/glu": 3, "copies": 2.5}
    )
    assert profile.step == pytest.approx(10)
    assert sum(row.milliseconds for row in profile.rows) + profile.idle - profile.overlap == pytest.approx(10)
    assert (profile.idle, profile.overlap) == pytest.approx((1.0, 1.5))
    assert rows["GEMM"].bound == pytest.approx(1e3 * PRODUCT / 1e12)
    assert rows["GEMM"].sustained == pytest.approx(2 * rows["GEMM"].bound)
    assert rows["dequant"].bound == pytest.approx(1e3 * 512 * 32 * (161 + 4 / 256) / 1e9, rel=1e-5)
    assert (rows["norm/rope/glu"].bound, rows["norm/rope/glu"].known) == (None, 0)  # its bytes are not known
    assert rows["copies"].bound == pytest.approx(1e3 * 2000 / 1e9) and rows["copies"].known == pytest.approx(0.8)
    text = "\n".join(lines(profile))
    assert "GEMM                4.00  40.0%" in text and "nvjet_tst" in text
    assert as_record(profile)["classes"]["GEMM"]["launches"] == 1


def test_narrow_products_are_loras_and_unknown_cards_have_no_bound():
    program = Program(TEXT)
    events = [Event("nvjet_1", "gemm_fusion_dot.7", "", 0, MS), Event("nvjet_2", "cublas-gemm.5", "", MS, MS)]
    rows = {row.name: row for row in summarise(events, 1, program=program, lora_width=64).rows}
    assert {name: row.milliseconds for name, row in rows.items()} == {"LoRA": 1, "GEMM": 1}
    assert rows["GEMM"].bound is None and rows["GEMM"].sustained is None


def test_of_an_instructions_kernels_the_longest_has_its_work():
    program, speeds = Program(TEXT), Speeds(peak=1e12)
    product = Event("nvjet_2", "cublas-gemm.5", "", 0, 3 * MS)
    alone, *_ = summarise([product], 1, program=program, speeds=speeds).rows
    both = summarise([product, Event("Memset", "cublas-gemm.5", "", 3 * MS, MS)], 1, program=program, speeds=speeds)
    rows = {row.name: row for row in both.rows}
    assert rows["GEMM"].bound == alone.bound > 0 and rows["copies"].milliseconds == 1


def test_a_floor_stands_in_where_kernels_do_not_tell_their_work():
    event = Event("cudnn_generated_fort_native_sdpa", "", "", 0, MS)
    speeds = Speeds(peak=1e12)
    (row,) = summarise([event], 1, speeds=speeds, floors={"attention": 5e8}).rows
    assert (row.bound, row.known, row.sustained) == (pytest.approx(0.5), 1, None)


def test_an_empty_profile_is_a_table_of_nothing():
    profile = summarise([], 3)
    assert profile.rows == [] and profile.step == 0 and lines(profile)


def test_busy_time_counts_overlaps_once():
    events = [Event("a", "", "", 0, 4), Event("b", "", "", 1, 1), Event("c", "", "", 3, 3), Event("d", "", "", 9, 1)]
    assert busy(events) == 7
