# Each target installs what is missing by itself (root, Debian 12 or 13), and nothing a second time.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo demo-wordpress test lint unit integration bench soak up down clean

PYTHON := .venv/bin/python
# What pytest is told: make test PYTEST='-k redis -x'
PYTEST :=
# And the soak: make soak SOAK='--cycles 5000 --applications redis,nginx'
SOAK :=
# Only these install WordPress, which not every demo needs.
PACKAGES := lab/debian-packages.txt $(if $(filter setup demo-wordpress test integration up,$(MAKECMDGOALS)),lab/wordpress-packages.txt)

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install what is missing (the others do it too)
	@lab/setup.sh $(PACKAGES)

demo: setup ## Watch redis and nginx scale to zero and wake: private containerd, real packets, about a minute
	@$(PYTHON) -m lab.demo

demo-wordpress: setup ## Watch WordPress and its database scale to zero, probes going on, and wake together: three minutes
	@$(PYTHON) -m lab.wordpress

test: lint unit integration ## Everything that must pass: lint, unit and integration tests

lint: setup ## ruff and mypy --strict
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

unit: setup ## Tests that need no root
	@$(PYTHON) -m pytest tests/unit $(PYTEST)

integration: setup ## Tests with real containerd, runc, CRIU and eBPF, as root
	@$(PYTHON) -m pytest tests/integration $(PYTEST)

bench: setup ## Measure the time to the first byte of what is scaled down
	@$(PYTHON) -m lab.bench

soak: setup ## 1,000 checkpoints and restores that no client may notice, then five minutes of kubelet's probes
	@$(PYTHON) -m lab.soak --json .build/soak.json --svg .build/soak.svg $(SOAK)
	@$(PYTHON) -m lab.view

up: setup ## Leave a private containerd with criproxy running, to try pods of your own
	@$(PYTHON) -m lab.up

down: ## End what `make up` started
	@[ ! -x $(PYTHON) ] || $(PYTHON) -m lab.up --down

clean: ## Remove what was built; installed packages and .venv stay
	rm -rf .build build dist *.egg-info criproxy/libexec criproxy/api/*_pb2.py criproxy/api/*_pb2.pyi
