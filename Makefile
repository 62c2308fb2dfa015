# What the README says to type, and all that CI runs. Nothing here depends on an activated environment.
#   make demo PYTHON=/path/to/python3.13    use this interpreter
#   make demo DEMO="--set seed=1"           arguments for the demo
#   make test ARGS="-k policy -x"           arguments for pytest

DEMO ?=
ARGS ?=
PYTHON ?=

SHELL := /bin/sh
export PYTHON
unexport PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTHONUSERBASE PYTHONOPTIMIZE PYTHONWARNINGS VIRTUAL_ENV

.PHONY: help demo demo-images test test-fast lint preflight environment clean

help:
	@echo "make demo       train, distil, export, serve and query on real reviews; report in runs/demo"
	@echo "make demo-images    the same on Fashion-MNIST; report in runs/demo-images"
	@echo "make test       the tests, a file of them at a time on each core"
	@echo "make test-fast  those that need no server, engine or second environment"
	@echo "make lint       ruff, types of the public surface, shell syntax"
	@echo "make clean      remove the environment and caches; runs/ is kept"

demo:
	@sh scripts/environment.sh cpu,serve,demo
	@.venv/bin/python -m rekd_deploy.cli.demo --output runs/demo $(DEMO)

demo-images:
	@sh scripts/preflight_images.sh $(DEMO)
	@sh scripts/environment.sh cpu,serve,demo
	@.venv/bin/python -m rekd_deploy.cli.demo --images --output runs/demo-images $(DEMO)

test: environment
	@.venv/bin/python -m pytest -n auto --dist loadfile $(ARGS)

test-fast: environment
	@.venv/bin/python -m pytest -n auto --dist loadfile -m "not (triton or tensorrt or standin or debian or slow)" $(ARGS)

lint: environment
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m mypy
	@for script in scripts/*.sh; do sh -n $$script || exit 1; done
	@bash -n .ci/run

environment:
	@sh scripts/environment.sh cpu,demo,data,dev,serve,http,tensorrt-rtx
	@sh scripts/standin.sh
	@sh scripts/smallest.sh

preflight:
	@sh scripts/preflight.sh

clean:
	rm -rf .venv .venv.unfinished .venv-gpu .venv-base build *.egg-info .pytest_cache .ruff_cache
	find rekd_train rekd_deploy tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
