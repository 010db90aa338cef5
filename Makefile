# `make` alone lists the targets. Every target sets up what it needs; a second run sets up nothing.

PYTHON     ?= python3
CONFIG     ?= experiments/vluer/mini.yaml
CHECKPOINT ?= last
SUBJECT    ?= vluer
TABLE      ?= experts
PROMPT     ?= a photograph of old coins . the camera zooms in quickly .
ARGS       ?=

# Values are text. make would run $(shell ...) in them wherever they are used, and in every recipe, because it exports them.
# Only ARGS is shell: the shell splits it into words.
CONFIG_FROM := $(origin CONFIG)
$(foreach name,CONFIG CHECKPOINT SUBJECT TABLE PROMPT ARGS,$(eval override $(name) := $$(value $(name))))
quoted = '$(subst ','\'',$(1))'

VENV  := .venv
STAMP := $(VENV)/.set-up
LUVE  := $(VENV)/bin/luve
WORLD := data/mini/world/MANIFEST.json

# The experts of the mini world: the second adds a few differences to the first.
LFE := --config experiments/experts/mini-lfe.yaml
HFE := $(LFE) --config experiments/experts/mini-hfe.yaml

# HPS v3 cannot share an environment with our models.
HPSV3       := .venv-hpsv3
HPSV3_STAMP := $(HPSV3)/.set-up

# Configurations of the mini world have `mini` in their path; they need its clips and latents first.
MINI_DATA := $(if $(findstring mini,$(CONFIG)),precompute)

FLOORS       := .venv-floors
FLOORS_STAMP := $(FLOORS)/.set-up

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

.PHONY: help
help: ## List the targets
	@echo "LuVe Lightning. Targets:"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-18s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '%s\n' $(call quoted,Variables: CONFIG=$(CONFIG)  CHECKPOINT=$(CHECKPOINT)  ARGS='--key value ...'  PYTHON=$(PYTHON))

.PHONY: setup
setup: $(STAMP) ## Make the virtual environment in .venv (minutes, once)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); try: make setup PYTHON=python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version) (about 3 minutes and 5 GB, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	@touch $(STAMP)

.PHONY: test
test: lint ## Lint, type-check and run every test
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

.PHONY: test-quick
test-quick: $(STAMP) ## Run the tests that are not marked slow, without the linters
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n logical --maxprocesses 4 --dist loadfile -m "not slow" $(ARGS)

# What is compiled for the GPU takes most of the time, on the CPU's cores: four processes share one GPU.
.PHONY: test-gpu
test-gpu: $(STAMP) ## Run the tests that only a GPU shows, some of which need two; elsewhere they are skipped
	$(VENV)/bin/pytest -n 4 --dist loadfile tests/gpu $(ARGS)

.PHONY: lint
lint: $(STAMP) ## Check style, formatting and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

# The oldest versions that pyproject.toml allows, in an environment of their own.
.PHONY: test-floors
test-floors: $(FLOORS_STAMP) ## Run every test with the lowest allowed version of each dependency
	OMP_NUM_THREADS=1 $(FLOORS)/bin/pytest -n logical --maxprocesses 4 --dist loadfile $(NOT_FLOORS) $(ARGS)

# This test compares installed versions with constraints.txt, which holds others.
NOT_FLOORS := --deselect tests/test_environment.py::test_every_installed_dependency_is_pinned

$(FLOORS_STAMP): pyproject.toml tools/floors.py
	@echo "Setting up $(FLOORS) with $$($(PYTHON) --version) (minutes and about 5 GB, once)"
	@$(PYTHON) -m venv $(FLOORS)
	@$(PYTHON) tools/floors.py > $(FLOORS)/floors.txt
	@$(FLOORS)/bin/pip install --quiet --disable-pip-version-check --requirement $(FLOORS)/floors.txt --editable .
	@touch $(FLOORS_STAMP)

.PHONY: format
format: $(STAMP) ## Fix style and formatting
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

.PHONY: mini-world
mini-world: $(WORLD) ## Render the mini world's clips, if they are missing

$(WORLD): | $(STAMP)
	$(LUVE) mini-world

# A third of the training clips are flawed takes, as of clips that somebody collected; the experts' data are selected from them.
RENDER_COMBINATIONS := $(LUVE) mini-world --kind combinations --output data/mini/combinations --train 1642 --val 102 --test 256 --flaws 0.333

