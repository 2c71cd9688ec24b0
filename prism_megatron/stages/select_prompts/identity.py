"""What the pass rates in a folder are of: a folder that was begun is gone on with by the same policy, data and draws.

Free of torch: the command asks before any process is started.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prism_megatron.config.fields import OnResume
from prism_megatron.config.json_file import read_object
from prism_megatron.config.merge import merge, to_plain
from prism_megatron.config.resume import differences
from prism_megatron.config.stages.select_prompts import SelectPromptsConfig
from prism_megatron.data.identity import Identity, what_differs
from prism_megatron.disk import write_atomically, writing
from prism_megatron.errors import ConfigError
from prism_megatron.run.folder import holds_run

BEGUN = "begun.json"
_ELSEWHERE = "begin in another --output"


def check_same_asked(config: SelectPromptsConfig) -> None:
    """Raise ConfigError, in one line, where --output holds a run, or was begun with other flags that count."""
    output = config.output
    if output is None or not output.exists():
        return
    if not output.is_dir() or holds_run(output):
        raise ConfigError(f"--output {output} is a run's folder, or none at all; {_ELSEWHERE}")
    if (begun := _begun(output)) is None:
        return
    changed = differences(merge(SelectPromptsConfig(), begun["config"]), config)
    if refused := [one for one in changed if one.on_resume is OnResume.FIXED]:
        raise ConfigError(
            f"{output} was begun otherwise: {'; '.join(map(str, refused))}. Leave "
            f"{' and '.join(one.flag for one in refused)} as before, or {_ELSEWHERE}"
        )


def settle(output: Path, config: SelectPromptsConfig, *, policy: Path, data: Identity) -> None:
    """Write down what is asked of whom, or see that it is what was begun; on the main rank.

    Blind to weights that were replaced in the same folder. Raises ConfigError where it is another.
    """
    now = {"config": to_plain(config), "policy": str(policy), "data": dict(data)}
    begun = _begun(output)
    if begun is None:
        with writing(output / BEGUN):
            write_atomically(output / BEGUN, f"{json.dumps(now, indent=1)}\n")
        return
    if begun["policy"] != now["policy"]:
        raise ConfigError(
            f"{output} was begun with the policy {begun['policy']}, and --model now is {policy}; {_ELSEWHERE}"
        )
    if (difference := what_differs(begun["data"], data)) is not None:
        raise ConfigError(f"{output} was begun with other records of --data: {difference}; {_ELSEWHERE}")


def _begun(output: Path) -> dict[str, Any] | None:
    path = output / BEGUN
    if not path.is_file():
        return None
    found = read_object(path, error=ConfigError)
    if missing := {"config", "policy", "data"} - found.keys():
        raise ConfigError(f"{path}: {min(missing)} is missing; {_ELSEWHERE}")
    return found
