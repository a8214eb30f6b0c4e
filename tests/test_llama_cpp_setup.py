"""scripts/setup_llama_cpp.sh: llama.cpp is built once for a machine, and nothing stops where it cannot be."""

import os
import shutil
import subprocess

import pytest

PYTHON = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
*"pip wheel"*) [ "$BUILDS" = yes ] || exit 1; while [ "$1" != -w ]; do shift; done; echo wheel >"$2/llama_cpp-1.whl" ;;
esac
"""


@pytest.fixture
def setup(repo, tmp_path):
    """`setup(clone, builds="yes", compiler=True)`: what the script says in that clone, and what it had python do."""

    def run(clone: str, builds: str = "yes", compiler: bool = True) -> tuple[str, list[str]]:
        folder, calls = tmp_path / clone, tmp_path / "calls"
        if not folder.exists():
            (folder / "scripts").mkdir(parents=True)
            (folder / ".venv" / "bin").mkdir(parents=True)
            shutil.copy(repo / "scripts" / "setup_llama_cpp.sh", folder / "scripts")
            shutil.copy(repo / "constraints.txt", folder)
            (folder / ".venv" / "bin" / "python").write_text(PYTHON)
            (folder / ".venv" / "bin" / "python").chmod(0o755)
        calls.write_text("")
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "CXX": "true" if compiler else "no-such-compiler",
            "BUILDS": builds,
            "CALLS": str(calls),
        }
        command = ["sh", str(folder / "scripts" / "setup_llama_cpp.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stderr, calls.read_text().splitlines()

    return run


def test_it_is_built_once_and_the_next_clone_finds_the_wheel(setup, tmp_path):
    said, calls = setup("one")
    assert "once for this machine" in said and ["pip wheel" in call for call in calls] == [True, False, False]
    (wheel,) = (tmp_path / ".cache" / "fastft-jax").rglob("*.whl")
    assert setup("one") == ("", [])
    said, calls = setup("two")
    assert said == "" and len(calls) == 2 and calls[0].endswith(f"-c constraints.txt {wheel}")


def test_without_a_compiler_and_after_a_failed_build_one_line_says_so_and_the_tests_skip_with_it(setup, tmp_path):
    said, calls = setup("one", compiler=False)
    reason = (tmp_path / "one" / ".venv" / "llama-cpp-missing").read_text().strip()
    assert said == f"setup: {reason}; the tests that need it will skip\n" and "no C++ compiler" in reason and not calls
    said, calls = setup("one", builds="no")
    assert "could not be built (see .venv/llama-cpp.log" in said and len(calls) == 1
    again, calls = setup("one", builds="no")  # not tried again by every make test
    assert again == said.splitlines(keepends=True)[-1] and calls == []
    (tmp_path / "one" / ".venv" / "llama-cpp-missing").unlink()
    setup("one")
    assert not (tmp_path / "one" / ".venv" / "llama-cpp-missing").exists()
