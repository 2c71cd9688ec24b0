# Every target sets up what it needs. PYTHON=python3.12 does it all in an environment of its own (.venv-py312).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
PRINT_PYTHON := -c 'import sys; print(sys.executable)'
INTERPRETER := $(shell $(PYTHON) $(PRINT_PYTHON) 2>/dev/null)
ifeq ($(INTERPRETER),)
# pythonX.Y may be a pyenv shim, which refuses a version that is installed but not selected.
WANTED := $(patsubst python%,%,$(notdir $(PYTHON)))
PYENV_FOUND := $(shell pyenv versions --bare 2>/dev/null | grep -F "$(WANTED)." | tail -n 1)
INTERPRETER := $(or $(shell PYENV_VERSION="$(PYENV_FOUND)" $(PYTHON) $(PRINT_PYTHON) 2>/dev/null),$(PYTHON))
endif

ifeq ($(origin PYTHON),file)
VENV := .venv
else
VENV := .venv-py$(shell $(INTERPRETER) -c 'import sys; print("%d%d" % sys.version_info[:2])' 2>/dev/null)
endif
BIN := $(VENV)/bin
TE_VENV := .venv-te
TE_PIP := $(TE_VENV)/bin/python -m pip --disable-pip-version-check
TE_BUILD_NEEDS := 'cuda-toolkit[cccl,crt,nvcc,profiler]' einops nvdlfw-inspect nvidia-cudnn-frontend onnx onnxscript packaging pydantic
TRL_VENV := .venv-trl
TRL_PIP := $(TRL_VENV)/bin/python -m pip --disable-pip-version-check
SGLANG_VENV := .venv-sglang
SGLANG_PIP := $(SGLANG_VENV)/bin/python -m pip --disable-pip-version-check
# What sglang's own requirements name and its CPU path imports; its pin of torch is not among them.
SGLANG_NEEDS := aiohttp apache-tvm-ffi compressed-tensors dill distro einops fastapi gguf ipython jsonschema llguidance \
    msgspec numpy nvidia-ml-py openai orjson partial_json_parser pillow prometheus-client psutil py-spy pybase64 pydantic \
    python-multipart pyzmq requests scipy sentencepiece setproctitle soundfile tiktoken tokenizers tqdm transformers \
    uvicorn uvloop watchfiles xgrammar xxhash zstandard
LMMS_VENV := .venv-lmms
LMMS_PIP := $(LMMS_VENV)/bin/python -m pip --disable-pip-version-check
# What lmms-eval's client for endpoints imports, and its benchmarks of examples/evaluation/lmms_eval.
LMMS_NEEDS := accelerate aiohttp datasets evaluate filelock httpx jinja2 levenshtein loguru nltk numexpr numpy openai packaging \
    pandas pillow protobuf pydantic pytablewriter python-dotenv pyyaml regex requests sacrebleu scikit-learn scipy sentencepiece \
    sympy tenacity tqdm transformers zstandard
# Files of tests that run at a time; 0 runs all in one process, whose output can be seen as it comes.
JOBS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: help sft align rlvr pipeline test test-long faults sglang test-sglang lmms-eval test-lmms-eval lint types defects golden two-hosts parity gpu-check bench-model bench-convert bench-scoring bench-scoring-long bench-update-long bench-rollout \
    bench-data bench-curation bench-weight-sync bench-handover-shares bench-memory-plan bench-vision-cache bench-checkpoints bench-rewards bench-sft bench-grpo trl te-check effect image-use variants mini clean

