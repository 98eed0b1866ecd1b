# make demo · make test · make lint · make bench · make bench-check: each sets up .venv itself when needed.
PYTHON ?= python3.11
BIN := .venv/bin
export NO_TORCH_COMPILE := 1

.PHONY: demo test test-gpu lint bench bench-check clean

# resemblyzer holds the weights of an encoder of voices; what it depends on (librosa, a compiler) is not needed.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "Python 3.11 is needed; give it with: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into .venv (about 7.5 GB, two minutes on a fast connection) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps resemblyzer==0.1.4
	touch $@

demo: RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)
demo: .venv/.installed
	$(BIN)/python -m finetune.train experiment=demo run_dir=$(RUN)
	$(BIN)/python -m inference.generate checkpoint=$(RUN) output=$(RUN)/answer.wav \
	  input=sample_data/audio/dialogue_1.flac channel=1 sampling.temp=0.3 sampling.temp_text=0.3

# A process for each core. Tests of one file stay in one process: they share checkpoints that were trained for them.
test: .venv/.installed
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile

# What needs a CUDA GPU; `make test` shows these tests as skipped where there is none.
test-gpu: .venv/.installed
	$(BIN)/python -m pytest tests/gpu

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# peers=FOLDER: checkouts of ttt-video-dit, ttt-lm-pytorch and moshi-finetune to compare with (docs/speed.md).
bench: .venv/.installed
	$(BIN)/python -m benchmarks $(if $(peers),peers=$(peers))

bench-check: .venv/.installed
	$(BIN)/python -m benchmarks check $(if $(peers),peers=$(peers))

clean:
	rm -rf .venv runs build dist *.egg-info
