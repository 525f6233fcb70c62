PYTHON ?= python3
BIN := .venv/bin

# The oldest supported Python on this machine, pyenv's included.
OLDEST_PYTHON ?= $(shell for v in 3.10 3.11 3.12 3.13; do \
	for p in python$$v $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$v.*/bin/python; do \
	$$p -c 'import venv' 2>/dev/null && echo $$p && exit; done; done)

.PHONY: demo test wheel test-gpu test-oldest test-extras docs clean

# Train on handwritten digits, draw samples, measure them: runs/digits.
demo: .venv/train
	$(BIN)/pmf digits --out runs/digits --overwrite
	$(BIN)/pmf eval runs/digits

# Lint, formatting, types and every test, one file at a time per core; on the CPU even if there is a GPU.
test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The wheel alone in an empty environment, used from an empty folder: nothing of the extras, a step, a sample, `pmf`.
# build/lib is removed because setuptools would pack what an earlier build left there.
wheel:
	rm -rf .venv-wheel build/lib
	$(PYTHON) -m venv .venv-wheel
	mkdir .venv-wheel/empty
	.venv-wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir .venv-wheel .
	.venv-wheel/bin/python -m pip install --quiet --constraint constraints.txt .venv-wheel/*.whl
	! .venv-wheel/bin/python -m pip list | grep -iE '^(matplotlib|scikit-learn|tyro|pillow|tqdm) '
	cd .venv-wheel/empty && ../bin/python - <$(CURDIR)/tests/core_alone.py
	cd .venv-wheel/empty && ! ../bin/pmf --help 2>../message
	test $$(wc -l < .venv-wheel/message) = 1 && grep "pip install 'pixel-meanflow\[train\]'" .venv-wheel/message

# The tests that need a GPU, then every kernel test on it, except those that compile for other chips; many processes
# compile the kernels.
test-gpu: .venv/dev
	$(BIN)/python -m pytest -m gpu -rs tests/test_gpu.py tests/pmf/test_averages.py tests/pmf/test_cuda_graphs.py \
		tests/pmf/test_jvp_packages.py tests/pmf/test_jvp_flex_attention.py tests/pmf/test_jvp_varlen.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 12 --dist worksteal tests/kernels \
		--ignore tests/kernels/test_static.py

# Every test on the lowest versions that pyproject.toml declares: several GB.
test-oldest: .venv-oldest/ready
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest --numprocesses auto --dist loadfile

# The tests of the optional packages (perceptual networks, FID, JAX, flash-attn-4, Liger, timm, diffusers), with a newer
# PyTorch: several GB.
test-extras: .venv-extras/ready
	OMP_NUM_THREADS=1 .venv-extras/bin/python -m pytest -m extras --numprocesses auto --dist loadfile

# The pages of docs/ as HTML in build/docs, with an API reference from docstrings; a broken link is an error.
docs: .venv/docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs

clean:
	rm -rf .venv .venv-wheel .venv-oldest .venv-extras

.venv/train: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train]'
	touch $@

.venv/dev: .venv/train
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/docs: .venv/train
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[dev]'
	touch $@

.venv-extras/ready: pyproject.toml constraints-extras.txt
	$(PYTHON) -m venv .venv-extras
	.venv-extras/bin/python -m pip install --quiet --constraint constraints-extras.txt \
		--editable '.[train,perceptual,eval,posttrain,jax,jax-checkpoints,flash]' \
		optax diffusers liger-kernel pytest pytest-benchmark pytest-xdist hypothesis expecttest
	touch $@
