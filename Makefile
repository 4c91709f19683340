# `make` lists the targets. Everything runs in .venv, which `make venv` creates and keeps current.
SHELL := /bin/bash
PYTHON ?= python3.11
ENGINE ?= cpu
VENV := .venv
STAMP := $(VENV)/.deltaworks-$(ENGINE)
PIP := $(VENV)/bin/pip --disable-pip-version-check
# A wheel index that has a CPU build of torch, where pip does not offer one by itself.
TORCH_INDEX ?=
# What a server imports: its byte code is written at install, so that the first start is as fast as the second.
IMPORTED := import server.serve, vllm.v1.engine.async_llm, vllm.v1.worker.cpu_worker, transformers.models.llama
export HF_HUB_OFFLINE := 1

.PHONY: help venv demo test test-fast test-clients test-ray check demo-deltas lock promtool clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(STAMP)  ## make .venv, or bring it up to date (ENGINE=cpu|gpu, TORCH_INDEX=url)

ifeq ($(ENGINE),gpu)
$(STAMP): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --progress-bar on -e '.[gpu,train,dev]'
	$(VENV)/bin/python -m compressors.kernels.build
	touch $@
else
$(STAMP): pyproject.toml deploy/lock/cpu.txt
	@test -x $(VENV)/bin/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the locked CPU environment (a few minutes the first time)"
	$(if $(TORCH_INDEX),$(PIP) install --no-deps --index-url $(TORCH_INDEX) "$$(grep '^torch==' deploy/lock/cpu.txt)")
	$(PIP) install --no-deps --no-compile --progress-bar on -r deploy/lock/cpu.txt
	$(PIP) install --no-deps --no-build-isolation --no-compile --quiet -e .
	@echo "compiling the byte code that a start needs"
	@env -u PYTHONDONTWRITEBYTECODE VLLM_LOGGING_LEVEL=ERROR $(VENV)/bin/python -c "$(IMPORTED)" 2> /dev/null
	$(VENV)/bin/python -m compressors.kernels.build
	@touch $@

# For the tests of the GPU kernels, in a folder of its own: vLLM for CPUs and the server never find it.
TRITON := $(VENV)/triton
$(TRITON): deploy/lock/triton.txt | venv
	rm -rf $@
	$(PIP) install --no-deps --no-compile --progress-bar on --target $@ -r deploy/lock/triton.txt
	touch $@
endif

demo: venv  ## start a server with three demo deltas and ask all of them the same questions (DEMO_ONCE=1 to stop then)
	$(VENV)/bin/deltaworks demo $(if $(DEMO_ONCE),--once)

# One process for each core; on a GPU one alone, whose memory two engines would not share.
# Tests start many interpreters: the byte code that one has compiled is there for the next.
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(if $(filter gpu,$(ENGINE)),0,auto)

test: venv $(TRITON)  ## all tests, on the real engine too
	$(PYTEST)

test-fast: venv  ## the tests that need neither an engine nor long
	$(PYTEST) -m "not engine and not slow"

test-clients: venv  ## real clients against a running server, each in an environment of its own
	$(VENV)/bin/python -m pytest -o python_files='client_*.py' tests/clients

# Beside the locked environment, which it sees: Ray and what it needs, and nothing that is there already.
RAY := $(VENV)/ray
$(RAY): pyproject.toml | venv
	rm -rf $@
	$(VENV)/bin/python -m venv --without-pip $@
	$(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" > "$$(echo $@/lib/python*/site-packages)/beside.pth"
	$(PIP) --python $@/bin/python install --no-build-isolation --progress-bar on -e '.[ray]'

test-ray: venv $(RAY)  ## two replicas behind Ray Serve, one of them killed under load (in an environment of its own)
	$(RAY)/bin/python -m pytest -s -o python_files='ray_*.py' tests/scale

check: venv  ## format, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

demo-deltas: venv  ## train, compress and check the demo deltas again (hours on two cores)
	$(VENV)/bin/deltaworks train demo-deltas --out deploy/demo

lock: venv  ## write deploy/lock/cpu.txt from what is installed
	$(VENV)/bin/python deploy/lock/refresh.py > deploy/lock/cpu.txt.new && mv deploy/lock/cpu.txt.new deploy/lock/cpu.txt

promtool: venv  ## fetch Prometheus' checker from Debian's package into .venv/bin; the tests of alerts and metrics use it
	@test -x $(VENV)/bin/promtool || { set -e; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; cd "$$tmp"; \
	  apt-get download -q prometheus || { apt-get update -q && apt-get download -q prometheus; }; \
	  dpkg-deb -x prometheus_*.deb .; install usr/bin/promtool $(CURDIR)/$(VENV)/bin/promtool; }

clean:  ## remove the environment and caches of this folder
	rm -rf $(VENV) .clients .pytest_cache .mypy_cache .ruff_cache .hypothesis
