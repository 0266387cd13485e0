.PHONY: setup train test check lint test-slow compose-test proto clean
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

setup:  ; @PYTHON=$(PYTHON) tools/setup
train: setup  ## trains Atari Pong for about three minutes
	seedrl train ALE/Pong-v5 --preset atari_vtrace --max-seconds 180
test: setup lint  ## what CI runs
	tools/install-promtool && pytest -n 2 --dist worksteal -m "not slow and not gpu and not compose"
check: test
lint: setup
	ruff check . && ruff format --check . && mypy && lint-imports
test-slow: setup  ## learning runs, fault drills and what wants optional packages: about an hour
	tools/install-promtool && pytest -m "slow and not compose" --timeout 1800
	pip install --quiet -c constraints.txt envpool minigrid moviepy && pytest tests/services/actor/test_pools.py tests/docs
compose-test: setup  ## the containers, in an engine of this machine: a suite of its own, about ten minutes
	pytest -m compose tests/compose -v -s
proto: setup  ## regenerates shared/wire from inference.proto
	python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. shared/wire/inference.proto
clean: ; rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
