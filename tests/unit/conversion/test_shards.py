"""Files laid out from headers: how full they are, where each tensor begins, and what the index says."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from prism_megatron.conversion.hf.reader import INDEX
from prism_megatron.conversion.hf.shards import Spec, lay_out

SPECS = {
    "a": Spec((3,), torch.bfloat16),  # 6 bytes
    "b": Spec((2, 2), torch.float32),  # 16
    "c": Spec((5,), torch.uint8),  # 5
    "d": Spec((2,), torch.float64),  # 16
    "e": Spec((50,), torch.uint8),  # more than a file takes
    "f": Spec((1,), torch.uint8),
}


def test_files_are_filled_in_order_and_no_further() -> None:
    """Claim: a tensor goes into the next file where it would make this one larger than asked for; one that is larger
    by itself has a file of its own, and every file starts empty."""
    for limit, expected in (
        (22, ["ab", "cd", "e", "f"]),
        (21, ["a", "bc", "d", "e", "f"]),
        (27, ["abc", "d", "e", "f"]),
        (42, ["abc", "d", "e", "f"]),
        (43, ["abcd", "e", "f"]),
        (1, list("abcdef")),
    ):
        folder = lay_out(SPECS, limit)
        assert ["".join(sorted(shard.begins)) for shard in folder.shards] == expected, limit
        assert json.loads(folder.index or "")["metadata"] == {"total_size": 6 + 16 + 5 + 16 + 50 + 1}


def test_what_is_laid_out_is_a_folder_of_safetensors(tmp_path: Path) -> None:
    """Claim: tensors lie without gaps, each at a multiple of its own width in a file whose numbers begin at a multiple
    of 8, and safetensors finds them where the plan says. Oracle: safetensors."""
    folder = lay_out(SPECS, 10**6)
    (shard,) = folder.shards
    assert (shard.name, folder.index) == ("model.safetensors", None)
    ends = {begin + SPECS[name].num_bytes for name, begin in shard.begins.items()}
    assert ends - set(shard.begins.values()) == {shard.num_bytes}
    assert min(shard.begins.values()) == len(shard.head)
    assert len(shard.head) % 8 == 0
    assert all(begin % SPECS[name].dtype.itemsize == 0 for name, begin in shard.begins.items())
    content = bytes(number % 251 for number in range(shard.num_bytes - len(shard.head)))
    (tmp_path / shard.name).write_bytes(shard.head + content)
    with safe_open(tmp_path / shard.name, framework="pt") as file:
        assert set(file.keys()) == set(SPECS)
        for name, spec in SPECS.items():
            begin = shard.begins[name] - len(shard.head)
            expected = torch.frombuffer(bytearray(content[begin : begin + spec.num_bytes]), dtype=torch.uint8)
            assert torch.equal(file.get_tensor(name).view(-1).view(torch.uint8), expected)
            assert tuple(file.get_slice(name).get_shape()) == spec.shape


def test_the_index_names_every_tensor_with_its_file(tmp_path: Path) -> None:
    folder = lay_out(SPECS, 22)
    folder.write_index(tmp_path)
    assert json.loads((tmp_path / INDEX).read_text())["weight_map"] == {
        name: f"model-0000{number}-of-00004.safetensors" for number, names in enumerate(("ab", "cd", "e", "f"), 1)
        for name in names
    }  # fmt: skip