.PHONY: combinations
combinations: $(STAMP) ## Render the mini world of combinations, of which a fifth is held out, into data/mini/combinations
	$(RENDER_COMBINATIONS) $(ARGS)

data/mini/combinations/MANIFEST.json: | $(STAMP)
	$(RENDER_COMBINATIONS)

.PHONY: precompute
precompute: $(WORLD) $(STAMP) ## Encode the mini world's clips into data/mini/latents; skips what exists
	$(LUVE) precompute --config experiments/precompute/mini.yaml
	$(LUVE) precompute --config experiments/precompute/mini.yaml --config experiments/precompute/mini-variants.yaml

.PHONY: setup-hpsv3
setup-hpsv3: $(HPSV3_STAMP) ## Make HPS v3's environment in .venv-hpsv3 (minutes, once)

$(HPSV3_STAMP): environment-hpsv3.yml
	@echo "Setting up $(HPSV3) with $$($(PYTHON) --version) (minutes and about 6 GB, once)"
	@$(PYTHON) -m venv $(HPSV3)
	@sed -n 's/^      - "\([^"]*\)".*/\1/p' environment-hpsv3.yml > $(HPSV3)/requirements.txt
	@$(HPSV3)/bin/pip install --quiet --disable-pip-version-check --requirement $(HPSV3)/requirements.txt
	@$(HPSV3)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(HPSV3_STAMP)

# The default is the mini world with its local scorer; `make score CONFIG=experiments/score/ultravideo.yaml` is HPS v3.
SCORE_CONFIG := $(if $(filter command line environment,$(CONFIG_FROM)),$(CONFIG),experiments/score/mini.yaml)
SCORE_VENV   := $(if $(findstring mini,$(SCORE_CONFIG)),$(VENV),$(HPSV3))

.PHONY: score
score: $(if $(findstring mini,$(SCORE_CONFIG)),$(WORLD) $(STAMP),$(HPSV3_STAMP)) ## Score clips by CONFIG (default the mini world's) for selecting training clips
	$(SCORE_VENV)/bin/luve score --config $(call quoted,$(SCORE_CONFIG)) $(ARGS)

.PHONY: train-vae
train-vae: $(WORLD) $(STAMP) ## Train the mini backbone's VAE (a GPU)
	$(LUVE) fit --config experiments/mini/vae.yaml $(ARGS)

.PHONY: train-vluer
train-vluer: $(STAMP) $(MINI_DATA) ## Train the upsampler by CONFIG, then compare it on the test split
	$(LUVE) fit --config $(call quoted,$(CONFIG)) $(ARGS)
	$(LUVE) test --config $(call quoted,$(CONFIG)) $(ARGS) --ckpt_path last

.PHONY: experts-data
experts-data: $(WORLD) $(STAMP) ## Make the mini world's latents (plain, sharpened), caption embeddings and scores; skips what exists
	$(LUVE) precompute --config experiments/precompute/mini.yaml --config experiments/precompute/mini-experts.yaml
	$(LUVE) embed --config experiments/embed/mini.yaml
	$(LUVE) score --config experiments/score/mini.yaml

.PHONY: train-adaptation
train-adaptation: experts-data ## Adapt the mini transformer to the high resolution, as the base of the experts
	$(LUVE) fit --config experiments/experts/mini-adaptation.yaml $(ARGS)

.PHONY: train-experts
train-experts: train-adaptation ## Adapt, train the low- and the high-frequency expert, and show each one's gain
	$(LUVE) fit $(LFE)
	$(LUVE) test $(LFE) --ckpt_path last
	$(LUVE) fit $(HFE)
	$(LUVE) test $(HFE) --ckpt_path last

.PHONY: evaluate-vluer
evaluate-vluer: $(STAMP) $(MINI_DATA) ## Compare CHECKPOINT with interpolation on the test split
	$(LUVE) test --config $(call quoted,$(CONFIG)) --ckpt_path $(call quoted,$(CHECKPOINT)) $(ARGS)

# No stored latents are needed: clips are encoded as they are upsampled.
.PHONY: evaluate
evaluate: $(WORLD) $(STAMP) ## Upsample the mini world's test clips by every method and measure the videos
	$(LUVE) upsample --config experiments/upsample/mini.yaml
	$(LUVE) evaluate --config experiments/evaluate/mini.yaml $(ARGS)

