# Each target is enough by itself on a fresh clone: it sets up .venv first (again only when the requirements change).

PY := .venv/bin/python
SETUP := sh scripts/setup_venv.sh
LLAMA_CPP := sh scripts/setup_llama_cpp.sh
# The suite is run by as many processes as there are cores, so each computes on one thread
# Bytecode is kept even where the environment forbids it: many tests start processes, and imports would be compiled anew
TEST_ENV := PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
PYTEST_ARGS ?=

.PHONY: help quickstart test lint format constraints compatibility compile-kernels clean

help:
	@echo "make quickstart   fine-tune the tiny model in examples/ and look at what it learned"
	@echo "make test         lint, then the whole test suite (also on the GPU, where there is one)"
	@echo "make lint         ruff and import-linter"
	@echo "make format       rewrite the sources as ruff formats them"
	@echo "make constraints  write constraints.txt from what is installed in .venv"
	@echo "make compatibility  write docs/compatibility.md from what its tests measure"
	@echo "make compile-kernels  compile every kernel for H200, A100 and L4 without a GPU; fails where registers spill"
	@echo "make clean        remove .venv, .venv-cuda, caches and outputs"

quickstart:
	@$(SETUP)
	PYTHONDONTWRITEBYTECODE= $(PY) -m fastft_jax.sft --config configs/quickstart.yaml

test: lint
	@$(LLAMA_CPP)
	@if nvidia-smi -L >/dev/null 2>&1; then \
		echo "tests on the GPU"; \
		env $(TEST_ENV) XLA_PYTHON_CLIENT_PREALLOCATE=false $(PY) -m pytest -m gpu tests/gpu $(PYTEST_ARGS); \
		code=$$?; [ $$code -eq 0 ] || [ $$code -eq 5 ] || exit $$code; \
	fi
	env $(TEST_ENV) JAX_PLATFORMS=cpu $(PY) -m pytest -n auto --dist worksteal -m "not gpu" $(PYTEST_ARGS)

lint:
	@$(SETUP) test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports

format:
	@$(SETUP) test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Not what CUDA brings (torch and jax each ask for their own versions of it), and not the installers
constraints:
	@$(SETUP) test
	@$(LLAMA_CPP)
	@{ echo "# Versions the tests ran with; written by 'make constraints'."; \
	  $(PY) -m pip list --format=freeze --exclude-editable | \
	  grep -viE '^(nvidia-|cuda-|jax-cuda|jax-triton|triton|fastft-jax|pip=|uv=|setuptools=|wheel=)'; } > constraints.draft
	@mv constraints.draft constraints.txt
	@echo "constraints.txt: $$(grep -c '==' constraints.txt) versions"

compatibility:
	@$(SETUP) test
	@$(LLAMA_CPP)
	@rm -f .venv/compatibility.jsonl
	env $(TEST_ENV) JAX_PLATFORMS=cpu FASTFT_COMPATIBILITY=$(CURDIR)/.venv/compatibility.jsonl \
		$(PY) -m pytest -n auto tests/convert/test_compatibility.py
	$(PY) scripts/write_compatibility_page.py .venv/compatibility.jsonl

# An environment of its own: the CUDA plugin is large, and nothing else needs it where there is no GPU
compile-kernels:
	@$(SETUP)
	@[ -x .venv-cuda/bin/python ] || { $(PY) -m venv .venv-cuda && .venv-cuda/bin/pip install -q -c constraints.txt -e . && \
		.venv-cuda/bin/pip install -q "jax-cuda13-plugin==$$(.venv-cuda/bin/python -c 'import jax; print(jax.__version__)')"; }
	.venv-cuda/bin/python scripts/compile_kernels.py $(KERNELS)

clean:
	rm -rf .venv .venv-cuda .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist outputs *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
