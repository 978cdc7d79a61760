# `make help` lists what there is.
PYTHON ?= python3.11
PY := .venv/bin/python
SOURCES := $(wildcard csrc/*.py csrc/*/*.*)
WORKERS ?= 2

.PHONY: help install demo examples bench bench-quick bench-host bench-cpu bench-scaling bench-towers bench-memory bench-demo bench-coverage compare report audit audit-short emulate tune gpu gpu-checks gpu-cuda gpu-models docs wheel versions lint check test test-asan clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

.venv/.packages: requirements-dev.txt requirements-docs.txt requirements-peers.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -r requirements-docs.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-peers.txt
	touch $@

.venv/.built: .venv/.packages pyproject.toml setup.py $(SOURCES)
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps -e .
	touch $@

# nvcc for tests and audit, on a machine without CUDA too; CUDA_HOME names another toolkit
.venv/.cuda: .venv/.packages requirements-cuda.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-cuda.txt
	touch $@

install: .venv/.built ## .venv with everything, the extension built (demo and test do this first)

demo: .venv/.built ## train a ViT on scikit-learn's digit scans, naive and fused, and compare (under 4 minutes)
	$(PY) -m vitkernels demo

EXAMPLES := vit_tutorial classification language_model reading mae dino lora

examples: .venv/.built ## train every model of examples/ in full (a few minutes)
	for name in $(EXAMPLES); do echo "== $$name" && $(PY) examples/$$name.py || exit 1; done
	$(PY) -m torch.distributed.run --standalone --nproc-per-node 2 examples/distributed.py

bench: .venv/.built ## time ops, models and scaling against every peer that is installed, then report
	$(PY) -m bench.run
	$(PY) -m bench.report

bench-quick: .venv/.built ## each op, a block and a small model, in two minutes
	$(PY) -m bench.run --quick
	$(PY) -m bench.host --no-compiled
	$(PY) -m bench.report

bench-host: .venv/.built ## what a block costs the processor that feeds the device
	$(PY) -m bench.host
	$(PY) -m bench.kinds
	$(PY) -m bench.report

bench-cpu: .venv/.built ## whole models on this machine against every library's
	$(PY) -m bench.run --suite models
	$(PY) -m bench.report

bench-scaling: .venv/.built ## how cost grows with tokens, batch, width and depth
	$(PY) -m bench.run --suite scaling
	$(PY) -m bench.report

bench-towers: .venv/.built ## what people train beside plain ViTs (Qwen-VL, DINOv3, NaFlex, Swin, video), stock and fused
	$(PY) -m bench.run --suite towers
	$(PY) -m bench.report

bench-memory: .venv/.built ## memory against time: stock and fused models, with and without running blocks again
	$(PY) -m bench.run --suite memory
	$(PY) -m bench.report

bench-demo: .venv/.built ## the demo with timm beside it, and the seconds to 97 % accuracy
	$(PY) -m bench.training
	$(PY) -m bench.report

bench-coverage: .venv/.built ## how many models of timm and towers of transformers vk.fuse serves (about ten minutes)
	$(PY) -m bench.coverage
	$(PY) -m bench.report

compare: .venv/.built ## time quickly and list what is slower than in BASE=<results.json>; exit code 1
	@test -f "$(BASE)" || { echo "make compare: needs BASE=<results.json>, a file of bench/results"; exit 2; }
	rm -f build/compare.json
	$(PY) -m bench.run --quick --out build/compare.json
	$(PY) -m bench.compare $(BASE) build/compare.json

report: .venv/.built ## make every figure anew from bench/results: README, docs, REPORT.md and its pictures
	$(PY) -m bench.report

# TRITON=3.6.0 audits and emulates with that triton, installed beside the environment's own
TRITON_PATH := $(if $(TRITON),.venv/triton-$(TRITON))

.venv/triton-%: | .venv/.packages
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$*

audit: .venv/.built .venv/.cuda $(TRITON_PATH) ## compile every kernel without a GPU and judge it: Triton's for sm_80, 90, 100, CUDA C++ for sm_75 to 90
	env -u TRITON_INTERPRET PYTHONPATH=$(TRITON_PATH) $(PY) -m bench.audit

