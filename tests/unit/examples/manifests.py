"""What Kubernetes, Kubeflow Trainer and SkyPilot take, as far as our manifests use it: another key is an error.

Written by hand from their public references (JobSet v1alpha2, Kubeflow Trainer v1alpha1 as of 2.2, Kubernetes core v1,
SkyPilot's task YAML). A shape is a type, ``[shape]`` for a list, ``{str: shape}`` for any keys, a set of values that
there may be, a pattern, or a mapping of keys, those with ``?`` being optional.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LABELS = {str: str}
_METADATA = {"name": re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"), "labels?": _LABELS}
_QUANTITY = re.compile(r"\d+([KMGT]i)?")
_RESOURCES = {"nvidia.com/gpu": int, "cpu": int, "memory": _QUANTITY}
_CONTAINER = {
    "name": {"node"},  # Trainer overrides the container of this name in the job of this name
    "image": str,
    "workingDir?": str,
    "volumeMounts?": [{"name": str, "mountPath": re.compile("/.+")}],
    "securityContext?": {"capabilities": {"add": [str]}},
}
_VOLUME = {
    "name": str,
    "persistentVolumeClaim?": {"claimName": str},
    "emptyDir?": {"medium": {"Memory"}, "sizeLimit": _QUANTITY},
}
_POD = {
    "restartPolicy": {"Never", "OnFailure"},
    "terminationGracePeriodSeconds?": int,
    "containers": [_CONTAINER],
    "volumes?": [_VOLUME],
}
_JOB = {"backoffLimit": int, "template": {"spec": _POD}}
_JOBSET = {
    "failurePolicy?": {"maxRestarts": int},
    "replicatedJobs": [
        {
            "name": {"node"},
            "template": {
                "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": {"trainer"}}},
                "spec": _JOB,
            },
        }
    ],
}
_API = {"trainer.kubeflow.org/v1alpha1"}
RUNTIME = {
    "apiVersion": _API,
    "kind": {"TrainingRuntime"},
    "metadata": _METADATA,
    # Since 2.2 the number of processes stands in the job alone.
    "spec": {"mlPolicy": {"numNodes": int, "torch": {}}, "template": {"spec": _JOBSET}},
}
TRAIN_JOB = {
    "apiVersion": _API,
    "kind": {"TrainJob"},
    "metadata": _METADATA,
    "spec": {
        "runtimeRef": {"apiGroup": {"trainer.kubeflow.org"}, "kind": {"TrainingRuntime"}, "name": str},
        "trainer": {
            "image?": str,
            "numNodes": int,
            "numProcPerNode": int,
            "resourcesPerNode": {"requests": _RESOURCES, "limits": _RESOURCES},
            "command": [str],
            "args": [str],
        },
    },
}
SKY_TASK = {
    "name": re.compile(r"[a-zA-Z0-9]+([-_.a-zA-Z0-9]*[a-zA-Z0-9])?"),
    "num_nodes": int,
    "workdir?": str,
    "resources": {
        "infra?": re.compile(r"[a-z0-9]+(/.+)*"),
        "accelerators": re.compile(r"[A-Z][A-Z0-9-]+:\d+"),
        "network_tier?": {"standard", "best"},
        "image_id?": re.compile(r"docker:.+"),
        "job_recovery?": {
            "strategy?": {"FAILOVER", "EAGER_NEXT_REGION"},
            "max_restarts_on_errors?": int,
            "recover_on_exit_codes?": [int],
        },
    },
    "volumes?": {str: str},
    "file_mounts?": {str: str},
    "envs?": {str: str},
    "setup?": str,
    "run": str,
}


def complaints(value: Any, shape: Any, where: str = "") -> list[str]:
    """What of ``value`` is not as ``shape`` says, each with its place."""
    if isinstance(shape, type):
        fits = isinstance(value, shape) and not (shape is int and isinstance(value, bool))
        return [] if fits else [f"{where}: {value!r} is no {shape.__name__}"]
    if isinstance(shape, set):
        return [] if isinstance(value, str) and value in shape else [f"{where}: {value!r} is none of {sorted(shape)}"]
    if isinstance(shape, re.Pattern):
        return [] if isinstance(value, str) and shape.fullmatch(value) else [f"{where}: {value!r} has another form"]
    if isinstance(shape, list):
        if not isinstance(value, list) or not value:
            return [f"{where}: {value!r} is no list of something"]
        return [line for place, one in enumerate(value) for line in complaints(one, shape[0], f"{where}[{place}]")]
    return _of_keys(value, shape, where)


def _of_keys(value: Any, shape: Mapping[Any, Any], where: str) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"{where}: {value!r} has no keys"]
    if set(shape) == {str}:
        return [line for key, one in value.items() for line in complaints(one, shape[str], f"{where}.{key}")]
    known = {name.removesuffix("?"): one for name, one in shape.items()}
    lines = [f"{where}.{name}: is missing" for name in shape if not name.endswith("?") and name not in value]
    for key, one in value.items():
        place = f"{where}.{key}"
        lines += complaints(one, known[key], place) if key in known else [f"{place}: there is no such key"]
    return lines
