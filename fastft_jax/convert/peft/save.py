"""The adapter alone, as an export: PEFT's folder with the tokenizer and a card, read back before it gets its name."""

import warnings
from pathlib import Path
from typing import Any

from fastft_jax.convert.atomic import atomic_folder, write_bytes
from fastft_jax.convert.model_card import model_card
from fastft_jax.convert.model_files import refuse_to_replace, write_tokenizer
from fastft_jax.convert.peft import read_adapter
from fastft_jax.convert.peft.vllm import vllm_refusals
from fastft_jax.errors import ConfigError


def save_adapter(
    model: Any, folder: str | Path, tokenizer: Any | None = None, *, overwrite: bool = False, verify: bool = True
) -> str:
    """Write adapter, tokenizer and README.md; what was written, in a line. Warns when vLLM would refuse the adapter.

    Raises ConfigError for a model without an adapter, CheckpointError as `verify_adapter` does, and for a full disk or
    a target that is not empty.
    """
    if model.peft_config is None:
        raise ConfigError("this model has no adapter to save; call FastLanguageModel.get_peft_model first")
    final = Path(folder).expanduser().absolute()
    refuse_to_replace(final, model.base_folder, model.adapter_path)
    with atomic_folder(final, overwrite=overwrite) as draft:
        model.save_pretrained(draft)
        write_tokenizer(draft, Path(model.adapter_path or model.base_folder), tokenizer)
        said = model.verify_adapter(draft) if verify else "not read back"
        refusals = vllm_refusals(*read_adapter(draft))
        write_bytes(draft / "README.md", model_card(model, "lora").encode())
    if refusals:
        warnings.warn(f"vLLM would not serve this adapter ({'; '.join(refusals)}): export it merged", stacklevel=2)
    return f"{final}: {said.replace(str(draft), final.name)}"
