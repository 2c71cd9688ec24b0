"""Post-training of Qwen3-VL on Megatron-Core with an adversary (README.md)."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("prism-megatron")  # setup.py has it
except PackageNotFoundError:  # a checkout that is used without being installed
    __version__ = "unknown"
