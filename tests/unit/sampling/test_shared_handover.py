"""When a policy is handed over by shares, how much of it, and how often. Policy and servers only take notes."""

from __future__ import annotations

from typing import Any

import pytest

from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.errors import ConfigError, WeightSyncError
from prism_megatron.rollout.sglang.weights import LostVersionError
from prism_megatron.sampling.handover import SharedHandover
from prism_megatron.sampling.servers import check_sync


class Policy:
    """Says what it is asked for."""

    def export_share(self, gather_bytes: int, *, layout: str, changed_only: bool) -> str:
        return f"{'changes' if changed_only else 'all'} in {layout} by {gather_bytes}"


class Servers:
    """``fails`` are the errors of the next updates."""

    expert_layout = "per_expert"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: list[WeightSyncError] = []
        self.holds, self.lacks = True, False
        self.policy_version: int | None = 4

    def holds_rest(self) -> bool:
        return self.holds

    def lacks_weights(self) -> bool:
        return self.lacks

    def update_weights(self, share: str, version: int) -> None:
        self.calls.append(f"{version}: {share}")
        if self.fails:
            raise self.fails.pop(0)

    def wake(self) -> None:
        self.calls.append("wake")


@pytest.fixture
def servers() -> Servers:
    return Servers()


@pytest.fixture
def handover(servers: Servers) -> SharedHandover:
    policy: Any = Policy()
    rollout: Any = servers
    return SharedHandover(policy, rollout, 77, lambda version: servers.calls.append(f"check {version}"))


ALL, CHANGES = "all in per_expert by 77", "changes in per_expert by 77"


def test_only_changes_go_to_servers_that_have_the_rest(handover: SharedHandover, servers: Servers) -> None:
    handover(5)
    servers.holds = False
    handover(6)
    assert servers.calls == [f"5: {CHANGES}", "wake", "check 5", f"6: {ALL}", "wake", "check 6"]


def test_servers_without_a_version_are_given_all_of_it_once_more(handover: SharedHandover, servers: Servers) -> None:
    """Claim: what it takes is decided anew, and a second failure is the end."""
    servers.fails = [LostVersionError("half of it")]
    handover(5)
    assert servers.calls == [f"5: {CHANGES}", f"5: {ALL}", "wake", "check 5"]
    servers.fails = [LostVersionError("half of it"), LostVersionError("again")]
    with pytest.raises(LostVersionError, match="again"):
        handover(6)


def test_a_hand_over_that_changed_nothing_is_not_repeated(handover: SharedHandover, servers: Servers) -> None:
    servers.fails = [WeightSyncError("nothing has changed")]
    with pytest.raises(WeightSyncError, match="nothing has changed"):
        handover(5)
    assert servers.calls == [f"5: {CHANGES}"]


def test_servers_that_slept_without_an_update_get_the_version_in_use_again(
    handover: SharedHandover, servers: Servers
) -> None:
    handover.wake()
    servers.lacks = True
    handover.wake()
    servers.policy_version = None
    handover.wake()
    assert servers.calls == ["wake", f"4: {ALL}", "wake", "wake"]


def test_one_server_alone_needs_every_version_written() -> None:
    wanted = RolloutConfig(rollout="sglang", rollout_sync="group", rollout_spool_every=4)
    check_sync(wanted, num_hosts=2)
    check_sync(RolloutConfig(), num_hosts=1)
    with pytest.raises(ConfigError, match="--rollout-spool-every 4 needs a second server"):
        check_sync(wanted, num_hosts=1)


def test_handles_of_gpu_memory_stay_on_one_host() -> None:
    wanted = RolloutConfig(rollout="sglang", rollout_sync="ipc")
    check_sync(wanted, num_hosts=1)
    with pytest.raises(ConfigError, match="--rollout-sync ipc: the run spans 2 hosts"):
        check_sync(wanted, num_hosts=2)
