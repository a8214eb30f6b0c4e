"""The real tokenizer among the shared inputs."""

import pytest
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tinyllama(shared_data) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(shared_data / "tokenizers" / "tinyllama")
