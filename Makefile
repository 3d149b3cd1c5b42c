# All targets but those of a device create and use .venv here: the first call installs, later ones do not. `make` lists
# them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
TORCH ?= torch==2.13.0
# What that torch brings where it is built for CUDA.
TRITON ?= triton==3.7.1
RUN := .venv/bin/python
RESULTS ?= bench/results
# Without bytecode on disk each of the tests' hundred processes would compile torch and transformers again: 20 s.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup test compositions test-distributed test-processors test-aarch64 sanitize fuzz audit emulate faults numerics demo bench profile docs dist hub compat support lint clean
.PHONY: device-first device device-losses device-memory device-steps device-counters

help:
	@echo "make setup    .venv with torch, the package and its C++ extension (TORCH=$(TORCH))"
	@echo "make demo     train a small causal LM on groups of responses; writes demo/"
	@echo "make test     every test that needs no GPU"
	@echo "make compositions  every loss and function compiled by inductor, layers compiled beside all else, against eager code"
	@echo "make test-distributed  every engine on two and four processes, against one process"
	@echo "make test-processors  a slice of the tests as on a processor with SSE alone, with AVX2, with all that is here"
	@echo "make test-aarch64  the loops of the C++ op, cross-compiled and run in qemu: the same bits as here"
	@echo "make sanitize the C++ op under sanitizers: addresses, undefined behaviour, races; planted faults are found"
	@echo "make fuzz     wrong rows, files, arguments, options, tensors by the ten thousand; writes docs/project/fuzzing.md"
	@echo "make audit    licences and known vulnerabilities of dependencies; writes docs/project/dependencies.md; network"
	@echo "make emulate  every kernel, compiled for a GPU and executed without one; writes docs/project/emulation.md; resumes"
	@echo "make numerics ten thousand drawn heads and more, each within its error budget; writes docs/project/numerics.md; resumes"
	@echo "make faults   kills, full disks, damaged files; writes docs/project/faults.md; resumes"
	@echo "make bench    time and memory against the alternatives, on this machine"
	@echo "make profile  peak memory and time of a training step against the size of its group; writes profile/"
	@echo "make docs     the documentation as a site, build/docs/index.html; a broken link is an error"
	@echo "make dist     sdist, wheel with the C++ op and pure wheel into dist/; each is tried in a fresh environment"
	@echo "make hub      the Triton half in the layout of Hugging Face's kernel hub, into build/hub"
	@echo "make compat   a slice of the tests under each version of torch, Triton, transformers and TRL; downloads them; resumes"
	@echo "make support  docs/project/support.md, the table of what is tested, from pytest's reports in build/junit/"
	@echo "make lint     ruff and mypy"
	@echo "on a GPU machine, with no network and no .venv, PYTHON=$(PYTHON), into RESULTS=$(RESULTS), one after the other:"
	@echo "make device-first     five minutes: ceilings, errors, each kernel, both designs of the products"
	@echo "make device           GPU tests, benchmark of the kernels beside every peer"
	@echo "make device-losses    losses, and gradients within a tolerance"
	@echo "make device-memory    memory and time of groups, and what was predicted"
	@echo "make device-steps     a step of TRL's trainer beside ours"
	@echo "make device-counters  memory checker, hardware counters"
	@echo "make clean    remove what make and the tests have written, .venv included"

setup: .venv/.package

# Two steps, so that an edit under csrc/ repeats only the second. --no-compile: bytecode is written when first imported.
.venv/.dependencies: Makefile pyproject.toml
	[ -x $(RUN) ] || $(PYTHON) -m venv .venv
	$(RUN) -m pip install -q --no-compile '$(TORCH)' 'setuptools>=77'
	GROUPDPO_KERNELS_BUILD=0 $(RUN) -m pip install -q --no-compile --no-build-isolation '$(TORCH)' '$(TRITON)' -e '.[dev]'
	touch $@

.venv/.package: .venv/.dependencies setup.py CMakeLists.txt $(shell find csrc -type f)
	$(call install,$(RUN))
	touch $@

# setup.py says in one line whether the C++ extension was built, and if not, why.
install = mkdir -p build && $(1) -m pip install -v --no-build-isolation --no-deps -e . > build/install.log 2>&1 \
	&& grep -ho 'groupdpo_kernels: .*' build/install.log || { cat build/install.log; exit 1; }

# worksteal: each worker takes half of the files in order, so that what a file sets up is seldom set up twice.
test: setup
	$(RUN) -m pytest -m 'not gpu and not distributed and not compositions' -n 2 --dist worksteal $(ARGS)

compositions: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m compositions -p no:xdist tests/test_compositions.py tests/test_trl_compiled.py $(ARGS)

