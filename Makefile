# All targets but `device` create and use .venv here: the first call installs, later ones do not. `make` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
TORCH ?= torch==2.13.0
RUN := .venv/bin/python

.PHONY: help setup test demo bench profile lint device device-steps device-counters clean

help:
	@echo "make setup    .venv with torch, the package and its C++ extension (TORCH=$(TORCH))"
	@echo "make demo     train a small causal LM on groups of responses; writes demo/"
	@echo "make test     every test that needs no GPU"
	@echo "make bench    time and memory against the alternatives, on this machine"
	@echo "make profile  peak memory and time of a training step against the size of its group; writes profile/"
	@echo "make lint     ruff and mypy"
	@echo "make device   on a GPU machine, no network, no .venv: install with PYTHON=$(PYTHON), GPU tests, benchmark"
	@echo "make device-steps     then: losses, gradients within a tolerance, training steps, memory of groups"
	@echo "make device-counters  then: memory checker and hardware counters of the kernels"
	@echo "make clean    remove what make and the tests have written, .venv included"

setup: .venv/.package

# Two steps, so that an edit under csrc/ repeats only the second. --no-compile: bytecode is written when first imported.
.venv/.dependencies: Makefile pyproject.toml
	[ -x $(RUN) ] || $(PYTHON) -m venv .venv
	$(RUN) -m pip install -q --no-compile '$(TORCH)' 'setuptools>=77'
	GROUPDPO_KERNELS_BUILD=0 $(RUN) -m pip install -q --no-compile --no-build-isolation '$(TORCH)' -e '.[dev]'
	touch $@

.venv/.package: .venv/.dependencies setup.py CMakeLists.txt $(shell find csrc -type f)
	$(call install,$(RUN))
	touch $@

# setup.py says in one line whether the C++ extension was built, and if not, why.
install = mkdir -p build && $(1) -m pip install -v --no-build-isolation --no-deps -e . > build/install.log 2>&1 \
	&& grep -ho 'groupdpo_kernels: .*' build/install.log || { cat build/install.log; exit 1; }

test: setup
	$(RUN) -m pytest -m 'not gpu' -n 2 $(ARGS)

demo: setup
	$(RUN) examples/group_arithmetic.py $(ARGS)

bench: setup
	$(RUN) bench/run.py $(ARGS)

profile: setup
	.venv/bin/groupdpo-kernels profile --groups 2,4,8 --tokens 64 --micro-batch 1 --seconds 2 --resume $(ARGS)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Figures only after green tests: the benchmark does not start on a failure.
device:
	$(call install,$(PYTHON))
	$(PYTHON) -m pytest -m gpu tests/test_gpu.py
	$(PYTHON) bench/run.py --results bench/results $(ARGS)

# In the order of importance, for a call that is cut short keeps what it has written; each has a gate of its own.
device-steps:
	$(call install,$(PYTHON))
	$(PYTHON) bench/run.py --results bench/results --profile confident --grad-tol 0.0078125 --modes trained frozen \
	    --shapes llama3_8b gemma2_2b qwen2_7b --peers --seconds 4 --budget 150
	$(PYTHON) bench/preference.py --results bench/results
	$(PYTHON) -m groupdpo_kernels.cli profile --model llama-3.2-1b --dtype bfloat16 --settings full,checkpointing,lora \
	    --groups 2,8,32 --tokens 1024 --micro-batch 1 --seconds 5 --device cuda --out profile --resume
	$(PYTHON) -m pytest -m gpu tests/test_gpu_training.py
	$(PYTHON) bench/trl_steps.py --device cuda --rounds 1 --results bench/results

# A shape small enough for tools that slow a kernel down by orders.
device-counters:
	$(call install,$(PYTHON))
	compute-sanitizer --tool memcheck --error-exitcode 1 \
	    $(PYTHON) -m pytest -m gpu tests/test_gpu.py -k 'test_cases or test_sparse or test_weighted_rows'
	ncu --clock-control none --set full --kernel-name 'regex:tiles_kernel|d_logits_kernel|weights_kernel' --launch-count 6 \
	    $(PYTHON) bench/run.py --shapes qwen3_8b --modes trained --peers --rounds 1 --no-memory > build/counters.txt

clean:
	rm -rf .venv build dist python/*.egg-info python/groupdpo_kernels/_C*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
