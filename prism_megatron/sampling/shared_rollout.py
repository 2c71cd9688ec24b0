"""The servers of a whole world of ranks: all sample, and the main rank opens and ends what hands weights over.

A whole export is sent by the main rank. Of a shared one (``WeightShare``) each rank sends its part, between two
agreements of all ranks: that the servers wait for weights, and that every part was sent. Collectives are made by the
thread that calls, never by those that send or write.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from prism_megatron.conversion.announced_weights import WeightShare
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError, RolloutError, WeightSyncError
from prism_megatron.observability.activity import Activity
from prism_megatron.parallel.collectives import all_gather_objects, broadcast_object, on_main
from prism_megatron.rollout.base import SampleRequest
from prism_megatron.rollout.sglang.engine import SGLangRollout
from prism_megatron.types import Prompt, Rollout


class SharedRollout:
    """A RolloutEngine on every rank of a world, all on the same servers."""

    def __init__(
        self,
        engine: SGLangRollout,
        world: World,
        *,
        exported: Path | None = None,
        let_go: Callable[[], None] | None = None,
    ) -> None:
        """``exported`` is a folder that was made for the servers and goes with them. ``let_go`` gives the devices back
        what this process keeps of freed memory: it is for servers that share them."""
        self._engine = engine
        self._world = world
        self._exported = exported
        self._let_go = let_go

    @property
    def activity(self) -> Activity:
        """What is told of answers that have come."""
        return self._engine.activity

    @activity.setter
    def activity(self, activity: Activity) -> None:
        self._engine.activity = activity

    @property
    def expert_layout(self) -> ExpertLayout:
        """As of ``SGLangRollout``."""
        return self._engine.expert_layout

    @property
    def policy_version(self) -> int | None:
        """As of ``SGLangRollout``; the same on every rank."""
        return self._engine.policy_version

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The main rank hands the weights over, or each rank its share of them; the others take part in gathering.

        All ranks call it together. Raises WeightSyncError on every rank, and LostVersionError where the servers hold
        no whole version any more.
        """
        self._engine.expect(version)
        if self._let_go is not None:
            self._let_go()
        # A rank still unaware of the version would refuse answers that come with it; and servers that share the devices
        # take memory for weights now, which all ranks must have left.
        if isinstance(tensors, WeightShare):
            self._update_together(tensors, version)
            return
        all_gather_objects(None)
        remaining = iter(tensors)
        problem: str | None = None
        if self._world.is_main:
            try:
                self._engine.update_weights(remaining, version)
            except PrismError as error:
                problem = str(error)
        deque(remaining, maxlen=0)  # the other ranks would wait for ever in a gather that one left early
        problem, held = broadcast_object((problem, self._engine.policy_version), source=0)
        if not self._world.is_main:
            self._engine.follow(held)
        if problem is not None:
            raise WeightSyncError(problem)

    def holds_rest(self) -> bool:
        """Whether an update may leave out what it does not change. All ranks ask together."""
        return broadcast_object(self._world.is_main and self._engine.holds_rest(), source=0)

    def lacks_weights(self) -> bool:
        """Whether servers released their weights, and should be handed them again. All ranks ask together."""
        return broadcast_object(self._engine.lacks_weights, source=0)

    def _update_together(self, share: WeightShare, version: int) -> None:
        """Each rank sends its share. Raises as ``update_weights``, and for files that could not be written aside."""
        engine, world = self._engine, self._world
        problems = all_gather_objects(engine.problem_with_files())
        if unwritten := next((one for one in problems if one is not None), None):
            raise WeightSyncError(unwritten)
        try:
            update = on_main(lambda: engine.open_update(share, version))
            sent = all_gather_objects(engine.send_share(update, share, part=world.rank, keeps_last=world.is_main))
            on_main(lambda: engine.finish_update(update, share, sent))
        except PrismError:  # known to all ranks
            self._follow_main()
            raise
        self._follow_main()

    def _follow_main(self) -> None:
        version = broadcast_object(self._engine.policy_version, source=0)
        if not self._world.is_main:
            self._engine.follow(version)

    def generate(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """As of ``SGLangRollout``; every rank asks for its own samples."""
        return self._engine.generate(request)

    def score(self, prompt: Prompt, response: Sequence[int]) -> dict[str, tuple[float, ...]]:
        """As of ``SGLangRollout``, asked by the main rank and known to all, which call it together.

        Raises RolloutError on every rank.
        """
        scores: dict[str, tuple[float, ...]] = {}
        problem: str | None = None
        if self._world.is_main:
            try:
                scores = self._engine.score(prompt, response)
            except PrismError as error:
                problem = str(error)
        scores, problem = broadcast_object((scores, problem), source=0)
        if problem is not None:
            raise RolloutError(problem)
        return scores

    def sleep(self) -> None:
        """As of ``SGLangRollout``, by the main rank; all ranks have their samples when they call it together."""
        self._on_main(self._engine.sleep)

    def wake(self) -> None:
        """As of ``SGLangRollout``, by the main rank; all ranks call it together and leave it together.

        The servers take memory for keys and values, so all ranks let go of what they gathered first.
        """
        if self._let_go is not None:
            self._let_go()
            all_gather_objects(None)
        self._on_main(self._engine.wake)

    def _on_main(self, call: Callable[[], None]) -> None:
        """Raises WeightSyncError on every rank where ``call`` fails on the main one."""
        problem: str | None = None
        if self._world.is_main:
            try:
                call()
            except PrismError as error:
                problem = str(error)
        problem = broadcast_object(problem, source=0)
        if problem is not None:
            raise WeightSyncError(problem)

    def close(self) -> None:
        """Close this rank's connections; the main rank also stops the servers that it started. May be called again."""
        self._engine.close()
        exported, self._exported = self._exported, None
        if exported is not None and self._world.is_main:
            shutil.rmtree(exported)