# Each family of engines starts its processes once, so that the tests run one after the other.
test-distributed: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m distributed -p no:xdist tests/test_distributed.py tests/test_distributed_rest.py $(ARGS)

# What a processor of less would use: torch's kernels, the matrix products of its libraries, NumPy's under the
# interpreter, and our loops. torch does as it is told, so AVX2 is asked for only where it is; the last run takes all that
# is here, AVX-512 where it is.
as_sse := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
    OPENBLAS_CORETYPE=Nehalem GROUPDPO_KERNELS_CPU_CAPABILITY=default
as_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
    OPENBLAS_CORETYPE=Haswell GROUPDPO_KERNELS_CPU_CAPABILITY=avx2
as_all := -u OPENBLAS_CORETYPE
SLICE := tests/test_csrc.py tests/test_blocks.py tests/test_sparse.py tests/test_sparse_triton.py tests/test_preference_weights.py
SLICE_OF := ((plain or everything or softcap_tight or instruction_set) and not triton or same_bits) and not opcheck and not 268435456

test-processors: setup
	for units in "$(as_sse)" "$(shell grep -qsw avx2 /proc/cpuinfo && echo '$(as_avx2)')" "$(as_all)"; do \
	    [ -z "$$units" ] || env $$units OMP_NUM_THREADS=1 $(RUN) -m pytest -m 'not gpu' -p no:xdist $(SLICE) -k '$(SLICE_OF)' $(ARGS) || exit 1; done

# The loops over a row, which know no torch, for 64-bit ARM by NEON, in an emulator of the processor (qemu-user): the bits are
# those of this one. Wants aarch64-linux-gnu-g++ and qemu-aarch64-static.
ROWS := -std=c++20 -O3 -static -Wall -Wextra -fno-math-errno -fno-trapping-math -ffp-contract=off -Icsrc \
    -DGROUPDPO_KERNELS_ROW=row_default csrc/cpu/row.cpp csrc/cpu/row_choice.cpp tests/rows_elsewhere/rows.cpp

test-aarch64:
	mkdir -p build
	$(CXX) $(ROWS) -o build/rows-here
	aarch64-linux-gnu-g++ $(ROWS) -o build/rows-aarch64
	diff <(build/rows-here) <(qemu-aarch64-static build/rows-aarch64)
	@echo "the same bits: $$(build/rows-here | wc -l) results"

# Builds apart from the normal one, in build/sanitize/; ARGS='thread' for one of them, '--planted' for the faults alone.
sanitize: setup
	OMP_NUM_THREADS=1 $(RUN) tests/sanitize.py $(ARGS)

# atheris has no wheel for every Python, so that it is no dependency of the tests. ARGS='--only rows' for one part.
fuzz: setup
	$(RUN) -m pip install -q 'atheris>=3'
	OMP_NUM_THREADS=1 $(RUN) -W ignore tests/fuzz.py $(ARGS)

# pip-audit in an environment of its own: what it needs is not ours. ARGS=--list for the licences alone, without network.
audit: setup
	[ -x build/audit/bin/pip-audit ] || { $(PYTHON) -m venv build/audit && build/audit/bin/python -m pip install -q pip-audit; }
	$(RUN) tests/audit.py --pip-audit build/audit/bin/pip-audit $(ARGS)

# Each run is kept in build/emulated/, so that one that was stopped goes on.
emulate: setup
	OMP_NUM_THREADS=1 $(RUN) tests/emulate.py $(ARGS)

# Each verdict is kept in build/numerics/, so that a run that was stopped goes on.
numerics: setup
	OMP_NUM_THREADS=1 $(RUN) tests/numerics.py $(ARGS)

# Each result is kept in build/faults/. A part of it wants root, which may mount small disks.
faults: setup
	OMP_NUM_THREADS=1 $(RUN) tests/faults.py $(ARGS)

demo: setup
	$(RUN) examples/group_arithmetic.py $(ARGS)

bench: setup
	$(RUN) bench/run.py $(ARGS)

profile: setup
	.venv/bin/groupdpo-kernels profile --groups 2,4,8 --tokens 64 --micro-batch 1 --seconds 2 --resume \
	    --strategies coupled_logits,coupled,two_pass,one_pass $(ARGS)

# The site is made of text and docstrings; it needs no C++ op.
docs: .venv/.dependencies
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

