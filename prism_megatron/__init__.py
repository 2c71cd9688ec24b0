"""Post-training of Qwen3-VL on Megatron-Core with an adversary (README.md)."""


def __getattr__(name: str) -> str:
    """``__version__``, when somebody asks: what every command imports first stays small, so that Ctrl-C is heard."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("prism-megatron")  # setup.py has it
    except PackageNotFoundError:  # a checkout that is used without being installed
        return "unknown"
