"""What the documentation says is what the code does."""

import json
import re
import runpy

import pytest


def test_the_options_page_is_what_the_option_classes_say(repo):
    script = runpy.run_path(str(repo / "scripts" / "write_options_page.py"))
    assert (repo / "docs" / "options.md").read_text() == script["page"](), "run python scripts/write_options_page.py"


def test_the_readme_config_is_valid(repo, tmp_path):
    from fastft_jax.config import load_config

    (example,) = re.findall(r"```yaml\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL)
    (tmp_path / "config.yaml").write_text(example)
    config, _ = load_config(tmp_path / "config.yaml")
    assert config.lora.r == 32


def test_links_of_the_documentation_lead_somewhere(repo):
    for page in [repo / "README.md", *repo.glob("*/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_speeds_in_the_readme_are_recorded_ones(repo):
    """Every row of the table is the newest record of that policy, rounded."""
    text = (repo / "README.md").read_text()
    records = [json.loads(line) for line in (repo / "benchmarks" / "steps.jsonl").read_text().splitlines()]
    plain = {"batch": 2, "seq": 4096, "packed": False, "compute_dtype": None}
    newest = {r["policy"]: r for r in records if plain.items() <= r.items()}
    rows = re.findall(r"\| `(\w+)` \| ([\d,]+) \((.*?) to (.*?)\) \| ([\d.]+) GiB \|", text)
    assert {name for name, *_ in rows} == newest.keys()
    for name, *speeds, memory in rows:
        record = newest[name]
        recorded = (record["tokens_per_second"], *record["tokens_per_second_range"])
        assert [int(number.replace(",", "")) for number in speeds] == [round(x) for x in recorded]
        assert float(memory) == round(record["peak_memory_bytes"] / 2**30, 1)


def test_the_speeds_beside_unsloths_are_recorded_ones(repo):
    """Every row is the newest call in which both were measured, rounded, and says how the two compare."""
    text = (repo / "docs" / "performance.md").read_text().split("## Beside Unsloth")[1].split("\n## ")[0]
    newest = {}
    for line in (repo / "benchmarks" / "peers.jsonl").read_text().splitlines():
        record = json.loads(line)
        newest.setdefault(record["model"], {}).setdefault(record["call"], {})[record["who"]] = record

    def cells(record):
        if "error" in record:
            return ["failed", ""]
        median, low, high = (f"{x:,.0f}" for x in (record["tokens_per_second"], *record["tokens_per_second_range"]))
        return [f"{median} ({low} to {high})", f"{record['peak_memory_bytes'] / 2**30:.1f}"]

    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\| [A-Z].*-.*\|$", text, re.M)
    ]
    assert {name.lower() for name, *_ in rows} == newest.keys()
    for name, *found in rows:
        calls = [pair for pair in newest[name.lower()].values() if len(pair) == 2]
        theirs, ours = calls[-1]["unsloth"], calls[-1]["fastft-jax"]
        speed, memory = "", ""
        if "error" not in theirs:
            speed = f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.2f}"
            memory = f"{ours['peak_memory_bytes'] / theirs['peak_memory_bytes']:.0%}"
        assert found == [*cells(theirs), *cells(ours), speed, memory], name


def test_the_compatibility_page_has_every_family_in_every_format_and_nothing_untested(repo):
    from fastft_jax.models.families.registry import FAMILIES

    script = runpy.run_path(str(repo / "scripts" / "write_compatibility_page.py"))
    text = (repo / "docs" / "compatibility.md").read_text()
    cells = script["read_page"](text)
    assert cells.keys() == {(family, form) for family in FAMILIES for form in script["FORMATS"]}, "make compatibility"
    assert all(re.fullmatch(r"0|\de-\d\d|no: .+", cell) for cell in cells.values()) and "untested" not in text
    assert text.startswith(script["HEAD"])


def test_the_compatibility_page_is_not_written_without_a_measurement_of_every_cell(repo):
    script = runpy.run_path(str(repo / "scripts" / "write_compatibility_page.py"))
    assert [script["one_figure"](x) for x in (1.01e-6, 2e-3, 0.96, 0.0)] == ["2e-06", "2e-03", "1e+00", "0"]
    with pytest.raises(SystemExit, match=r"untested, so the page is not written: llama \(merged_16bit\), "):
        script["page"]([{"family": "llama", "format": "peft", "difference": 1e-5, "why_not": None}])