audit-short: .venv/.built .venv/.cuda $(TRITON_PATH) ## one row of each kernel: Triton's for sm_90, CUDA C++ for sm_80
	env -u TRITON_INTERPRET PYTHONPATH=$(TRITON_PATH) $(PY) -m bench.audit --short

emulate: .venv/.built .venv/.cuda $(TRITON_PATH) ## run every case on the compiled kernels, Triton's and CUDA C++, executed by a PTX machine on the CPU (hours; goes on where it stopped, runs nothing of bench/results/emulated.json that launches the same)
	env -u TRITON_INTERPRET PYTHONPATH=$(TRITON_PATH):tests $(PY) -m ptx.emulate

tune: ## on a machine with an NVIDIA GPU: time what could stand in the rows of configs.py, under 8 minutes
	python3 -m bench.tune

# OUT=<folder> gets copies of outcomes and figures after each stage
gpu: ## on a machine with an NVIDIA GPU, no network needed: install, tests on real kernels, benches (9 minutes)
	python3 -m bench.gpu tests $(if $(OUT),--out $(OUT))

gpu-checks: ## there: memcheck, and the same tests under the other ptxas that triton brings (9 minutes)
	python3 -m bench.gpu checks $(if $(OUT),--out $(OUT))

gpu-cuda: ## there: build the extension's CUDA C++ with the machine's toolkit, its tests, and benches beside Triton (9 minutes)
	python3 -m bench.gpu cuda $(if $(OUT),--out $(OUT))

gpu-models: ## there: a training step of ViT-B against torch.compile's max-autotune (9 minutes)
	python3 -m bench.gpu models $(if $(OUT),--out $(OUT))

# built anew, so that every page's warnings are seen
docs: .venv/.built ## the site, in build/docs: a warning fails it
	$(PY) -m sphinx -E -n -W --keep-going -q -b html -d build/doctrees docs build/docs

# the source archive, then the wheel from it, so that it lacks nothing; torch's libraries come with torch
LIBTORCH := libc10.so libtorch.so libtorch_cpu.so
wheel: .venv/.packages ## a wheel for all Pythons from 3.10 on, and a source archive, in dist/ (compiles anew)
	rm -rf build/dist
	VITKERNELS_BUILD_CUDA=0 PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m build --no-isolation --outdir build/dist .
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m auditwheel repair $(LIBTORCH:%=--exclude %) --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist/

# PYTHONS="python3.10 /opt/python3.13/bin/python" and TORCHES="2.11.0 2.13.0" name them; SOURCE=1 builds there; dist/ must hold a wheel
versions: .venv/.packages ## install the wheel beside each Python and torch that is to be had, and train ten steps there
	$(PY) -m bench.versions $(if $(PYTHONS),--python $(PYTHONS)) $(if $(TORCHES),--torch $(TORCHES)) $(if $(SOURCE),--source)
	$(PY) -m bench.report

lint: .venv/.packages ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

check: .venv/.built lint ## lint, and the tests that break first (about a minute)
	$(PY) -m pytest -n $(WORKERS) -q tests/test_ops_reference.py tests/test_steps.py tests/test_tape.py tests/test_kept.py \
		tests/test_contributing.py tests/test_fuse_timm.py

test: .venv/.built .venv/.cuda ## ruff, mypy, the site, the short audit and all tests (under half an hour on 2 cores)
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint docs audit-short
	$(PY) -m pytest -n $(WORKERS) --dist worksteal
	TRITON_INTERPRET=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal tests/test_triton.py

# another build of the extension, beside the installed one; PYTHONSAFEPATH keeps the checkout's out of the way
ASAN_LIBS = $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libubsan.so)
test-asan: .venv/.packages ## the op cases on the C++ kernels, and programs of them, under AddressSanitizer and UBSan
	VITKERNELS_SANITIZE=address,undefined PATH="$(CURDIR)/.venv/bin:$$PATH" \
		$(PY) setup.py -q build --build-base build/asan --build-lib build/asan/lib
	PYTHONSAFEPATH=1 PYTHONPATH=build/asan/lib ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(ASAN_LIBS)" \
		$(PY) -m pytest -n $(WORKERS) --dist worksteal tests/test_ops.py tests/test_program.py tests/test_few_rows.py \
		-k "(test_accuracy or test_program or test_few_rows) and not reference"

clean: ## remove .venv and every build product
	rm -rf .venv build dist vitkernels.egg-info vitkernels/*.so
