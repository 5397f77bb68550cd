# The verbs of the project. Each but gpu-check builds the environment in $(VENV) first, once, under the tested versions.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
BENCH_VENV ?= $(VENV)-bench
PROMPT = def read_file(path):

.PHONY: quickstart tutorial test test-all lint fix faults bench compare gpu-check install

quickstart: install  ## train the smallest real model here, show its curve, let it write
	"$(BIN)/megalodon" pretrain quickstart
	"$(BIN)/megalodon" runs show quickstart
	"$(BIN)/megalodon" generate quickstart -p "$(PROMPT)" -n 160 --seed 1
	@printf '\nTry next (. "%s/bin/activate" puts megalodon on the path):\n' "$(VENV)"
	@printf '  %s\n' 'megalodon generate quickstart -p "class Config:" --temperature 0.5' \
	  'megalodon recipes ls' \
	  'megalodon recipes cp quickstart mine.yaml' \
	  'megalodon pretrain ./mine.yaml train.max_steps=300' \
	  'megalodon doctor'

tutorial: install  ## every command of docs/tutorial.md in a fresh folder; TUTORIAL="--folder /tmp/x" keeps it
	"$(BIN)/python" benchmarks/tutorial.py $(TUTORIAL)

test: install  ## all tests, except those marked slow
	"$(BIN)/python" -m pytest -q -m "not slow"

test-all: install  ## the long ones too
	"$(BIN)/python" -m pytest -q

lint: install  ## style, types; then what exceeds the size guides, which does not fail
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"
	"$(BIN)/python" tests/size_guides.py

fix: install  ## what lint can repair
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

faults: install  ## what docs/reliability.md promises, measured; FAULTS="--only A,B --kills 20 --seed 1" for a part of it
	"$(BIN)/python" benchmarks/faults $(FAULTS)

bench:  ## what docs/benchmarks.md says, measured beside peers; BENCH="--only decode --turns 5" for a part of it
	@$(call environment,$(BENCH_VENV),bench)
	"$(BENCH_VENV)/bin/python" benchmarks/peers $(BENCH)

compare: install  ## Megalodon and a Llama of its size, rates tuned alike, over seeds; COMPARE="--train DIR --valid DIR --page docs/results.md"
	"$(BIN)/python" benchmarks/compare.py $(COMPARE)

gpu-check:  ## every op on this machine's GPU, parity then timings, under ten minutes; needs torch and triton, installs nothing
	"$(PYTHON)" kernels/gpu_check.py $(GPU_CHECK)

install:
	@$(call environment,$(VENV),dev)

# A folder and the extra that is installed in it. make cannot name a file in a folder with spaces as a prerequisite, so
# the shell compares the stamp.
define environment
if [ ! -e "$(1)/installed" ] || [ pyproject.toml -nt "$(1)/installed" ] || [ constraints.txt -nt "$(1)/installed" ]; then \
  set -e; \
  "$(PYTHON)" -m venv "$(1)"; \
  "$(1)/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(2)]'; \
  touch "$(1)/installed"; \
fi
endef
