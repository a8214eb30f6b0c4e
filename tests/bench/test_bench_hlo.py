"""Reading a compiled program's text: lines as XLA 0.11 prints them for an H200, shortened."""

import jax
import jax.numpy as jnp

from fastft_jax.bench.hlo import Program

TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/fastft_jax/models/mlp.py"
2 "/home/me/fastft_jax/pallas_kernels/glu/__init__.py"

FunctionNames
1 "GatedMLP.__call__"
2 "silu_glu"

FileLocations
1 {file_name_id=1 function_name_id=1 line=24 end_line=24 column=31 end_column=50}
2 {file_name_id=2 function_name_id=2 line=12 end_line=12 column=11 end_column=60}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%gemm_fusion_dot_general.46_computation (parameter_0.5: bf16[1024,1152], parameter_1.5: bf16[1536,1152]) -> bf16[1024,1536] {
  %parameter_0.5 = bf16[1024,1152]{1,0} parameter(0), metadata={scheduling_name="parameter_0.5"}
  %parameter_1.5 = bf16[1536,1152]{1,0} parameter(1), metadata={scheduling_name="parameter_1.5"}
  ROOT %dot_general.44 = bf16[1024,1536]{1,0} dot(%parameter_0.5, %parameter_1.5), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%gemm_fusion_dot.7_computation (parameter_0.6: bf16[1024,8,136], parameter_1.6: bf16[64,8,136]) -> f32[8,1024,64] {
  %parameter_0.6 = bf16[1024,8,136]{2,1,0} parameter(0)
  %parameter_1.6 = bf16[64,8,136]{2,1,0} parameter(1)
  ROOT %dot.27 = f32[8,1024,64]{2,1,0} dot(%parameter_0.6, %parameter_1.6), lhs_batch_dims={1}, lhs_contracting_dims={2}, rhs_batch_dims={1}, rhs_contracting_dims={2}
}

ENTRY %main.1 (x.1: bf16[1024,1152], w.1: bf16[1536,1152]) -> bf16[1024,1536] {
  %x.1 = bf16[1024,1152]{1,0} parameter(0)
  %w.1 = bf16[1536,1152]{1,0} parameter(1)
  %c.1 = u8[49152,32]{1,0} parameter(2)
  %s.1 = u8[49152]{0} parameter(3)
  %gemm_fusion_dot_general.46 = bf16[1024,1536]{1,0} fusion(%x.1, %w.1), kind=kCustom, calls=%gemm_fusion_dot_general.46_computation, metadata={op_name="jit(step)/attention/dot_general" deduplicated_name="gemm_fusion_dot_general.31" stack_frame_id=1}
  %gemm_fusion_dot.7 = f32[8,1024,64]{2,1,0} fusion(%x.1, %w.1), kind=kCustom, calls=%gemm_fusion_dot.7_computation
  %cublas-gemm.5 = (bf16[1024,1536]{1,0}, s8[33554432]{0}) custom-call(%x.1, /*index=1*/%w.1), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  %loop_multiply_fusion.3 = bf16[1024,1536]{1,0} fusion(%x.1), kind=kLoop, calls=%fused_multiply, metadata={op_name="jit(step)/mlp/mul" stack_frame_id=2}
  %pallas_call.31 = bf16[27648,64]{1,0} custom-call(%c.1, %s.1, %x.1), custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{}: (2, {})}, metadata={op_name="jit(step)/mlp/nf4_dequantize_double/pallas_call"}, backend_config={debug = false, grid_x = 512 : i32, grid_y = 1 : i32}
  %pallas_call.32 = bf16[1024,1216]{1,0} custom-call(%x.1), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/rms_norm_forward/pallas_call"}
  %pallas_call.33 = bf16[1024,1152]{1,0} custom-call(%x.1), custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{}: (0, {})}, metadata={op_name="jit(step)/rope/pallas_call"}
  ROOT %copy.1 = bf16[1024,1536]{1,0:S(5)} copy(%gemm_fusion_dot_general.46)
}
"""  # noqa: E501


def test_flops_of_products_inside_fusions_split_along_k_and_in_cublas_calls():
    program = Program(TEXT)
    dots = {name: program.dot(program.instructions[name]) for name in program.instructions}
    full = (2 * 1024 * 1536 * 1152, 1024, "bf16")
    assert dots["gemm_fusion_dot_general.46"] == full
    assert dots["cublas-gemm.5"] == full
    assert dots["gemm_fusion_dot.7"] == (2 * 1024 * 64 * 8 * 136, 64, "bf16")
    assert dots["loop_multiply_fusion.3"] is None and dots["copy.1"] is None


def test_bytes_of_pallas_kernels_are_known_unless_they_write_in_place():
    program = Program(TEXT)
    size = lambda name: program.kernel_bytes(program.instructions[name])  # noqa: E731
    assert size("pallas_call.32") == 2 * 1024 * (1152 + 1216)
    assert size("pallas_call.33") is None
    assert size("loop_multiply_fusion.3") is None
    # 512 programs of 32 blocks: 32 bytes of codes, one of absmax, a 256th of a float32 scale, 64 bfloat16 weights
    assert size("pallas_call.31") == 512 * 32 * (32 + 1 + 4 / 256 + 128)
    program = Program(TEXT.replace("grid_x = 512 : i32, grid_y = 1", "grid_x = 512 : i32, grid_y = 8"))  # of 8 experts
    assert size("pallas_call.31") == 8 * 512 * 32 * (32 + 1 + 4 / 256 + 128)


def test_frames_lead_from_the_innermost_call_outwards():
    program = Program(TEXT)
    frames = program.frames(program.instructions["loop_multiply_fusion.3"])
    assert [frame.rsplit("/", 1)[1] for frame in frames] == ["__init__.py:silu_glu", "mlp.py:GatedMLP.__call__"]
    assert program.frames(program.instructions["copy.1"]) == []


def test_kernels_are_found_by_their_own_name_and_by_the_one_they_share():
    by_kernel = Program(TEXT).by_kernel
    assert by_kernel["gemm_fusion_dot_general_46"] is by_kernel["gemm_fusion_dot_general_31"]
    assert by_kernel["cublas_gemm_5"].name == "cublas-gemm.5"


def test_this_version_of_xla_still_prints_what_is_read():
    """Products, their FLOPs and the call stack, from a program compiled here."""

    def product(x, w):
        return jnp.tanh(x @ w.T)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((48, 80), (96, 80))]
    program = Program(jax.jit(product).lower(*shapes).compile().as_text())
    dots = {name: program.dot(i) for name, i in program.instructions.items() if i.opcode in ("dot", "custom-call")}
    assert (2 * 48 * 96 * 80, 48, "f32") in dots.values()
    assert any("test_bench_hlo.py:" in f for i in program.instructions.values() for f in program.frames(i))
