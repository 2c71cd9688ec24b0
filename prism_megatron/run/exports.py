"""What is written of a trained policy: its files in checkpoints, and the model folder at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prism_megatron.conversion.checkpoints.folder import ModelFiles, companions_folder
from prism_megatron.data.render import Renderer
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.run.session import Session
from prism_megatron.run.stage import Artefacts, Plain
from prism_megatron.training.roles import export_folder


@dataclass(frozen=True)
class Exports:
    """What is written of a run beside its figures: files of its models, and how answers read."""

    models: Mapping[str, ModelFiles]
    """what checkpoints keep of each role"""
    title: str
    """the report's head"""
    trained: str
    """what the policy is once an update touched it, such as ``aligned policy``"""
    renderer: Renderer

    def write(self, policy: MegatronEngine, folder: Path, session: Session, figures: Plain | None = None) -> Artefacts:
        """The policy as a Hugging Face folder, with the files that the newest checkpoint keeps; all ranks together.

        Only a policy that was updated is called trained.
        """
        what = self.trained if policy.was_updated else "policy as it came (no update touched it)"
        with session.phase("export", f"exporting the {what} to {folder}"):
            like = companions_folder(session.checkpoints.newest, "policy")
            export_folder(policy, folder, like=like, world=policy.world)
        return Artefacts(folder, what, figures or {})