help:
	@echo "make sft [ARGS=...]     fine-tune the mini world's policy: torchrun tools/run_sft.py --tp 2 --pp 2"
	@echo "make align [ARGS=...]   align the mini world's policy: torchrun tools/run_align.py --tp 4 --pp 2"
	@echo "make rlvr [ARGS=...]    reinforce its right answers: torchrun tools/run_rlvr.py --tp 2 --pp 2 --algo grpo"
	@echo "make pipeline [ARGS=...]  all five stages on the mini world, evaluated, with one report (a quarter of an hour)"
	@echo "make test [ARGS=...]    all tests that this machine can run, two files at a time (JOBS=0: in one process)"
	@echo "make test-long          the tests that take tens of seconds each (CI runs them too)"
	@echo "make faults [ARGS=...]  kill, fill, cut and turn the clock of 20 short runs at random: does each go on as itself? (half an hour)"
	@echo "make sglang             SGLang's own environment for rollout servers, on machines without CUDA (2.7 GB)"
	@echo "make test-sglang        rollouts, log-probs and weight updates against real SGLang servers"
	@echo "make lmms-eval          lmms-eval's own environment, to ask endpoints with (1.9 GB with a CPU build of torch)"
	@echo "make test-lmms-eval     lmms-eval asks a policy that SGLang serves: does prism-evaluate find the same? (5 minutes)"
	@echo "make lint               ruff and import-linter"
	@echo "make types              mypy --strict"
	@echo "make defects            put known wrong edits into a copy of the code: do the tests notice? (ARGS=losses narrows)"
	@echo "make golden             write the rows that short runs must give (tests/golden) anew"
	@echo "make two-hosts          a run on two hosts (network namespaces, as root), which are cut in every phase (an hour; ARGS=--help)"
	@echo "make parity             is ours the model that transformers has? every layout, fp32 and bf16 (up to 15 minutes)"
	@echo "make bench-model        one 2B layer beside its bare arithmetic; attention and log-probs beside the plain ones"
	@echo "make bench-convert      a 4B model to Megatron and back beside cp: time, memory, equality (45 GB of disk)"
	@echo "make bench-scoring      the discriminator's pass beside padded ways of doing it: time and memory (24 minutes)"
	@echo "make bench-scoring-long one group of 16 answers at the paper's lengths, beside the released way (over an hour, 16 GiB)"
	@echo "make bench-update-long  the policy's update on such a group, beside whole rows (over two hours, 16 GiB)"
	@echo "make bench-rollout      embedded rollouts beside transformers.generate: tokens per second, same greedy tokens"
	@echo "make bench-data         an index of 1.37 million records: time, memory, start-up, records a second (10 minutes)"
	@echo "make bench-weight-sync  handing weights to servers: seconds, bytes and memory of each way beside a plain copy"
	@echo "make bench-handover-shares  what each of four ranks gathers, sends and writes of a hand-over, beside rank 0 alone"
	@echo "make bench-memory-plan  what a GPU holds of a 4B run on eight, by stage and layout, played on the CPU (15 minutes)"
	@echo "make bench-vision-cache a step with a frozen vision tower, its features computed or from disk: time and memory"
	@echo "make bench-checkpoints  the same steps without saves, with saves at once and with saves beside them (2 minutes)"
	@echo "make bench-rewards      checks of answers a second, by kind, of hostile ones too, with 1 and 2 workers (1 minute)"
	@echo "make bench-curation ARGS='--folder FOLDER'  113,000 problems through curation without a network: time, memory (half an hour)"
	@echo "make bench-sft          fine-tuning beside TRL and a plain loop, and packed beside padded: tokens per second, losses"
	@echo "make bench-grpo         a step of GRPO beside TRL's: rollout and update, seconds and the ceiling (20 minutes)"
	@echo "make trl                TRL's own environment for bench-sft and bench-grpo, on machines without CUDA (1.5 GB)"
	@echo "make gpu-check          on one GPU: the same numbers as on the CPU? memory, kernels, times (8 minutes; ARGS=--dry: without one)"
	@echo "make te-check           our calls against Transformer Engine's signatures; builds it (PYTHON=python3.12; long)"
	@echo "make effect             does alignment help? one seed of the second mini world beside a control; no claim (docs/effect.md)"
	@echo "make image-use ARGS='--data FOLDER...'  does fine-tuning on records learn from their images?"
	@echo "make variants           segment, learned, dense, text, joint and segment credit in one report"
	@echo "make mini               rebuild the mini world's weights (ARGS='--world drift': the second world's)"
	@echo "make clean              remove environments, caches and runs"