# Both wheels come from the sdist, so that it is whole. What must not be in a file that goes elsewhere: another symbol of
# Python than the limited API's (abi3audit), or of glibc than the tag says (auditwheel, which leaves torch's libraries
# to torch). Each file is then installed where nothing of this checkout is.
dist: export PATH := $(CURDIR)/.venv/bin:$(PATH)
dist: setup
	rm -rf dist
	$(RUN) -m build --no-isolation --sdist
	GROUPDPO_KERNELS_BUILD=1 GROUPDPO_KERNELS_LIMITED_API=1 $(RUN) -m pip wheel -q --no-build-isolation --no-deps -w dist/linux dist/*.tar.gz
	$(RUN) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist dist/linux/*.whl && rm -r dist/linux
	GROUPDPO_KERNELS_BUILD=0 $(RUN) -m pip wheel -q --no-build-isolation --no-deps -w dist dist/*.tar.gz
	$(RUN) -m twine check --strict dist/*
	$(RUN) -m abi3audit --strict --summary dist/*-abi3-*.whl
	$(RUN) tests/installed_package.py cpu --file dist/*-cp310-abi3-*.whl
	$(RUN) tests/installed_package.py reference --file dist/*-py3-none-any.whl
	$(RUN) tests/installed_package.py reference --file dist/*.tar.gz
	ls -l dist

# No environment: sources are copied and their imports written anew.
hub:
	$(PYTHON) kernels/hub/assemble.py build/hub

# Each version in an environment of its own, kept in build/compat/ as long as it runs; a torch with CUDA takes 5 GB.
compat: setup
	OMP_NUM_THREADS=1 $(RUN) tests/compat.py $(ARGS)

# The page says how to write the reports.
support: setup
	$(RUN) tests/support.py

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Each of these installs, and is cut to end within ten minutes on one H200. Without nvcc GROUPDPO_KERNELS_CUDA=0 says so:
# nothing is left out in silence. Time on a device is short: tests report, and the figures are measured whatever they say
# (bench/run.py shows none of an implementation that fails its own gate). A failure of either is the exit status.
on_device = mkdir -p $(RESULTS); export GROUPDPO_KERNELS_CUDA=$${GROUPDPO_KERNELS_CUDA:-1}; $(call install,$(PYTHON))
on_device_pytest = status=0; $(PYTHON) -m pytest -m gpu -n 6

device-first:
	$(on_device)
	$(PYTHON) bench/first.py --results $(RESULTS) $(ARGS)

device:
	$(on_device)
	$(on_device_pytest) tests/test_gpu.py > >(tee $(RESULTS)/tests.txt) || status=$$?; \
	$(PYTHON) bench/run.py --results $(RESULTS) $(ARGS) || status=$$?; exit $$status

# Losses, and gradients within a tolerance.
device-losses:
	$(on_device)
	status=0; $(PYTHON) bench/run.py --results $(RESULTS) --profile confident --grad-tol 0.0078125 \
	    --modes trained frozen --peers --shapes llama3_8b gemma2_2b qwen2_7b qwen3_8b --seconds 4 --budget 240 || status=$$?; \
	$(PYTHON) bench/preference.py --results $(RESULTS) || status=$$?; exit $$status

# Memory of groups against its prediction, and the time of a step.
device-memory:
	$(on_device)
	$(on_device_pytest) tests/test_gpu_training.py > >(tee $(RESULTS)/tests_training.txt) || status=$$?; \
	$(PYTHON) -m groupdpo_kernels.cli profile --model llama-3.2-1b --dtype bfloat16 --settings checkpointing,lora \
	    --groups 2,16,64 --tokens 1024 --micro-batch 1 --seconds 5 --device cuda --out $(RESULTS)/profile --resume \
	    || status=$$?; exit $$status

# A step of TRL's trainer beside ours; wants trl and datasets.
device-steps:
	$(on_device)
	$(PYTHON) bench/trl_steps.py --device cuda --rounds 1 --results $(RESULTS)

# Counters first: they are figures. The memory checker runs without the caching allocator, or what is read out of bounds
# lies in a block that something else owns; small shapes only.
device-counters:
	$(on_device)
	status=0; for kernel in linear_logps_fwd_kernel linear_logps_bwd_kernel frozen_head_fwd_kernel; do \
	    ncu --clock-control none --set full --kernel-name $$kernel --launch-count 2 $(PYTHON) bench/run.py \
	    --shapes qwen3_8b --modes trained frozen --peers --rounds 1 --no-memory --results $(RESULTS)/counted \
	    > $(RESULTS)/$$kernel.txt || status=$$?; done; \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 --report-api-errors no \
	    $(PYTHON) -m pytest -m gpu tests/test_gpu.py -x \
	    -k '(test_cases or test_sparse or test_weighted_rows) and not reads_nothing and not vocabulary' \
	    > >(tee $(RESULTS)/memcheck.txt) || status=$$?; exit $$status

clean:
	rm -rf .venv build dist python/*.egg-info python/groupdpo_kernels/_C*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
