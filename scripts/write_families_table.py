"""Writes the README's table of families from the code: `python scripts/write_families_table.py [--check]`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from fastft_jax.families import family_table, markdown  # noqa: E402

PAGE = ROOT / "README.md"
BEGIN, END = "<!-- families: written by scripts/write_families_table.py -->\n", "<!-- end of families -->"


def page(text: str) -> str:
    """The README with its table as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{PAGE} has no region between {BEGIN.strip()!r} and {END!r}")
    return f"{before}{BEGIN}\n{markdown(family_table())}\n\n{END}{after}"


if __name__ == "__main__":
    now = PAGE.read_text(encoding="utf-8")
    if "--check" not in sys.argv:
        PAGE.write_text(page(now), encoding="utf-8")
    elif page(now) != now:
        sys.exit(f"{PAGE}'s families are not what the code says; run python scripts/write_families_table.py")
