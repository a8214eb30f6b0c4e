#!/bin/sh
# Make .venv and install fastft-jax into it, with the extras given (such as: test) and, where an NVIDIA GPU is present,
# with cuda. Does nothing when that is done already and neither pyproject.toml nor constraints.txt has changed since.
#
#   sh scripts/setup_venv.sh [extras]
#
# PYTHON=/path/to/python chooses the interpreter; else any Python >= 3.12 that really runs is found, 3.12 first.
set -eu
cd "$(dirname "$0")/.."

extras="${1:-}"
if nvidia-smi -L >/dev/null 2>&1; then
    extras="${extras:+$extras,}cuda"
fi
stamp=".venv/installed-${extras:-base}"
now="$(cat pyproject.toml constraints.txt | cksum)"
# What was installed with more extras serves those who ask for fewer
for done in "$stamp" ".venv/installed-test${extras:+,$extras}"; do
    if [ -f "$done" ] && [ "$(cat "$done")" = "$now" ] && .venv/bin/python -c "" >/dev/null 2>&1; then
        exit 0
    fi
done

say() { echo "setup: $*" >&2; }

# Names on PATH may be shims that fail when run, so an interpreter counts only when it runs and says its version.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]) if sys.version_info >= (3, 12) else sys.exit(1)' 2>/dev/null
}

candidates() {
    for name in python3.12 python3.13 python3.14 python3 python; do
        command -v "$name" || true
    done
    for place in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin /usr/bin /usr/local/bin /opt/*/bin /opt/homebrew/bin \
        "$HOME"/.local/bin "$HOME"/.local/share/uv/python/*/bin "$HOME"/.asdf/installs/python/*/bin \
        "$HOME"/.local/share/mise/installs/python/*/bin "$HOME"/*conda*/bin "$HOME"/miniforge*/bin; do
        for file in "$place"/python3.12 "$place"/python3.13 "$place"/python3.14 "$place"/python3; do
            if [ -x "$file" ]; then echo "$file"; fi
        done
    done
    uv python find --no-python-downloads '>=3.12' 2>/dev/null || true
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        if version_of "$PYTHON" >/dev/null; then echo "$PYTHON"; fi
        return 0
    fi
    best="" best_version=""
    # A here-document, not a pipe, so that the variables outlive the loop
    while IFS= read -r file; do
        version="$(version_of "$file")" || continue
        if [ "$version" = 3.12 ]; then echo "$file"; return 0; fi
        if [ -z "$best" ] || { [ "$version" = 3.13 ] && [ "$best_version" != 3.13 ]; }; then
            best="$file" best_version="$version"
        fi
    done <<END
$(candidates)
END
    echo "$best"
}

if [ -x .venv/bin/python ] && version_of .venv/bin/python >/dev/null; then
    :
else
    python="$(find_python)"
    if [ -z "$python" ]; then
        if [ -n "${PYTHON:-}" ]; then
            say "PYTHON=$PYTHON does not run, or is older than 3.12"
        else
            say "no Python >= 3.12 was found on PATH, in pyenv, /opt, uv or conda. Install one and run make again:"
            say "  apt install python3.12 python3.12-venv   or   pyenv install 3.12   or   uv python install 3.12"
        fi
        exit 1
    fi
    say "making .venv with $python ($(version_of "$python"))"
    rm -rf .venv
    if ! "$python" -m venv .venv >/dev/null 2>&1; then
        rm -rf .venv
        if ! uv venv -q --seed --python "$python" .venv; then
            say "$python cannot make a virtual environment: on Debian or Ubuntu, apt install python3-venv"
            exit 1
        fi
    fi
fi

say "installing fastft-jax${extras:+[$extras]}"
# uv installs several times faster; pip does as well, and knows a pip configuration that uv does not read.
# Certificates are the system's for both (the variable's name depends on uv's version).
export UV_NATIVE_TLS=1 UV_SYSTEM_CERTS=1
if ! [ -x .venv/bin/uv ]; then
    .venv/bin/python -m pip install -qq --disable-pip-version-check uv >/dev/null 2>&1 || true
fi
if ! { [ -x .venv/bin/uv ] &&
    .venv/bin/uv pip install -q --python .venv/bin/python -c constraints.txt -e ".${extras:+[$extras]}"; }; then
    say "installing with pip instead of uv"
    .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
fi
rm -f .venv/installed-*
echo "$now" >"$stamp"