sft: $(VENV)/.installed
	$(RUN) torchrun tools/run_sft.py --tp 2 --pp 2 $(ARGS)

rlvr: $(VENV)/.installed
	$(RUN) torchrun --nproc-per-node 4 tools/run_rlvr.py --tp 2 --pp 2 --algo grpo $(ARGS)

pipeline: $(VENV)/.installed
	$(RUN) OMP_NUM_THREADS=1 python tools/run_pipeline.py $(ARGS)

align: $(VENV)/.installed
	$(RUN) torchrun tools/run_align.py --tp 4 --pp 2 $(ARGS)

test: $(VENV)/.installed-dev
	$(RUN) OMP_NUM_THREADS=1 python -m pytest -n $(JOBS) --dist loadfile -m "not long" --durations 20 $(ARGS)

test-long: $(VENV)/.installed-dev
	$(RUN) OMP_NUM_THREADS=1 python -m pytest -n $(JOBS) --dist loadfile -m long --durations 20 $(ARGS)

faults: $(VENV)/.installed-dev
	$(RUN) python -m tests.faults $(ARGS)

sglang: $(SGLANG_VENV)/.installed

test-sglang: $(VENV)/.installed-dev $(SGLANG_VENV)/.installed
	$(RUN) OMP_NUM_THREADS=1 python -m pytest tests/sglang $(ARGS)

lmms-eval: $(LMMS_VENV)/.installed

test-lmms-eval: $(VENV)/.installed-dev $(SGLANG_VENV)/.installed $(LMMS_VENV)/.installed
	$(RUN) OMP_NUM_THREADS=1 python -m pytest tests/lmms_eval --slow -s $(ARGS)

lint: $(VENV)/.installed-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) lint-imports

types: $(VENV)/.installed-dev
	$(RUN) mypy

defects: $(VENV)/.installed-dev
	$(RUN) OMP_NUM_THREADS=1 python -m tests.defects $(ARGS)

golden: $(VENV)/.installed-dev
	$(RUN) OMP_NUM_THREADS=1 python -m tests.golden $(ARGS)

two-hosts: $(VENV)/.installed-dev
	$(RUN) python -m tests.two_hosts $(ARGS)

parity: $(VENV)/.installed
	$(RUN) python tools/parity.py $(ARGS)

bench-model: $(VENV)/.installed
	$(RUN) python benchmarks/model.py $(ARGS)

bench-convert: $(VENV)/.installed
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/convert.py $(ARGS)

bench-scoring: $(VENV)/.installed
	$(RUN) python benchmarks/scoring.py $(ARGS)

bench-scoring-long: $(VENV)/.installed
	$(RUN) python benchmarks/scoring_long.py $(ARGS)

bench-update-long: $(VENV)/.installed
	$(RUN) python benchmarks/update_long.py $(ARGS)

bench-rollout: $(VENV)/.installed
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/rollout.py $(ARGS)

bench-data: $(VENV)/.installed
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/data_index.py $(ARGS)

bench-weight-sync: $(VENV)/.installed
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/weight_sync.py $(ARGS)

bench-handover-shares: $(VENV)/.installed-dev
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/handover_shares.py $(ARGS)

bench-memory-plan: $(VENV)/.installed
	$(RUN) OMP_NUM_THREADS=1 python -W ignore benchmarks/memory_plan.py $(ARGS)

bench-vision-cache: $(VENV)/.installed
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/vision_cache.py $(ARGS)

bench-curation: $(VENV)/.installed-dev
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/curation.py $(ARGS)

bench-checkpoints: $(VENV)/.installed
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/checkpoints.py $(ARGS)

bench-rewards: $(VENV)/.installed
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/rewards.py $(ARGS)

bench-sft: $(VENV)/.installed $(TRL_VENV)/.installed
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/sft.py $(ARGS)

bench-grpo: $(VENV)/.installed $(TRL_VENV)/.installed
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/grpo.py $(ARGS)

trl: $(TRL_VENV)/.installed

te-check: $(TE_VENV)/.installed
	CUDA_VISIBLE_DEVICES= $(TE_VENV)/bin/python tools/te_check.py

