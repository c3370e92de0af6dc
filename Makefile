# visattn: every target below starts from a fresh clone with nothing but Python >= 3.11; run `make` for the list.
# Written for the make of Linux and of macOS (3.81). Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV   ?= .venv
TESTS  ?= tests

BIN   := $(VENV)/bin
STAMP := $(VENV)/.visattn-installed
# Commands are printed as a user types them after `. .venv/bin/activate`.
export PATH := $(abspath $(BIN)):$(PATH)
# One thread a process: pytest runs a process a core, and their thread pools would fight over the cores.
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 8 -q --durations 5

.PHONY: help install demo test test-all check format docs minimum clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train on the embedded pictures, predict held-out ones, show where the results are (6 minutes)"
	@echo "make test      the fast tests (10 minutes on two cores); one file: make test TESTS=tests/test_labels.py"
	@echo "make test-all  every test (60 minutes on two cores)"
	@echo "make check     format, lint, types, documentation: what CI runs before the tests"
	@echo "make format    rewrite the files as 'make check' wants them"
	@echo "make docs      build the documentation into site/"
	@echo "make minimum   the fast tests on the oldest supported release of every dependency, in build/minimum"
	@echo "make clean     remove what these commands made, the environment included; runs/ and demo/ stay"
	@echo "Each makes $(VENV) first if it is missing."

# The environment is renewed when pyproject.toml changes. Of what pip says, only the large downloads are shown: package
# mirrors can make it print hundreds of harmless lines. All of it is in $(VENV)/install.log, whose end is shown on failure.
install: $(STAMP)
$(STAMP): pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "visattn needs Python >= 3.11, and '$(PYTHON)' is not: name another one, as in make PYTHON=python3.12 test" >&2; \
	  exit 1; }
	@echo "Installing visattn into $(VENV): PyTorch is several GB, so this takes 3 to 10 minutes."
	@rm -f "$(STAMP)"
	@"$(PYTHON)" -m venv "$(VENV)"
	@{ "$(BIN)/python" -m pip install --disable-pip-version-check -e '.[dev]' && touch "$(STAMP)"; } 2>&1 \
	  | tee "$(VENV)/install.log" \
	  | sed -nE -e 's/^ *(Downloading|Using cached) ([^ ]*\/)?([^ \/]*) (\([0-9]{3,}\.[0-9] MB\)).*/  \3 \4/p' \
	    -e 's/^Installing collected packages.*/  installing/p'
	@test -f "$(STAMP)" || { tail -n 20 "$(VENV)/install.log" >&2; exit 1; }

# The recipe as it is, but for a smaller backbone, size and number of epochs, which two cores manage in a few minutes.
DEMO := --model.network.backbone resnet18 --data.size 96 --trainer.max_epochs 32 --trainer.precision 32-true

demo: $(STAMP)
	@echo "Each command is printed before it runs. To type them yourself: . $(BIN)/activate"
	rm -rf demo
	visattn fit --config recipes/polyp_pranet.yaml --run demo/run $(DEMO)
	visattn phantom demo/held-out --count 24 --seed 1
	visattn predict demo/held-out/images --checkpoint demo/run --output demo/masks --overlays
	visattn test --config demo/run/config.yaml --run demo/run --data.test_root demo/held-out
	@python -c 'import json; rows = json.load(open("demo/run/test/summary.json"))["metrics"]; \
	  row = next(row for row in rows if row["metric"] == "dice"); \
	  print("Dice on the held-out images: {mean:.3f} (mean of {cases} with a polyp)".format(**row))'
	@echo "checkpoint  demo/run/checkpoints/best.ckpt"
	@echo "metrics     demo/run/metrics.csv (training), demo/run/test/cases.csv (held-out images)"
	@echo "overlays    demo/masks/overlays/"
	@echo "report      demo/run/report.html"

test: $(STAMP)
	$(PYTEST) $(TESTS)

test-all: $(STAMP)
	$(PYTEST) -m "" $(TESTS)

check: $(STAMP)
	ruff format --check .
	ruff check .
	mypy
	$(MAKE) docs

format: $(STAMP)
	ruff format .
	ruff check --fix .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --site-dir site

# The floors of pyproject.toml, installed and tested for real. Old releases deprecate nothing that we do, but much that the
# newer packages around them do.
minimum: $(STAMP)
	"$(PYTHON)" -m venv build/minimum
	python tests/test_minimum_versions.py > build/minimum/constraints.txt
	build/minimum/bin/python -m pip install -q -q --disable-pip-version-check -e '.[dev]' -c build/minimum/constraints.txt
	OMP_NUM_THREADS=1 build/minimum/bin/python -m pytest -n auto --maxprocesses 8 -q -W ignore::DeprecationWarning \
	  -W ignore::FutureWarning $(TESTS)

clean:
	rm -rf $(VENV) build site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find visattn tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