.PHONY: spectra
spectra: $(STAMP) ## Show when frequency bands resolve in the mini backbone, and the sigma_switch that follows
	$(LUVE) spectra --config experiments/spectra/mini.yaml $(ARGS)

# Passed in the environment, because a prompt may hold any character.
.PHONY: generate
generate: export LUVE_PROMPT := $(value PROMPT)
generate: $(STAMP) ## Make a video of PROMPT with the mini backbone, and a contact sheet of its three stages
	$(LUVE) generate --config experiments/generate/mini.yaml --prompt="$$LUVE_PROMPT" $(ARGS)

.PHONY: report
report: $(STAMP) ## Build one page of the mini world's results: tables, curves, spectra, comparisons, videos
	$(LUVE) report $(foreach name,report/mini dashboards/vluer dashboards/experts dashboards/ablations,--config experiments/$(name).yaml) $(ARGS)

# Check TABLE, one or several, before making its data, which takes minutes.
VLUER_TABLES := vluer_parts multi_scale
ifneq ($(filter ablations,$(MAKECMDGOALS)),)
known_table = $(or $(filter all,$(1)),$(wildcard experiments/ablations/$(1)/table.yaml $(1)))
ifneq ($(strip $(foreach name,$(or $(TABLE),none),$(if $(call known_table,$(name)),,$(name)))),)
$(error TABLE=$(TABLE): expected all, or some of $(patsubst experiments/ablations/%/table.yaml,%,$(sort $(wildcard experiments/ablations/*/table.yaml))))
endif
endif

# Latents, caption embeddings and scores of the combinations, for the tables of generated videos.
COMBINATIONS := --index data/mini/combinations/clips.csv
IN_COMBINATIONS = $(COMBINATIONS) --$(1) data/mini/combinations/$(2)

.PHONY: combinations-data
combinations-data: data/mini/combinations/MANIFEST.json $(STAMP) ## Encode, embed and score the combinations, for the tables; skips what exists
	$(LUVE) precompute --config experiments/precompute/mini.yaml --config experiments/precompute/mini-experts.yaml $(call IN_COMBINATIONS,store,latents)
	$(LUVE) embed --config experiments/embed/mini.yaml $(call IN_COMBINATIONS,store,texts)
	$(LUVE) score --config experiments/score/mini-combinations.yaml

# Some of the rivals learn from low-resolution latents.
LOW_RESOLUTION := $(LUVE) precompute $(foreach name,mini mini-rivals,--config experiments/precompute/$(name).yaml) $(call IN_COMBINATIONS,store,latents)

.PHONY: ablations
ablations: $(if $(filter $(VLUER_TABLES) all,$(TABLE)),precompute)
ablations: $(if $(filter-out $(VLUER_TABLES),$(TABLE)),combinations-data) ## Repeat the paper's TABLE, or several (see experiments/ablations), on the mini world, all rows and seeds
	$(if $(filter paradigms all,$(TABLE)),$(LOW_RESOLUTION))
	$(LUVE) ablate $(foreach name,$(TABLE),$(call quoted,$(name))) $(ARGS)

.PHONY: rehearse
rehearse: $(STAMP) ## Run every command of the recipe once, in small, stopped and resumed, into runs/rehearsal
	$(LUVE) rehearse $(ARGS)

.PHONY: sweep
sweep: $(STAMP) ## Run TABLE as a wandb sweep; without an account the same rows and seeds here
	$(LUVE) sweep $(call quoted,$(TABLE)) $(ARGS)

.PHONY: dashboards
dashboards: $(STAMP) ## Save wandb workspaces, or without an account write them to runs/dashboards
	$(LUVE) dashboards $(foreach name,vluer experts ablations,--config experiments/dashboards/$(name).yaml) $(ARGS)

.PHONY: notebooks
notebooks: $(WORLD) $(STAMP) ## Run the notebooks on the mini world; their figures go to docs
	LUVE_FIGURES=$(CURDIR)/docs $(VENV)/bin/jupyter execute notebooks/*.ipynb

.PHONY: docs
docs: $(STAMP) ## Build the documentation, with an API reference, into build/site
	$(VENV)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

.PHONY: bench
bench: $(STAMP) ## Time SUBJECT (see `luve bench --help`) and measure its memory; most need a GPU
	$(LUVE) bench --subject $(call quoted,$(SUBJECT)) $(ARGS)

.PHONY: clean
clean: ## Remove caches; keeps .venv, data and runs
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@echo "Kept $(VENV), data and runs; remove them by hand."
