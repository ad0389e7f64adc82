# Every target sets up what it needs in a local virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where this is set, each of some hundred processes of the tests compiles every module it imports, torch's too.
unexport PYTHONDONTWRITEBYTECODE
SOURCES := setup.py pyproject.toml constraints.txt build_backend.py $(shell find csrc -type f)

.PHONY: demo test bench gpu docs lint format wheel clean

# What a newcomer sees: build, train, compare.
demo: $(VENV)/installed
	$(BIN)/fused-attn demo

test: $(VENV)/installed $(VENV)/hosts
	$(BIN)/pytest -n 2 --dist worksteal

# Renders committed results, and the pages that show them; `fused-attn bench --out benchmarks/results` measures.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/report/readme.py

# A round on a GPU machine, with the interpreter and packages that are there: see benchmarks/README.md.
OUT ?= benchmarks/gpu-round
gpu:
	$(PYTHON) benchmarks/gpu/gpu_round.py --out '$(OUT)' $(if $(SLICE),--slice $(SLICE)) \
		$(if $(BUDGET),--budget $(BUDGET)) $(if $(DATA),--data '$(DATA)') $(if $(RETRY),--retry) $(if $(DRY_RUN),--dry-run)

# The documentation as a site that needs no network: site/index.html.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc examples -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc examples -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format -i

# torch comes first and pinned: with it present, nothing that follows fetches another build of it.  Most modules of the
# packages are never imported: not compiling them saves a minute.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt torch numpy setuptools ninja
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	FUSED_ATTN_REQUIRE_EXTENSION=1 $(BIN)/pip install --quiet --no-compile --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@

# Packages that tests compare with or export to.  Apart from the environment and without what they require: torchmetrics imports
# transformers where it finds it, which takes every training 1.6 s, and fails beside timm's torchvision, built for CUDA alone.
$(VENV)/hosts: $(VENV)/torch
	$(BIN)/pip install --quiet --no-deps --no-compile --upgrade --target $@ -c constraints.txt \
		timm transformers regex tokenizers bottleneck-transformer-pytorch einops \
		opacus opt_einsum onnx onnx-ir onnxscript onnxruntime ml_dtypes protobuf flatbuffers
	touch $@

# One wheel for every Python and torch, tagged with the manylinux that its library is fit for.  Torch's libraries stay out:
# `show`, which cannot be told so, therefore calls it linux_x86_64 first, and then names that manylinux.
wheel: $(VENV)/installed
	rm -rf build/lib* build/wheel dist/fused_attn-*.whl
	FUSED_ATTN_REQUIRE_EXTENSION=1 $(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl
	$(BIN)/auditwheel show dist/fused_attn-*.whl

clean:
	rm -rf build dist site *.egg-info fused_attn/_C*.so
