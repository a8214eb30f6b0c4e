"""Lowering a kernel is quick: MLIR does not search for a Python module of Triton's dialect at every operation."""

import sys

from cuda_lowering import cuda_text, kernels

from fastft_jax.pallas_kernels.glu.cases import CASES


def test_no_module_is_searched_for_while_a_kernel_is_lowered():
    searched = []

    class Finder:
        def find_spec(self, name, path=None, target=None):
            searched.append(name)

    text = cuda_text(CASES[0])  # imports what it needs
    sys.meta_path.insert(0, Finder())
    try:
        assert kernels(cuda_text(CASES[1])) == kernels(text) == 1
    finally:
        del sys.meta_path[0]
    assert not [name for name in searched if name.endswith((".tt", "jaxlib"))]
