"""What the documentation says is what the code does."""

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


@pytest.mark.parametrize("word", ["FULL_TOKS", "NONE_TOKS", "LOAD s", "FIRST s"])
def test_the_readme_has_no_blanks_left(repo, word):
    assert word not in (repo / "README.md").read_text()
