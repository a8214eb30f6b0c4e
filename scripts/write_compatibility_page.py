"""Writes docs/compatibility.md from what the tests measured: `python scripts/write_compatibility_page.py RECORDS`.

`make compatibility` runs the tests and this.
"""

import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from fastft_jax.models.families.registry import FAMILIES  # noqa: E402

PAGE = ROOT / "docs" / "compatibility.md"
FORMATS = {
    "peft": "adapter in PEFT",
    "merged_16bit": "merged in transformers",
    "merged_4bit": "merged_4bit in transformers",
    "gguf": "GGUF in llama.cpp",
    "gguf:lora": "GGUF adapter in llama.cpp",
    "gguf in": "GGUF as a base here",
}
HEAD = """# Compatibility

What every family becomes in every format, and what the format's own client then computes. For each cell the tests make
a tiny random model of the family, put an adapter on every linear layer, export it, load the export in the client, and
compare logits: the figure is the largest difference from the live model's, in float32, rounded up to one digit, of
logits between 0.3 and 30.

- **adapter in PEFT**: `peft.PeftModel` on transformers' model of the base.
- **merged in transformers**: `merged_16bit`, written in float32 here, so that nothing is rounded off; in bfloat16 what
  is added is the format's rounding, whose bound every export checks ([export](export.md#read-back)).
- **merged_4bit in transformers**: with bitsandbytes, against the merged model of the column before with the folder's
  matrices in it, decoded; each of them is near enough to be the same one in NF4. What the 4-bit grid itself loses is a
  property of the weights, and every export prints it.
- **GGUF in llama.cpp**, **GGUF adapter in llama.cpp** (`--lora` on the base's GGUF): float32 files. llama.cpp looks
  GELU up in a table of float16, so Gemma's and Phi-2's figures are larger. Quantised files are those of llama.cpp's
  own quantiser byte for byte ([GGUF](gguf.md)).
- **GGUF as a base here**: `from_pretrained("model.gguf")` of the merged float32 file.

"no" is what we or the client refuse by name, for the reason under the table; the tests ask for it and check that
nothing was written. This page is written by `make compatibility`; `make test` measures it all again and compares.
"""


def one_figure(x: float) -> str:
    """Rounded up to one figure, 0.000123 -> 2e-04: another machine's last digits change nothing."""
    if x == 0:
        return "0"
    power = math.floor(math.log10(x))
    digit = math.ceil(round(x / 10**power, 6))
    return f"{digit}e{power:+03d}" if digit < 10 else f"1e{power + 1:+03d}"


def said(cell: dict) -> str:
    """What the page says of a record."""
    return one_figure(cell["difference"]) if cell["why_not"] is None else f"no: {cell['why_not']}"


def page(records: list[dict]) -> str:
    """The page. SystemExit for a family or a format that no record is about."""
    cells = {(r["family"], r["format"]): said(r) for r in records}
    missing = [f"{family} ({form})" for family in FAMILIES for form in FORMATS if (family, form) not in cells]
    if missing:
        sys.exit(f"untested, so the page is not written: {', '.join(missing)}")
    reasons: list[str] = []
    rows = []
    for family in FAMILIES:
        row = [f"`{family}`"]
        for form in FORMATS:
            text = cells[family, form]
            if text.startswith("no: "):
                reason = text.removeprefix("no: ")
                reasons += [reason] if reason not in reasons else []
                text = f"no ({reasons.index(reason) + 1})"
            row.append(text)
        rows.append(f"| {' | '.join(row)} |")
    head = [f"| family | {' | '.join(FORMATS.values())} |", f"|{' --- |' * (len(FORMATS) + 1)}"]
    notes = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join([HEAD, *head, *rows, *(["", *notes] if notes else []), ""])


def read_page(text: str) -> dict[tuple[str, str], str]:
    """(family, format) -> what the page says, a reason's number replaced by the reason."""
    lines = text.splitlines()
    reasons = dict(line.split(". ", 1) for line in lines if line.split(". ", 1)[0].isdigit())
    cells = {}
    for line in lines:
        if line.startswith("| `"):
            family, *row = (part.strip() for part in line.strip("|").split(" | "))
            for form, cell in zip(FORMATS, row, strict=True):
                number = cell.removeprefix("no (").removesuffix(")")
                cells[family.strip("`"), form] = f"no: {reasons[number]}" if cell.startswith("no (") else cell
    return cells


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    PAGE.write_text(page([json.loads(line) for line in lines]), encoding="utf-8")
