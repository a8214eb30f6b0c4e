"""What several tests of exports use."""

import pytest


@pytest.fixture(scope="module")
def llama_cpp():
    """`test_gguf_llama_cpp`, for its client of llama.cpp; skips where llama-cpp-python is not installed."""
    pytest.importorskip("llama_cpp")
    import test_gguf_llama_cpp

    return test_gguf_llama_cpp
