"""From a step to a compiled program: XLA's options for it, what it needs of the card, and which policy fits."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from fastft_jax.models.remat import AUTO_ORDER, Policy, table_of
from fastft_jax.trainers.step import LossOptions, make_train_step

MEMORY_SHARE = 0.95  # of the device memory: what a program chosen by "auto" may need, the rest is the driver's


def compile_step(
    definition: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    options: LossOptions,
    arguments: tuple,
    cuda_graphs: bool = True,
) -> tuple[str | Policy, Any]:
    """(policy, the step compiled ahead of time for `arguments`), trainable leaves and optimizer state donated.

    options.policy "auto" becomes the fastest one that fits the device's memory. Without `cuda_graphs` every kernel is
    launched by itself, a little slower, and a profiler can tell which instruction it belongs to.
    """

    def make(policy):
        step = make_train_step(definition, optimizer, options._replace(policy=policy))
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments)
        return lowered.compile(compiler_options=compiler_options(policy, jax.default_backend(), cuda_graphs))

    stats = jax.local_devices()[0].memory_stats() or {}
    limit = int(stats["bytes_limit"] * MEMORY_SHARE) if "bytes_limit" in stats else None
    return compile_fitting(make, options.policy, limit)


def compiler_options(policy: str | Policy, platform: str, cuda_graphs: bool = True) -> dict[str, str | bool | int]:
    """XLA's options for a step under a remat policy.

    Every product is cuBLAS's: no Triton candidates are compiled to be tried (the 8B step compiles in 4 to 8 s instead
    of 13), and XLA can let a product write into the buffer of kept values itself, which it can only while that product
    is a library call. The ways to compute a product are timed, but their results not compared (level 3), which would
    take another copy of the logits: more than a lean step itself. Copies to and from the host stay out of CUDA graphs:
    inside one they run in line with the kernels, outside on streams of their own; 667 ms a step of an 8B at 2 x 4096
    against 712.
    """
    if platform != "gpu":
        return {}
    options: dict[str, str | bool | int] = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 3}
    if not cuda_graphs:
        options["xla_gpu_enable_command_buffer"] = ""
    elif "offload" in table_of(policy).values():
        options["xla_gpu_enable_command_buffer"] = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN"
    return options


def compile_fitting(make: Callable[[str | Policy], Any], policy: str | Policy, limit: int | None) -> tuple[Any, Any]:
    """(policy, compiled step). "auto" takes the fastest policy whose program fits `limit` bytes, by the compiler's own
    count of arguments, outputs and temporaries; the last resort is taken whether it fits or not.

    `make(policy)` lowers and compiles; nothing is allocated.
    """
    if policy != "auto":
        return policy, make(policy)
    for name in AUTO_ORDER:
        compiled = make(name)
        if limit is None or program_bytes(compiled) <= limit:
            break
    return name, compiled


def program_bytes(compiled: Any) -> int:
    """Device memory that a compiled program needs while it runs, donated arguments counted once."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
