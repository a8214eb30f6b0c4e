"""Compiles every kernel for GPUs that are not there, and fails where more registers spill than a case says may.

    make compile-kernels                     # its own environment with the CUDA plugin, then this script
    python scripts/compile_kernels.py [--gpus H200 A100 L4] [PART ...]

Needs jax with its CUDA plugin of the same version, and `ptxas` on PATH for the counts; no GPU, driver or CUDA library.
PART: only cases whose names contain one of these. One line a kernel: registers, bytes spilled, seconds to compile.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DUMP = tempfile.TemporaryDirectory()
os.environ["JAX_PLATFORMS"] = "cpu"  # the plugin compiles without being a backend
os.environ["XLA_FLAGS"] = f"--xla_dump_to={DUMP.name} --xla_dump_emitter_re=.*"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from fastft_jax.bench.kernels import cases  # noqa: E402

# compute capability, multiprocessors, shared memory a multiprocessor and a block, memory, threads a multiprocessor
GPUS = {
    "H200": ((9, 0), 132, 233472, 232448, 150 << 30, 2048),
    "A100": ((8, 0), 108, 167936, 166912, 79 << 30, 2048),
    "L4": ((8, 9), 58, 102400, 101376, 22 << 30, 1536),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", default=[*GPUS], choices=[*GPUS])
    parser.add_argument("parts", nargs="*")
    arguments = parser.parse_args()
    bad = 0
    for gpu in arguments.gpus:
        topology = topologies.get_topology_desc(platform="cuda", target_config=target(gpu), topology="1x1x1")
        mesh = Mesh(np.array(topology.devices), ("x",))
        for case in cases(arguments.parts):
            if GPUS[gpu][0] < case.min_compute_capability:
                continue
            start = time.perf_counter()
            try:
                compile_for(mesh, case)
                found = report()
            except Exception as error:
                found = [f"FAILED {type(error).__name__}: {str(error).splitlines()[0][:200]}"]
            bad += any("FAILED" in line or int(line.split("spills ")[1]) > case.spills for line in found)
            print(f"{gpu:4s} {case.name}  {time.perf_counter() - start:.1f} s  {'; '.join(found)}", flush=True)
    return 1 if bad else 0


def compile_for(mesh: Mesh, case) -> None:
    for old in Path(DUMP.name).iterdir():
        old.unlink()
    sharding = NamedSharding(mesh, PartitionSpec())
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in case.args]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(lambda *args: case.run(*args, interpret=False)).lower(*args).compile()


def report() -> list[str]:
    """Registers and spills of each kernel in the dump, by ptxas."""
    found = []
    for path in sorted(Path(DUMP.name).glob("*.ptx")):
        text = path.read_text()
        target = re.search(r"\.target (\w+)", text)
        if target is None:
            continue
        command = ["ptxas", "-v", f"-arch={target[1]}", str(path), "-o", f"{DUMP.name}/out.cubin"]
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode:
            found.append(f"FAILED ptxas: {out.stderr.strip().splitlines()[-1]}")
        pattern = r"properties for (\S+)\n\s+.*?(\d+) bytes spill stores.*\n.*Used (\d+) registers"
        found += [
            f"{name} {used} registers, spills {spilled}" for name, spilled, used in re.findall(pattern, out.stderr)
        ]
    return found


def target(gpu: str) -> str:
    """XLA's GpuTargetConfigProto, as text; sizes that steer code generation are the card's, the rest is typical."""
    (major, minor), cores, shared, shared_block, memory, threads = GPUS[gpu]
    accelerated = "feature_extension: ACCELERATED_FEATURES" if major == 9 else ""
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
          shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_block}
          core_count: {cores} fpus_per_core: 128 clock_rate_ghz: 1.7 memory_bandwidth: 2000000000000
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          l2_cache_size: 41943040 device_memory_size: {memory} device_address_bits: 64
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }} name: "NVIDIA {gpu}"
          driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
          dnn_version: "9.10.0"
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "NVIDIA {gpu}"
    """


if __name__ == "__main__":
    sys.exit(main())
