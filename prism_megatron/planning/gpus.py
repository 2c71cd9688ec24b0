"""GPUs by what their makers publish: nothing here was measured.

Dense bf16 is half of what a sheet states "with sparsity". Sheets state NVLink both ways together; here it is one way,
and so is the network, of which a GPU has its own port in the maker's reference system. Memory is what CUDA has been
seen to tell of such a device where that is known, else the sheet's figure with 2 % off, in GiB of 2^30 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One device, and the system that it stands in."""

    name: str
    memory_gib: float
    bf16_tflops: float
    """dense"""
    hbm_gbs: float
    """GB of 10^9 bytes a second from its own memory"""
    nvlink_gbs: float
    """GB a second one way to other GPUs of the same domain"""
    network_gbs: float
    """GB a second one way to another domain, on the GPU's own port"""
    domain: int
    """GPUs that reach one another by NVLink"""
    source: str


_HGX = "400 Gb/s a GPU: DGX user guide"
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-80", 79, 312, 2039, 300, 25, 8, "A100 80GB SXM datasheet; 200 Gb/s a GPU: DGX A100 user guide"),
        Gpu("h100-80", 79, 989.4, 3350, 450, 50, 8, f"H100 SXM datasheet; {_HGX}"),
        Gpu("h200-141", 139, 989.4, 4800, 450, 50, 8, f"H200 SXM datasheet; {_HGX}"),
        Gpu("b200-180", 164, 2250, 8000, 900, 50, 8, f"DGX B200 datasheet; {_HGX}"),
        Gpu("gb200-186", 182, 2500, 8000, 900, 50, 72, "GB200 NVL72 datasheet; 400 Gb/s a GPU"),
        Gpu("gb300-279", 254, 2500, 8000, 900, 100, 72, "GB300 NVL72 datasheet; 800 Gb/s a GPU"),
    )
}


def gpu_of(name: str) -> Gpu:
    """The GPU of that name. Raises ConfigError, naming those there are, for another one."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name} is not in the table; use one of {', '.join(GPUS)} (docs/plan.md)")
    return GPUS[name]
