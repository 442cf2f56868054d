.DEFAULT_GOAL := help
.PHONY: help setup demo test lint site clean

PYTHON ?= python3
STACK ?= openmmlab
VENV := $(if $(filter onedl,$(STACK)),.venv-onedl,.venv)
VENV_PYTHON := $(VENV)/bin/python

help:  ## show this help
	@echo 'make TARGET [PYTHON=python3.11] [STACK=openmmlab|onedl]'
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' Makefile

setup:  ## create .venv (.venv-onedl) with everything that is needed (first time: 5 to 25 minutes)
	@STACK=$(STACK) $(PYTHON) tools/misc/setup_env

demo: setup  ## train and compare on real images, on the CPU
	@$(VENV_PYTHON) tools/misc/demo.py

lint: setup  ## check style, formatting and which room imports which
	@echo '== ruff check'
	@$(VENV_PYTHON) -m ruff check .
	@echo '== ruff format --check'
	@$(VENV_PYTHON) -m ruff format --check .
	@echo '== lint-imports'
	@$(VENV)/bin/lint-imports --no-cache

test: lint  ## check the style, then run the tests
	@echo '== pytest, a process on each core'
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest --numprocesses auto

site: setup  ## write the documents' tables, then documents and leaderboard as pages to site/
	@$(VENV_PYTHON) tools/analysis_tools/leaderboard.py build
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build

clean:  ## remove environments, build output and caches (keeps data and work_dirs)
	rm -rf .venv .venv-onedl build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
