"""Scenes that are asked again and again, such as those that ``prism-select-prompts`` chose."""

from __future__ import annotations

from collections.abc import Sequence

from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.data.identity import Identity, identity_of
from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.data.scenes import Scene, Split, keyed_generator, scene_of
from prism_megatron.data.selection import Selection, digest_of
from prism_megatron.data.teachers import write
from prism_megatron.errors import DataError


class SceneSet:
    """These scenes, with faithful references, in a new order every epoch."""

    counts = None

    def __init__(self, scenes: Sequence[Scene], renderer: Renderer, *, seed: int, batch_size: int) -> None:
        self.scenes = scenes
        self._renderer = renderer
        self._seed = seed
        self._batch_size = batch_size

    @property
    def identity(self) -> Identity:
        parts = ((f"{scene.id}\n{scene.question.text}", ()) for scene in self.scenes)
        return identity_of("data", parts, batch_size=self._batch_size)

    def batch(self, step: int) -> list[Example]:
        return [self.example(step * self._batch_size + i) for i in range(self._batch_size)]

    def example(self, position: int) -> Example:
        """Example number ``position`` of the endless sequence of shuffled epochs."""
        epoch, offset = divmod(position, len(self.scenes))
        order = keyed_generator("epoch of scenes", self._seed, epoch).permutation(len(self.scenes))
        return self.in_order(int(order[offset]))

    def in_order(self, index: int) -> Example:
        """The example of number ``index`` of ``scenes``."""
        scene = self.scenes[index]
        return Example(
            prompt=self._renderer.prompt(scene.id, scene.question.text, [scene.image()]),
            reference=self._renderer.response(*write(scene, "faithful"), id=scene.id),
            scene=scene,
        )


def selected_scenes(selection: Selection, *, split: Split, mini: MiniWorld) -> list[Scene]:
    """The scenes of a selection, in the order of its file, whatever the run's seed.

    Raises DataError, naming the line, for an id of no scene of that split and world, and for one that had another
    question or answer when it was selected.
    """
    found = []
    for name, (where, digest) in selection.lines.items():
        scene = scene_of(name)
        if scene is None or (scene.split, scene.world) != (split, mini):
            raise DataError(
                f"{where}: field id: {name!r} is no scene of the split {split!r} of --mini {mini}; select scenes by "
                f"prism-select-prompts --mini {mini}, or name the set of records that it is of by --data"
            )
        if digest not in (None, digest_of(scene)):
            raise DataError(
                f"{where}: field digest: {name!r} had another question or answer when it was selected; select scenes "
                f"anew by prism-select-prompts --mini {mini}"
            )
        found.append(scene)
    return found
