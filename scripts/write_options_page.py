"""Writes docs/options.md from the option classes themselves: `python scripts/write_options_page.py [--check]`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from fastft_jax.config import SECTIONS, TOKENS  # noqa: E402

PAGE = ROOT / "docs" / "options.md"
HEAD = """# Options

Every option of a run's YAML file, section by section. `python -m fastft_jax.sft --config FILE section.key=value`
changes single ones, and `--dry-run` prints them all with their origin. In Python the sections are the arguments of
`FastLanguageModel.from_pretrained`, `FastLanguageModel.get_peft_model` and `SFTConfig`; the options of `data` that say
how rows become tokens are `SFTConfig`'s there.

This page is written by `scripts/write_options_page.py`.
"""


def page() -> str:
    parts = [HEAD]
    training = SECTIONS["training"].model_fields
    for section, options in SECTIONS.items():
        fields = {key: f for key, f in options.model_fields.items() if not (section == "training" and key in TOKENS)}
        if section == "data":
            fields |= {key: training[key] for key in TOKENS}
        summary = (options.__doc__ or "").strip().splitlines()[0]
        parts.append(f"## {section}\n\n{summary}\n\n| option | default | meaning |\n| --- | --- | --- |")
        parts += [_row(key, field) for key, field in fields.items()]
        parts.append("")
    return "\n".join(parts)


def _row(key: str, field) -> str:
    default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{key}` | {default} | {meaning} |"


def _yaml(value) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE} is not what the options say; run python scripts/write_options_page.py")
