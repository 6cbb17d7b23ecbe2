# make book: the site.  make test: everything that is checked.  Both make .venv first if need be.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
SITE   := book/_build/html
NBVAL  := --nbval --nbval-current-env --nbval-cell-timeout=300 --nbval-sanitize-with=tests/nbval.cfg

MAKEFLAGS += --no-print-directory

.PHONY: setup book serve lab test check unit pairs chapters chapter exercises nbval site pages wheel clean

setup: $(VENV)/.ready node_modules/.ready ## Python and npm packages, once (minutes, mostly torch)

$(VENV)/.ready: requirements.lock pyproject.toml
	@echo "== setup: the Python packages of requirements.lock into $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --requirement requirements.lock
	$(BIN)/python -m pip install --no-deps --editable .
	@touch $@

node_modules/.ready: package-lock.json $(VENV)/.ready
	@echo "== setup: the npm packages of package-lock.json into node_modules"
	$(BIN)/npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

book: setup ## the site in book/_build/html, from stored outputs; a warning is an error
	@echo "== book: the site"
	@rm -rf book/_build
	$(BIN)/jupyter-book build . --config book/_config.yml --toc book/_toc.yml --path-output book --quiet -W --keep-going
	@echo "The site is at file://$(CURDIR)/$(SITE)/index.html (or: make serve)"

serve: ## the built site at http://localhost:8000
	$(BIN)/python -m http.server --directory $(SITE) 8000

lab: setup ## read and change the chapters in JupyterLab
	$(BIN)/jupyter trust chapters/*.ipynb
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/chapters/00_start.ipynb

test: setup ## everything, in order, until the first failure
	@$(MAKE) check
	@$(MAKE) wheel
	@$(MAKE) unit
	@$(MAKE) pairs
	@$(MAKE) nbval
	@$(MAKE) book
	@$(MAKE) pages

check: setup ## format, lint, types
	@echo "== check: format, lint, types"
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

unit: setup ## the package's tests
	@echo "== unit: the package"
	$(BIN)/python -m pytest --numprocesses=auto -m "not site"

pairs: setup ## texts and notebooks in step, outputs clean
	@echo "== pairs: texts and notebooks"
	$(BIN)/python tools/notebooks.py check
	$(BIN)/python tools/exercises.py check

nbval: setup ## every notebook run again, its outputs compared
	@echo "== nbval: every notebook runs again, outputs compared"
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile $(NBVAL) chapters exercises/solutions

pages: setup ## the built site in headless Chromium
	@echo "== pages: links, weight, accessibility, phones"
	$(BIN)/python tools/check_site.py $(SITE)
	$(BIN)/python -m pytest --numprocesses=auto -m site

wheel: setup ## a wheel that holds what src/heed holds
	@echo "== wheel"
	@rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel dist/heed-*.whl
	diff -r -q -x __pycache__ src/heed build/wheel/heed

chapters: setup ## run every chapter and write its outputs back
	$(BIN)/python tools/notebooks.py run

chapter: setup ## run one: make chapter N=05
	$(BIN)/python tools/notebooks.py run $(N)

exercises: setup ## the readers' notebooks and the solutions, from the masters
	$(BIN)/python tools/exercises.py build

clean: ## forget what was built, keep what was installed
	rm -rf book/_build build dist
