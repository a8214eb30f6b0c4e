#!/bin/sh
# Install llama-cpp-python, the judge of the GGUF tests, into .venv (which setup_venv.sh made).
#
# It has no wheels: the first time it is compiled, minutes of every core, and the wheel is kept outside of the clone, in
# ${XDG_CACHE_HOME:-~/.cache}/fastft-jax, where every clone finds it. (The caches of pip and uv do not look at the flags
# that a wheel was compiled with.) Where there is no compiler, or it fails, one line says so, the tests that need it
# skip with that line, and the exit code is 0 all the same.
set -eu
cd "$(dirname "$0")/.."

# Without -march=native, whose kernels for AMX crash on small models, and without all that the tests do not call
flags="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF"
flags="$flags -DLLAMA_BUILD_SERVER=OFF -DLLAMA_OPENSSL=OFF -DCMAKE_C_FLAGS_RELEASE=-O2 -DCMAKE_CXX_FLAGS_RELEASE=-O1"
version="$(sed -n 's/^llama[-_]cpp[-_]python==//p' constraints.txt)"
key="$version-$(uname -sm | tr ' ' '-')-$(echo "$flags" | cksum | cut -d' ' -f1)"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/fastft-jax/llama-cpp-python-$key"
installed=.venv/llama-cpp-installed missing=.venv/llama-cpp-missing log=.venv/llama-cpp.log

skip() {
    echo "$1" >"$missing"
    echo "setup: $1; the tests that need it will skip" >&2
    exit 0
}

if [ -f "$installed" ] && [ "$(cat "$installed")" = "$key" ]; then exit 0; fi
if [ -z "$version" ]; then skip "llama-cpp-python is not in constraints.txt, so it was not installed"; fi

wheel="$(ls "$cache"/*.whl 2>/dev/null | head -n 1)" || true
if [ -z "$wheel" ]; then
    if ! command -v "${CXX:-c++}" >/dev/null 2>&1; then
        skip "llama-cpp-python was not built: there is no C++ compiler (apt install g++)"
    fi
    failed="llama-cpp-python $version could not be built (see $log; remove $missing to try again)"
    if [ -f "$missing" ] && [ "$(cat "$missing")" = "$failed" ]; then skip "$failed"; fi
    echo "setup: building llama-cpp-python $version, once for this machine: about six minutes of two cores" >&2
    draft="$(mktemp -d)"
    trap 'rm -rf "$draft"' EXIT
    if ! CMAKE_ARGS="$flags" CMAKE_BUILD_PARALLEL_LEVEL="$(getconf _NPROCESSORS_ONLN)" .venv/bin/python -m pip wheel \
        --disable-pip-version-check --no-cache-dir --no-deps -w "$draft" "llama-cpp-python==$version" >"$log" 2>&1; then
        skip "$failed"
    fi
    mkdir -p "$cache"
    for file in "$draft"/*.whl; do # under its name only when it is whole
        cp "$file" "$cache/draft.$$" && mv "$cache/draft.$$" "$cache/$(basename "$file")"
    done
    wheel="$(ls "$cache"/*.whl | head -n 1)"
fi

export UV_NATIVE_TLS=1 UV_SYSTEM_CERTS=1
if ! { { [ -x .venv/bin/uv ] && .venv/bin/uv pip install -q --python .venv/bin/python -c constraints.txt "$wheel"; } ||
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt "$wheel"; } >"$log" 2>&1 ||
    ! .venv/bin/python -c "import llama_cpp" >>"$log" 2>&1; then
    skip "llama-cpp-python $version could not be installed from $wheel (see $log)"
fi
rm -f "$missing"
echo "$key" >"$installed"
