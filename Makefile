# The verbs of this repository; CI runs the same ones. `make serve PORT=8123 MODEL=DIR DTYPE=float32` passes its settings on.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install prometheus native-tools serve test lint check conformance aot bench gpu-check demo-model lock
.DEFAULT_GOAL := check

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv, which takes a few minutes the first time"
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: install
	$(BIN)/banded serve $(if $(MODEL),--model '$(MODEL)') $(if $(HOST),--host '$(HOST)') $(if $(PORT),--port '$(PORT)') \
	  $(if $(DTYPE),--dtype '$(DTYPE)') $(if $(DEVICE),--device '$(DEVICE)')

# Prometheus, which some tests run beside the server; Debian's package where it is missing, without the service it starts.
prometheus:
	@command -v prometheus >/dev/null && command -v promtool >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -q && apt-get install -y -q --no-install-recommends prometheus && \
	    service prometheus stop && update-rc.d prometheus disable; \
	  else \
	    echo "the tests run prometheus and promtool: install Debian's package prometheus, or Prometheus's own archive" >&2; exit 1; \
	  fi; }

# Compilers and an emulator for the C++ kernels' tests on other processors (tests/kernels/cpu/test_native.py): Debian's packages
# where `make` is root there. Without them the tests are skipped; with BANDED_DEMAND=1 they fail.
native-tools:
	@command -v clang++-14 >/dev/null && command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -q && apt-get install -y -q --no-install-recommends clang-14 libomp-14-dev g++-aarch64-linux-gnu qemu-user; \
	  else echo "the C++ kernels are tested on fewer processors: clang-14, libomp-14-dev, g++-aarch64-linux-gnu, qemu-user" >&2; fi; }

test: install prometheus
	$(BIN)/pytest

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

check: lint prometheus native-tools
	$(BIN)/mypy
	$(BIN)/pytest

# The tests that show the HTTP contract, and the table of what they show.
conformance: install prometheus
	$(BIN)/pytest -m contract -p tests.conformance --conformance CONFORMANCE.md

# Every kernel, compiled for GPUs that this machine need not have; takes minutes.
aot: install
	$(BIN)/python -m kernels.gpu.aot

# Beside other servers, where the environment names them: see tests/bench/run.py. `make bench ONLY='bf16-1 bf16-8'`: some lines.
bench: install
	$(BIN)/python -m tests.bench.run $(if $(ONLY),--only $(ONLY))

# For whoever has a GPU. `make gpu-check DRY=1` runs the same command at toy size on a CPU.
gpu-check: install
	$(BIN)/python -m tests.bench.gpu_check $(if $(DRY),--dry)

# The embedded model, from the books that model/data/demo/BOOKS.md names: `make demo-model TEXT=tales.txt VALID=tales-valid.txt`.
# Stopped, it goes on when it is called again. Minutes on an H100 (DEVICE=cuda), hours on 2 cores.
# The books stand there twice, so that they are about as many tokens as the tasks.
demo-model: OUT ?= build/demo
demo-model: ON = $(if $(DEVICE),--device '$(DEVICE)')
demo-model: install
	$(BIN)/python -m model.training.tasks '$(TEXT)' --out '$(OUT)'
	$(BIN)/banded train '$(OUT)/repeats.txt' --window 128 --batch-softmax --learning-rate 2e-3 --out '$(OUT)/first' --resume $(ON)
	$(BIN)/banded train '$(TEXT)' '$(TEXT)' '$(OUT)/tasks.txt' --init '$(OUT)/first' --valid '$(VALID)' --out '$(OUT)/run' --resume \
	  --tokens 72e6 --batch-tokens 16384 --micro-tokens 16384 --learning-rate 2e-3 $(ON)
	$(BIN)/banded evaluate --model '$(OUT)/run' --dtype bfloat16 --text '$(VALID)' --few-shot '$(OUT)/items.jsonl' --examples '$(OUT)/examples.jsonl'

# Write down the versions that are installed now; a local build tag such as torch's would name a file nobody else has.
lock: install
	(head -1 constraints.txt; $(BIN)/pip freeze --all --exclude-editable | sed '/^pip==/d; s/+[a-z].*$$//') > constraints.new
	mv constraints.new constraints.txt
