"""README.md of an exported model: base, data, settings, versions and metrics, from what the run itself recorded."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastft_jax.convert.read_back import Difference

KINDS = {
    "merged_16bit": "Merged 16-bit checkpoint",
    "merged_4bit": "Merged checkpoint in bitsandbytes NF4",
    "lora": "LoRA adapter",
}
_PACKAGES = ("fastft-jax", "jax", "transformers")
_LORA = ("r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "target_modules", "modules_to_save")


def model_card(model: Any, save_method: str, difference: Difference | None = None, run: Path | None = None) -> str:
    """The card's markdown, with the front matter that the hub reads.

    run: the training output folder, whose run.json and metrics.jsonl are quoted; None: the folder that the adapter was
    loaded from, if any. What was not recorded is left out.
    """
    run = Path(run or model.adapter_path or "/nowhere")
    recorded = _json(run / "run.json")
    config = recorded.get("config") or {}
    base = str(model.name_or_path)
    head = {"library_name": "peft" if save_method == "lora" else "transformers", "pipeline_tag": "text-generation"}
    front = [f"base_model: {json.dumps(base)}", *(f"{key}: {value}" for key, value in head.items())]
    tags = ["fastft-jax", "lora"] + ([f"base_model:adapter:{base}"] if save_method == "lora" else [])
    lines = ["---", *front, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", ""]
    lines += [f"# {KINDS[save_method]}", "", f"Made with fastft-jax from `{base}`.", ""]
    adapter = model.peft_config or {}
    lines += _table("Adapter", {key: adapter[key] for key in _LORA if adapter.get(key)})
    data = config.get("data") or {}
    lines += _table("Data", {k: data[k] for k in ("path", "name", "split", "eval_path", "eval_split") if data.get(k)})
    lines += _table("Training", {k: v for k, v in (config.get("training") or {}).items() if v is not None})
    lines += _table("Last metrics", _last_metrics(run / "metrics.jsonl"))
    if difference is not None:
        lines += ["## Read back", "", f"Compared with the model that was trained: {difference}.", ""]
    versions = ((recorded.get("environment") or {}).get("packages")) or {name: _version(name) for name in _PACKAGES}
    lines += _table("Versions", {"python": platform.python_version(), **{k: v for k, v in versions.items() if v}})
    return "\n".join(lines).rstrip() + "\n"


def _table(title: str, values: dict[str, Any]) -> list[str]:
    if not values:
        return []
    cell = lambda value: str(value).replace("|", "\\|").replace("\n", " ")  # noqa: E731
    return [f"## {title}", "", "| | |", "| --- | --- |", *(f"| {k} | {cell(v)} |" for k, v in values.items()), ""]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _last_metrics(path: Path) -> dict[str, Any]:
    """The last value of every metric that was recorded."""
    last: dict[str, Any] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            last |= json.loads(line)
    except (OSError, ValueError):
        pass
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in last.items()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
