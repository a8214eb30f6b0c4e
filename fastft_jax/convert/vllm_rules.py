"""What vLLM refuses to serve as a LoRA adapter, by its adapter_config.json.

The rules are those of vLLM 0.33's reader (`PEFTHelper.validate_legal`, `LoRAModel.from_local_checkpoint`); ranks are
limited by its option --max-lora-rank, 16 unless given.
"""

from collections.abc import Collection, Mapping
from typing import Any

MAX_RANK = 512  # the largest value that --max-lora-rank takes
_SERVED_WHOLE = ("classifier", "score")
_INITS = ("pissa", "olora", "corda", "loftq")


def vllm_refusals(config: Mapping[str, Any], tensors: Collection[str], max_lora_rank: int = MAX_RANK) -> list[str]:
    """The reasons, one a rule; empty when it would be served with --max-lora-rank `max_lora_rank`.

    tensors: the names in the adapter's file; trained biases and whole modules are known by them, too.
    """
    found = []
    whole = [name for name in config.get("modules_to_save") or () if name not in _SERVED_WHOLE]
    if whole:
        found.append(f"modules_to_save={whole}")
    for key, plain in (("use_dora", False), ("lora_bias", False), ("bias", "none"), ("trainable_token_indices", None)):
        value = config.get(key, plain)
        if value and value != plain:
            found.append(f"{key}={value!r}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_INITS):
        found.append(f"init_lora_weights={init!r}")
    rank = max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()])
    if rank > max_lora_rank:
        found.append(f"rank {rank} is above its max_lora_rank {max_lora_rank}")
    if not found and (extra := [name for name in tensors if ".lora_" not in name]):
        found.append(f"tensor {extra[0]!r}")
    return found
