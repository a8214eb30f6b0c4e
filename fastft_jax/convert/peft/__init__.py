"""PEFT's LoRA adapter folder, read and written: adapter_config.json and adapter_model.safetensors.

The format is what PEFT 0.21.2 writes: same keys, names, dtypes and bytes. The names are in names.py, the rules by
which target_modules selects modules in targets.py; both are also importable from here.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastft_jax.convert.atomic import atomic_folder, sync_folder, write_bytes
from fastft_jax.convert.peft.experts import is_per_expert
from fastft_jax.convert.peft.fused import fused_module, is_fused
from fastft_jax.convert.peft.names import TensorName, bias_name, current_names, lora_names, parse_name, saved_name
from fastft_jax.convert.peft.targets import (
    ALL_LINEAR,
    check_pattern,
    condense_targets,
    match_saved_modules,
    match_targets,
    require_targets,
    value_of,
)
from fastft_jax.convert.safetensors import SafetensorsFile, write_safetensors
from fastft_jax.convert.safetensors.header import parse_json_object
from fastft_jax.errors import CheckpointError, ConfigError

__all__ = [
    "ALL_LINEAR",
    "TensorName",
    "adapter_config",
    "bias_name",
    "check_pattern",
    "condense_targets",
    "lora_names",
    "match_saved_modules",
    "match_targets",
    "parse_name",
    "read_adapter",
    "require_targets",
    "saved_name",
    "unsupported",
    "value_of",
    "write_adapter",
]

CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# Keys that are read elsewhere, or that say nothing about what the adapter computes. Every other key that is set changes
# the maths as far as we know, those of later PEFT versions included.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("bias", "lora_alpha", "lora_dropout", "modules_to_save", "r", "task_type", "use_rslora", "init_lora_weights"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
    *("alpha_pattern", "rank_pattern", "use_dora", "trainable_token_indices", "lora_bias"),
    *("megatron_core", "qalora_group_size"),  # without megatron_config and use_qalora they do nothing
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # these matter through init_lora_weights
}
# PEFT draws A and B so and leaves the base alone. The other kinds (pissa, olora, corda, loftq ...) rewrite the base
# weights each time the adapter is loaded.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_SAVEABLE = ("embed_tokens", "lm_head", "norm", "tok_embeddings", "output")


def adapter_config(
    *,
    r: int,
    lora_alpha: float,
    target_modules: str | Collection[str],
    base_model_name_or_path: str | None,
    lora_dropout: float = 0.0,
    bias: str = "none",
    modules_to_save: Collection[str] | None = None,
    use_rslora: bool = False,
    layers_to_transform: int | Collection[int] | None = None,
    layers_pattern: str | Collection[str] | None = None,
    exclude_modules: str | Collection[str] | None = None,
    init_lora_weights: bool | str = True,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_dora: bool = False,
    lora_bias: bool = False,
    loftq_config: Mapping[str, int] | None = None,
    trainable_token_indices: Collection[int] | Mapping[str, Collection[int]] | None = None,
    revision: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> dict[str, Any]:
    """adapter_config.json as PEFT 0.21.2 writes it, all 41 keys.

    target_modules and exclude_modules are sets to PEFT, written in no certain order; here they are sorted, so that
    equal runs give equal bytes.
    """

    def names(value: str | Collection[str] | None) -> str | list[str] | None:
        return value if value is None or isinstance(value, str) else sorted(set(value))

    def listed(value: Any) -> Any:
        return value if value is None or isinstance(value, str | int) else list(value)

    return _DEFAULTS | {
        "alpha_pattern": dict(alpha_pattern or {}),
        "base_model_name_or_path": base_model_name_or_path,
        "bias": bias,
        "exclude_modules": names(exclude_modules),
        "init_lora_weights": init_lora_weights,
        "layers_pattern": listed(layers_pattern),
        "layers_to_transform": listed(layers_to_transform),
        "loftq_config": dict(loftq_config or {}),
        "lora_alpha": lora_alpha,
        "lora_bias": lora_bias,
        "lora_dropout": lora_dropout,
        "modules_to_save": listed(modules_to_save),
        "r": r,
        "rank_pattern": dict(rank_pattern or {}),
        "revision": revision,
        "target_modules": names(target_modules),
        "task_type": task_type,
        "trainable_token_indices": trainable_token_indices,
        "use_dora": use_dora,
        "use_rslora": use_rslora,
    }


def write_adapter(
    folder: Path | str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, overwrite: bool = False
) -> None:
    """Writes the adapter's files into `folder`, and a short model card where there is none yet.

    A new (or empty) folder appears whole or not at all. In a folder with other files only the adapter's own are
    replaced; an adapter already there is refused with CheckpointError unless `overwrite=True`. A kill at any moment
    leaves the old adapter, the new one, or (where their configs differ) a folder without a config that no reader
    accepts: never new tensors under an old config.
    """
    folder = Path(folder).expanduser()
    text = json.dumps(dict(config), indent=2, sort_keys=True).encode()
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        with atomic_folder(folder) as new:
            _write_files(new, text, config, tensors)
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} exists and is not a folder: choose another one for the adapter")
    if not overwrite and any((folder / name).exists() for name in (CONFIG, TENSORS)):
        raise CheckpointError(f"{folder} already holds an adapter: choose another folder, or ask to overwrite it")
    _write_files(folder, text, config, tensors)


def _write_files(folder: Path, text: bytes, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    # The tensors go to a second name first, so that a full disk is met before anything old is touched.
    staged = folder / f".{TENSORS}.new"
    try:
        write_safetensors(staged, tensors)
        old = folder / CONFIG
        if old.exists() and old.read_bytes() != text:
            old.unlink()
            sync_folder(folder)
        staged.rename(folder / TENSORS)
        write_bytes(folder / CONFIG, text)
        if not (folder / CARD).exists():
            write_bytes(folder / CARD, _card(config).encode())
    except OSError as error:
        raise CheckpointError(f"the adapter could not be written to {folder}: {error}") from error
    finally:
        staged.unlink(missing_ok=True)


def _card(config: Mapping[str, Any]) -> str:
    base = config.get("base_model_name_or_path") or "unknown"
    return (
        f"---\nbase_model: {json.dumps(base)}\nlibrary_name: peft\npipeline_tag: text-generation\n"
        f"tags:\n- base_model:adapter:{json.dumps(base)[1:-1]}\n- lora\n---\n\n"
        f"# LoRA adapter\n\nTrained with fastft-jax on `{base}` "
        f"(r={config.get('r')}, alpha={config.get('lora_alpha')}). "
        f"Load it with `peft.PeftModel.from_pretrained(base_model, folder)`.\n"
    )


def read_adapter(folder: Path | str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config with all 41 keys, tensors by the names that PEFT gives them today).

    CheckpointError for a folder that is no adapter, is damaged, contradicts itself, or holds pickled tensors;
    NotImplementedError naming every feature that changes what the adapter computes and is not built.
    """
    folder = Path(folder).expanduser()
    config = _read_config(folder)
    if config["peft_type"] != "LORA":
        raise CheckpointError(f"{folder}: peft_type is {config['peft_type']!r}; only LORA adapters can be loaded")
    if not (folder / TENSORS).exists():
        if (folder / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{folder} has only adapter_model.bin, a pickle: safetensors only; "
                f"convert with scripts/convert_bin_to_safetensors.py"
            )
        raise CheckpointError(f"{folder} has no {TENSORS}: the adapter is incomplete")
    file = SafetensorsFile(folder / TENSORS)
    try:
        names = current_names(file.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    missing_features = [
        feature
        for feature in unsupported(config, names)
        if not (feature.startswith("target_parameters") and (is_per_expert(config, names) or is_fused(config, names)))
    ]
    if missing_features:
        raise NotImplementedError(f"{folder}: the adapter uses {', '.join(missing_features)}; that is not supported")
    _check_tensors(file, names, config)
    return config, {name: file.read(stored) for name, stored in names.items()}


def unsupported(config: Mapping[str, Any], tensors: Collection[str]) -> list[str]:
    """What changes the adapter's maths and is not built yet, one entry a feature; empty means that nothing does."""
    found = [f"{key}={config[key]!r}" for key in sorted(config) if key not in _HARMLESS and config[key]]
    init, kinds = config.get("init_lora_weights"), {p.kind for name in tensors if (p := parse_name(name))}
    if init not in _PLAIN_INITS and not (init == "loftq" and "loftq_start_A" in kinds):
        found.append(
            f"init_lora_weights={init!r} (it changes the base weights; PEFT converts such an adapter with "
            f"save_pretrained(path_initial_model_for_weight_conversion=...))"
        )
    tokens = config.get("trainable_token_indices")
    if isinstance(tokens, dict) and set(tokens) != {"embed_tokens"}:
        found.append(f"trainable_token_indices={tokens!r} (only embed_tokens has trainable tokens)")
    for module in config.get("modules_to_save") or ():
        if not module.endswith(_SAVEABLE):
            found.append(f"modules_to_save={module!r} (only embed_tokens, lm_head and norms can be trained in full)")
    for kind, key in (
        ("lora_magnitude_vector", "use_dora"),
        ("lora_B.bias", "lora_bias"),
        ("token_adapter.trainable_tokens_delta", "trainable_token_indices"),
    ):
        if kind in kinds and not config.get(key):
            found.append(f"{key} (tensors called {kind})")
    return found


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: pass the adapter folder that holds {CONFIG}")
    try:
        raw = (folder / CONFIG).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CONFIG}: it is not an adapter, or its writing was cut off") from None
    except OSError as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error.strerror}") from error
    written = parse_json_object(raw, str(folder / CONFIG))
    if "peft_type" not in written:
        raise CheckpointError(f"{folder / CONFIG} has no peft_type: it is not a PEFT adapter's config")
    config = _DEFAULTS | {"alpha_pattern": {}, "loftq_config": {}, "rank_pattern": {}} | written
    if config["peft_type"] != "LORA":
        return config  # its other keys mean something else
    rank, alpha = config["r"], config["lora_alpha"]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
        raise CheckpointError(f"{folder / CONFIG}: r must be a positive integer, got {rank!r}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise CheckpointError(f"{folder / CONFIG}: lora_alpha must be a number, got {alpha!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        try:
            check_pattern(config[key] or {}, key)
        except ConfigError as error:
            raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    if config["bias"] not in ("none", "all", "lora_only"):
        raise CheckpointError(f"{folder / CONFIG}: bias must be none, all or lora_only, got {config['bias']!r}")
    return config


def _check_tensors(file: SafetensorsFile, names: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Every name is PEFT's, every A has its B of the same rank, and that rank is the one that the config gives it."""
    if not file.tensors:
        raise CheckpointError(f"{file.path} holds no tensors")
    shapes, all_experts = {}, set()
    for name, stored in names.items():
        parsed = parse_name(name)
        if parsed is None:
            raise CheckpointError(f"{file.path}: {stored!r} is not a name that PEFT gives to a tensor of an adapter")
        shapes[parsed] = file.tensors[stored].shape
        if fused_module(name):
            all_experts.add(parsed.module)
    for module, kind in shapes:
        if not kind.startswith(("lora_A", "lora_B.weight", "lora_embedding_")):
            continue
        first, second = (
            ("lora_embedding_A", "lora_embedding_B")
            if "embedding" in kind
            else (
                "lora_A.weight",
                "lora_B.weight",
            )
        )
        a, b = shapes.get(TensorName(module, first)), shapes.get(TensorName(module, second))
        if a is None or b is None:
            there = (second if a is None else first).removesuffix(".weight")
            raise CheckpointError(f"{file.path}: {module} has {there} alone")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
            raise CheckpointError(
                f"{file.path}: {module} has lora_A {list(a)} and lora_B {list(b)}, not [r, in], [out, r]"
            )
        rank = value_of(config["rank_pattern"], module, config["r"])
        if a[0] % rank if module in all_experts else a[0] != rank:
            by = "its rank_pattern says" if rank != config["r"] else "the config says"
            raise CheckpointError(f"{file.path}: {module} has rank {a[0]}, {by} r={rank}")
