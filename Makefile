# Everything a contributor runs. Needs Python >= 3.11, make and git; the first target that needs packages makes .venv.
# Another interpreter: make PYTHON=/path/to/python3.12 test
# More arguments:      make test ARGS="tests/model -x"

PYTHON ?= python3
ARGS ?=
# A file's tests stay in one process, which shares its fixtures. One process: make test PARALLEL=
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile
BIN := .venv/bin
HELM := PATH="$(CURDIR)/.tools/bin:$$PATH" helm

MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check lint types imports charts docs-check format docs golden bench images release \
	kind kind-e2e pin-images clean clean-all

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: ## Create or repair .venv (every target below does it by itself)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "setup: Python 3.11 or newer is needed, $(PYTHON) is" \
			"`command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1 || echo missing`;" \
			"name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) scripts/setup_venv.py

demo: setup ## Run the whole lifecycle on this machine: data to a served model
	@$(BIN)/nvila run $(ARGS)

test: setup ## Run the tests that need neither a GPU nor a cluster
	@$(BIN)/pytest $(PARALLEL) $(ARGS)

test-all: setup ## Run also the slow tests
	@$(BIN)/pytest --slow $(PARALLEL) $(ARGS)

check: lint types imports charts docs-check ## Run every check that is not a test; CI runs this

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup
	@$(BIN)/mypy

imports: setup
	@$(BIN)/lint-imports

charts: setup
	@$(BIN)/python scripts/tools.py
	@# The alert rules' own checks; a machine that cannot have it skips them and says so.
	@$(BIN)/python scripts/prometheus.py || true
	@$(BIN)/python scripts/chart_docs.py --check
	@$(BIN)/python scripts/upgrade_diff.py
	@for chart in charts/*/Chart.yaml; do $(HELM) lint --strict --quiet "$${chart%/Chart.yaml}" || exit 1; done

docs-check: setup
	@$(BIN)/python scripts/check_docs.py --check

format: setup ## Format the code and fix what ruff can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: setup ## Regenerate the generated pages of docs/ and the charts' tables of values
	@$(BIN)/python scripts/check_docs.py --write
	@$(BIN)/python scripts/chart_docs.py

golden: setup ## Accept what the code says now as tests/golden (review the diff)
	@$(BIN)/pytest --update-golden $(ARGS)

bench: setup ## Run the quick benchmarks and regenerate docs/benchmarks.md
	@for program in benchmarks/*/*.py; do echo "== $$program"; \
		case "$$program" in *_gpu.py) command -v nvidia-smi > /dev/null || { echo "skipped: no GPU"; continue; };; esac; \
		$(BIN)/python "$$program" --quick || exit 1; done
	@$(BIN)/python scripts/check_docs.py --write

kind: charts ## Install the platform on a kind cluster of this machine (docs/install.md)
	@scripts/kind.sh up

kind-e2e: charts ## Run the tiny lifecycle on that cluster and assert what came out
	@scripts/kind.sh e2e

images: setup ## Build the images of docker/ with Docker, Podman or Buildah (ARGS="serve --cpu")
	@$(BIN)/python scripts/images.py $(ARGS)

pin-images: setup ## Ask the registries for the digests of base images and of the charts' images, and write them down
	@$(BIN)/python scripts/pin_images.py $(ARGS)

release: setup ## Build the wheel, the charts and the compiled pipelines into dist/ (ARGS=--final to publish)
	@$(BIN)/python scripts/tools.py
	@$(BIN)/python scripts/release.py $(ARGS)

clean: ## Remove caches and build results
	@rm -rf dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find model platform pipelines tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## Remove also .venv, .tools and the demo's workspace
	@rm -rf .venv .tools nvila-workspace
