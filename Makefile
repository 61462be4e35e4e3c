# The verbs of this repository; CI runs the same ones. `make serve PORT=8123 MODEL=DIR DTYPE=float32` passes its settings on.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Bytecode is kept, whatever the environment says: without it, each server that a test starts compiles the whole product.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install tools serve quick test lint check mutants conformance clients attack soak aot bench gpu-check demo-model lock
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

# The programs that some tests run, each with Debian's package: Prometheus beside the server, and the compilers and the emulator
# that the C++ has to pass through. Installs what is missing, where it may; elsewhere those tests are skipped, unless
# DEMAND_TOOLS=1. Prometheus's package starts a service, which is stopped.
TOOLS := prometheus=prometheus promtool=prometheus clang++-14=clang-14 aarch64-linux-gnu-g++=g++-aarch64-linux-gnu \
  qemu-aarch64=qemu-user

tools:
	@missing=''; \
	for tool in $(TOOLS); do command -v "$${tool%=*}" >/dev/null || missing="$$missing $${tool#*=}"; done; \
	[ -n "$$missing" ] || exit 0; \
	case "$$missing" in *clang-14*) missing="$$missing libomp-14-dev";; esac; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -q && apt-get install -y -q --no-install-recommends $$missing || exit 1; \
	  case "$$missing" in *prometheus*) service prometheus stop && update-rc.d prometheus disable;; esac; \
	else \
	  echo "some tests will be skipped: install Debian's packages$$missing, or what they contain" >&2; \
	  [ "$$DEMAND_TOOLS" != 1 ]; \
	fi

# The tests that need no torch: scheduling, pages, drafting, pace, text, limits, the band, configurations and training's tasks,
# with a quarter of the scheduler's random examples. Their environment has these packages and what they require, and no torch:
# a test that comes to import more fails here.
QUICK := tests/kernels/test_band.py tests/model/test_config.py tests/model/training/test_tasks.py \
  $(patsubst %,tests/service/api/test_%.py,limits limits_rounding) \
  $(patsubst %,tests/service/engine/test_%.py,drafting pace pages scheduler scheduler_edges text)

quick: .venv-quick/.installed
	.venv-quick/bin/pytest --hypothesis-profile quick $(QUICK)

.venv-quick/.installed: constraints.txt
	test -x .venv-quick/bin/python || $(PYTHON) -m venv .venv-quick
	.venv-quick/bin/pip install --quiet --constraint constraints.txt pytest pytest-timeout hypothesis tiktoken
	touch $@

# Each worker takes whole files, so that a file's server is started once. Workers often wait for such a server, so that three
# are faster than two on two cores. The first worker that crashes ends the run and is named: pytest-xdist would start another
# and wait for ever for the rest of that file.
WORKERS ?= 3
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile --max-worker-restart 0

test: install tools
	$(PYTEST)

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

check: lint tools
	$(BIN)/python -m tests.budget
	$(BIN)/mypy
	$(PYTEST)

# How much of a sample of small changes to the code the tests notice; takes minutes, and fails on none that they miss.
mutants: install
	$(BIN)/python -m tests.mutants

# The tests that show the HTTP contract, and the table of what they show.
conformance: install tools
	$(BIN)/pytest -m contract -p tests.conformance --conformance CONFORMANCE.md

# Programs that people use with such servers, each installed into an environment of its own (build/programs, about 8 GB) and run
# against a real server: minutes, and many more the first time. `make clients ONLY='nginx curl'`: some of them.
clients: install
	$(BIN)/python -m tests.programs.run $(if $(ONLY),--only $(ONLY))

# The project's own adversary: attacks on servers of its own over loopback, at full size. Prints what each did beside the bound,
# and fails if one is missed. Takes about 25 minutes by estimate; the full disk takes root. `make attack ONLY='poison tenants'`: some of it.
attack: install
	$(BIN)/python -m tests.attacks $(if $(ONLY),--only $(ONLY))

# Three rounds at three times what a server can do, with clients that misbehave: nothing of them may be left, and seeded requests
# get the same texts as from a quiet server. `make soak SECONDS=120`: shorter rounds.
SECONDS ?= 600

soak: install
	$(BIN)/python -m tests.soak --seconds $(SECONDS)

# Every kernel, compiled for GPUs that this machine need not have; takes minutes.
aot: install
	$(BIN)/python -m kernels.gpu.aot

# Beside other servers, where the environment names them: see tests/bench/run.py. `make bench ONLY='peaked-1 top-p-8'`: some lines.
bench: install
	$(BIN)/python -m tests.bench.run $(if $(AVX2),--avx2) $(if $(ONLY),--only $(ONLY))

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
