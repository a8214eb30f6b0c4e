"""What vLLM asks of an adapter folder: its rules for LoRA, so that a refusal is met here and not when serving.

Rules of vLLM 0.33, read from its adapter reader (PEFTHelper and LoRAModel).
"""

from collections.abc import Collection, Mapping
from typing import Any

from fastft_jax.convert.peft.names import parse_name

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what `vllm serve --max-lora-rank` takes; 16 unless given
DEFAULT_MAX_LORA_RANK = 16
_WHOLE_MODULES = ("classifier", "score")  # the only modules_to_save that it takes
_REFUSED_KINDS = {
    "lora_magnitude_vector": "DoRA's magnitudes",
    "lora_B.bias": "a bias of lora_B",
    "base_layer.bias": "a trained bias",
    "bias": "a trained bias",
    "token_adapter.trainable_tokens_delta": "trained tokens",
}
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def vllm_refusals(
    config: Mapping[str, Any], tensors: Collection[str], max_lora_rank: int = MAX_LORA_RANKS[-1]
) -> list[str]:
    """Why vLLM would refuse the adapter of this adapter_config.json with tensors of these names, a line a reason.

    An empty list means that it serves it, given `--max-lora-rank` of at least `serving_rank(config)`. max_lora_rank is
    what the server was started with.
    """
    found = []
    rank = largest_rank(config)
    if rank > max_lora_rank:
        found.append(f"rank {rank} is more than max_lora_rank={max_lora_rank}")
    if config.get("use_dora"):
        found.append("use_dora=True: vLLM has no DoRA; merge the adapter instead")
    if config.get("lora_bias"):
        found.append("lora_bias=True: vLLM has no bias in LoRA")
    if config.get("bias", "none") != "none":
        found.append(f"bias={config['bias']!r}: vLLM serves the base's own biases")
    whole = [m for m in config.get("modules_to_save") or () if m.rpartition(".")[2] not in _WHOLE_MODULES]
    if whole:
        found.append(f"modules_to_save={whole}: vLLM has no modules trained whole; merge the adapter instead")
    if config.get("trainable_token_indices"):
        found.append("trainable_token_indices: vLLM has no tokens of an adapter's own")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_INITS_THAT_CHANGE_THE_BASE):
        found.append(f"init_lora_weights={init!r}: the adapter belongs to a changed base")
    return found or _refused_tensors(tensors)


def _refused_tensors(tensors: Collection[str]) -> list[str]:
    """Tensors that its reader has no place for, the first of each kind; for a config that does not mention them."""
    found: dict[str, str] = {}
    for name in sorted(tensors):
        parsed = parse_name(name)
        if parsed is None:
            found.setdefault("unknown", f"{name!r} is not a name that it knows")
        elif parsed.kind in _REFUSED_KINDS:
            found.setdefault(parsed.kind, f"{name!r} is {_REFUSED_KINDS[parsed.kind]}")
        elif parsed.kind == "weight":
            found.setdefault(parsed.kind, f"{name!r} is a module trained whole")
    return list(found.values())


def largest_rank(config: Mapping[str, Any]) -> int:
    """The largest rank of any module of the adapter."""
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def serving_rank(config: Mapping[str, Any]) -> int | None:
    """The `--max-lora-rank` to start vLLM with for this adapter; None where none is large enough."""
    return next((rank for rank in MAX_LORA_RANKS if rank >= largest_rank(config)), None)
