# The verbs of the project. Each builds the environment in $(VENV) first, once, under the tested versions.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
STAMP = $(VENV)/installed
PROMPT = def read_file(path):

.PHONY: quickstart test test-all lint fix faults install

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

# make cannot name a file in a folder with spaces as a prerequisite, so the shell compares the stamp
install:
	@if [ ! -e "$(STAMP)" ] || [ pyproject.toml -nt "$(STAMP)" ] || [ constraints.txt -nt "$(STAMP)" ]; then \
	  set -e; \
	  "$(PYTHON)" -m venv "$(VENV)"; \
	  "$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	  touch "$(STAMP)"; \
	fi