gpu-check: $(VENV)/.installed
	$(RUN) python tools/gpu_check.py $(ARGS)

effect: $(VENV)/.installed
	$(RUN) python tools/effect.py $(ARGS)

image-use: $(VENV)/.installed
	$(RUN) python tools/image_use.py $(ARGS)

variants: $(VENV)/.installed
	$(RUN) python tools/variants.py $(ARGS)

mini: $(VENV)/.installed
	$(RUN) python tools/make_mini.py $(ARGS)

$(BIN)/python:
	@$(INTERPRETER) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "$(PYTHON) is not a Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(INTERPRETER) -m venv $(VENV)

# torch first: the resolver then has little left to decide.
$(VENV)/.installed: setup.py constraints/cpu.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints/cpu.txt torch
	$(PIP) install --quiet --constraint constraints/cpu.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints/cpu.txt --editable .[dev,quant]
	@touch $@

# Transformer Engine's torch part is compiled here, against the headers in NVIDIA's wheels; no GPU and no CUDA toolkit.
# torch comes first because the build imports it. MAX_JOBS compilers at a time, each with about 1 GB.
$(TE_VENV)/.installed: constraints/te.txt
	$(INTERPRETER) -m venv $(TE_VENV)
	$(TE_PIP) install --quiet --constraint constraints/te.txt torch wheel ninja
	@$(TE_VENV)/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || \
	    { echo "the torch of $(PYTHON) has no CUDA, which Transformer Engine is compiled against; try PYTHON=python3.12" >&2; \
	      exit 2; }
	$(TE_PIP) install --quiet --constraint constraints/te.txt $(TE_BUILD_NEEDS)
	PATH="$(CURDIR)/$(TE_VENV)/bin:$$PATH" MAX_JOBS=$(or $(MAX_JOBS),2) \
	NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 \
	    $(TE_PIP) install --no-build-isolation --constraint constraints/te.txt 'transformer-engine[core_cu13,pytorch]'
	$(TE_PIP) install --quiet --constraint constraints/te.txt megatron-core numpy psutil pyyaml tyro pillow
	@touch $@

$(TRL_VENV)/.installed: constraints/trl.txt
	$(INTERPRETER) -m venv $(TRL_VENV)
	$(TRL_PIP) install --quiet --constraint constraints/trl.txt torch
	$(TRL_PIP) install --quiet --constraint constraints/trl.txt trl transformers accelerate datasets pillow
	$(TRL_PIP) install --quiet --constraint constraints/trl.txt --no-deps torchvision
	@touch $@

# With CUDA, install the package as its authors mean it instead, into the same place:
# python3 -m venv .venv-sglang && .venv-sglang/bin/pip install 'sglang[all]==0.5.23' && touch .venv-sglang/.installed
$(SGLANG_VENV)/.installed: constraints/sglang-cpu.txt
	$(INTERPRETER) -m venv $(SGLANG_VENV)
	$(SGLANG_PIP) install --quiet --constraint constraints/sglang-cpu.txt torch
	$(SGLANG_PIP) install --quiet --constraint constraints/sglang-cpu.txt $(SGLANG_NEEDS)
	$(SGLANG_PIP) install --quiet --constraint constraints/sglang-cpu.txt --no-deps sglang torchvision
	@touch $@

# It asks endpoints and loads no model, so that it is the same with CUDA, but for the size of torch.
$(LMMS_VENV)/.installed: constraints/lmms-eval.txt
	$(INTERPRETER) -m venv $(LMMS_VENV)
	$(LMMS_PIP) install --quiet --constraint constraints/lmms-eval.txt torch
	$(LMMS_PIP) install --quiet --constraint constraints/lmms-eval.txt $(LMMS_NEEDS)
	$(LMMS_PIP) install --quiet --constraint constraints/lmms-eval.txt --no-deps lmms-eval \
	    math-verify latex2sympy2 latex2sympy2_extended antlr4-python3-runtime
	@touch $@

clean:
	rm -rf .venv .venv-py* .venv-te .venv-trl .venv-sglang .venv-lmms runs build .cache *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
