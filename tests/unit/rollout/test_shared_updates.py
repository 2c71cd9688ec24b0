"""Updates that two senders share: servers take a version whole or not at all, and which files are written of it.

Blind to what ranks agree on, which ``tests/distributed/test_shared_handover.py`` has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.errors import WeightSyncError
from prism_megatron.rollout import spool_writer
from prism_megatron.rollout.sglang.weights import LostVersionError, Transport
from prism_megatron.rollout.weight_spool import Spool
from tests.unit.rollout.attached import FakeSupervision, draw
from tests.unit.rollout.fake_sglang import FOLDER, UPDATES, FakeSGLang
from tests.unit.rollout.sharing import NAMES, SHARES, Together
from tests.unit.rollout.test_weight_group import lazy
from tests.unit.rollout.weight_servers import BY_GROUP, BY_TENSOR, VISION, assert_holds
from tests.unit.rollout.weights import mini_weights
from tests.waiting import wait_for

__all__ = ["lazy"]

Share = Callable[..., Together]
TRANSPORTS: tuple[Transport, ...] = ("tensor", "disk", "group")


@pytest.fixture
def fakes(fakes: list[FakeSGLang]) -> list[FakeSGLang]:
    """Those of all tests here, started so that they can release memory."""
    for fake in fakes:
        fake.saves_memory = True
    return fakes


@pytest.fixture
def share(fakes: list[FakeSGLang], tmp_path: Path) -> Iterator[Share]:
    """Engines that share updates; pieces are small, so that each sends many."""
    made: list[Together] = []

    def build(**options: Any) -> Together:
        made.append(Together(fakes, tmp_path, **{"bucket_bytes": 2**18, **options}))
        return made[-1]

    yield build
    for together in made:
        together.close()
    left = [path for path in tmp_path.iterdir() if path.name != "servers.log"]
    assert not left, "spooled weights were left behind"


def written(root: Path) -> dict[str, torch.Tensor] | None:
    """The one whole model folder there is, by its index."""
    whole = [path.parent for path in root.glob("weights-*/model.safetensors.index.json")]
    if len(whole) != 1:
        return None
    source = HFFolder(whole[0])
    return {name: source.get(name).clone() for name in source.names()}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_servers_hold_what_both_senders_brought(
    transport: Transport, share: Share, fakes: list[FakeSGLang], tmp_path: Path
) -> None:
    """Claim: bit for bit, each tensor once a server; the version comes with the very last piece, when all else is
    there; the folder in the end holds all of it. Both engines are told what is in use."""
    together = share(transport=transport)
    for version, factor in ((1, 1.5), (2, 0.5)):
        for fake in fakes:
            fake.calls.clear()
        together.update(factor, version)
        for fake in fakes:
            assert_holds(fake, factor, version)
            updates = [body for path, body in fake.calls if path in UPDATES]
            assert [body.get("weight_version") for body in updates] == [None] * (len(updates) - 1) + [str(version)]
            assert [body["flush_cache"] for body in updates] == [False] * (len(updates) - 1) + [True]
            assert len(updates) == 1 if transport == "disk" else len(updates) > 4
        assert [engine.policy_version for engine in together.engines] == [version, version]
        assert [one.num_tensors for one in together.sent] == [len(names) for names in SHARES]
    assert sum(one.num_bytes for one in together.sent) == sum(tensor.nbytes for _, tensor in mini_weights())
    wait_for(lambda: len(list(tmp_path.iterdir())) == 1)
    held = written(tmp_path)
    assert held is not None and all(torch.equal(held[name], tensor) for name, tensor in mini_weights(0.5))


def test_the_last_piece_waits_for_the_other_sender(
    share: Share, fakes: list[FakeSGLang], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: a server that lacks a part of a version does not report it, however slow the other sender is."""
    together, seen = share(), list[str]()
    load, brings = fakes[0].load, SHARES[1]

    def looking(tensors: dict[str, torch.Tensor]) -> None:
        if tensors.keys() & brings:
            seen.append(fakes[0].version)
        load(tensors)

    monkeypatch.setattr(fakes[0], "load", looking)
    together.update(2.0, 7)
    assert seen and set(seen) == {"default"} and fakes[0].version == "7"


def test_senders_reach_workers_that_come_only_when_they_are_asked(
    lazy: list[Any],
    share: Share,
    fakes: list[FakeSGLang],
) -> None:
    """Claim: with groups that block as NCCL's, a group for each sender and server, and none waits for another."""
    together = share(transport="group")
    together.update(1.0, 1)
    together.update(2.0, 2)
    for fake in fakes:
        assert_holds(fake, 2.0, 2)
    assert len(lazy) == 4, "groups are made once"


@pytest.mark.parametrize("path", [BY_TENSOR, "/end_weight_update"])
def test_servers_that_fail_stay_paused_until_they_have_a_whole_version(
    path: str, share: Share, fakes: list[FakeSGLang]
) -> None:
    """Claim: none is in use meanwhile and no server goes on with parts of two versions; then all of it comes again."""
    together = share()
    together.update(2.0, 1)
    for fake in fakes:
        fake.calls.clear()
    fakes[1].refuse[path] = 1
    with pytest.raises(LostVersionError, match=f"version 2 was not handed over, none is in use: .*{path} was refused"):
        together.update(3.0, 2)
    assert [engine.policy_version for engine in together.engines] == [None, None]
    for fake in fakes:
        assert fake.paused and not fake.session_open and "/continue_generation" not in fake.paths()
    with pytest.raises(WeightSyncError, match="send all first"):
        together.update(3.0, 2, left_out=VISION)
    together.update(3.0, 2)
    for fake in fakes:
        assert_holds(fake, 3.0, 2)


def test_servers_are_let_go_when_the_run_ends_without_a_version(share: Share, fakes: list[FakeSGLang]) -> None:
    """Claim: somebody else's servers do not stay paused for ever."""
    together = share()
    fakes[0].refuse[BY_TENSOR] = 1
    with pytest.raises(LostVersionError):
        together.update(3.0, 1)
    together.close()
    assert not any(fake.paused for fake in fakes)


def test_where_one_server_cannot_begin_nothing_has_changed(share: Share, fakes: list[FakeSGLang]) -> None:
    together = share()
    together.update(2.0, 1)
    fakes[1].refuse["/begin_weight_update"] = 1
    with pytest.raises(WeightSyncError, match="nothing has changed") as caught:
        together.update(3.0, 2)
    assert not isinstance(caught.value, LostVersionError)
    for fake in fakes:
        assert_holds(fake, 2.0, 1)
    assert together.first.policy_version == 1 and draw(together.first)[0][0].policy_version == 1


@pytest.mark.parametrize("path", ["/pause_generation", BY_TENSOR, "/end_weight_update"])
def test_a_server_that_dies_gets_the_version_when_it_is_back(
    path: str, share: Share, fakes: list[FakeSGLang], tmp_path: Path
) -> None:
    """Claim: whichever sender finds it dead, the update goes on, and its successor is given what was written."""
    supervision = FakeSupervision(fakes)
    together = share(servers=supervision)
    together.update(2.0, 1)
    fakes[1].die_at = path
    together.update(3.0, 2)
    assert_holds(fakes[0], 3.0, 2)
    assert fakes[1].url in supervision.replaced
    fakes[1].restart()
    supervision.restarted(fakes[1].url)
    assert_holds(fakes[1], 3.0, 2)
    assert written(tmp_path) is not None


def test_a_lost_server_of_nobodys_is_left_out_and_taken_back_by_all_senders(
    share: Share, fakes: list[FakeSGLang]
) -> None:
    """Claim: the update goes through on the other server; back, it has the newest version before it is used, and every
    sender sends to it again, also one that has not been told that it is back."""
    together = share(poll_seconds=0.01)
    together.update(2.0, 1)
    fakes[1].die_at = BY_TENSOR
    together.update(3.0, 2)
    assert_holds(fakes[0], 3.0, 2)
    assert together.first.out == together.second.out == {fakes[1].url}
    fakes[1].restart()
    wait_for(lambda: together.first.took_back == 1)
    assert_holds(fakes[1], 3.0, 2)
    assert together.second.out == {fakes[1].url}, "the second sender has not been told"
    together.update(4.0, 3)
    for fake in fakes:
        assert_holds(fake, 4.0, 3)
    assert together.first.out == together.second.out == frozenset()


def test_a_lost_server_that_could_be_given_nothing_takes_part_in_the_next_update(
    share: Share, fakes: list[FakeSGLang]
) -> None:
    """Claim: of a version that was not written a server that is back gets nothing and stays out; the next update lets
    it in, and brings everything."""
    together = share(poll_seconds=0.01, spool_every=3)
    together.update(2.0, 1)
    fakes[1].die_at = BY_TENSOR
    together.update(3.0, 2)
    fakes[1].restart()
    wait_for(lambda: bool(together.first._returns._waiting))
    assert together.first.out == {fakes[1].url} and fakes[1].version == "default"
    assert not together.first.holds_rest()
    assert together.first.out == frozenset()
    together.update(4.0, 3)
    for fake in fakes:
        assert_holds(fake, 4.0, 3)


def test_every_kth_version_is_written(share: Share, fakes: list[FakeSGLang], tmp_path: Path) -> None:
    """Claim: of a version that is not written a restarted server gets nothing, and the next one whole; files of an
    older version are never handed out under a newer one's name."""
    supervision = FakeSupervision(fakes)
    together = share(servers=supervision, spool_every=3)
    found = []
    for version in range(1, 6):
        together.update(1.0 + version, version)
        found.append([one.wrote for one in together.sent])
    assert found == [[True, True], [False, False], [False, False], [True, True], [False, False]]
    fakes[1].restart()
    supervision.restarted(fakes[1].url)
    assert fakes[1].version == "default"
    assert not together.first.holds_rest(), "an update that leaves weights out would not reach it whole"
    together.update(9.0, 6)
    for fake in fakes:
        assert_holds(fake, 9.0, 6)
    wait_for(lambda: written(tmp_path) is not None)
    held = written(tmp_path)
    assert held is not None and all(torch.equal(held[name], tensor) for name, tensor in mini_weights(5.0))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_is_left_out_is_in_the_folder_all_the_same(
    transport: Transport, share: Share, fakes: list[FakeSGLang], tmp_path: Path
) -> None:
    """Claim: each sender takes its own frozen weights from its own older files, so a restarted server is whole."""
    supervision = FakeSupervision(fakes)
    together = share(servers=supervision, transport=transport)
    together.update(2.0, 1)
    for version, factor in ((2, 3.0), (3, 4.0)):
        for fake in fakes:
            fake.loaded.clear()
        assert together.first.holds_rest()
        together.update(factor, version, left_out=VISION)
        assert transport == "disk" or not any(fake.loaded & VISION for fake in fakes)
        fakes[1].restart()
        supervision.restarted(fakes[1].url)
        joins = [fake.paths().count("/init_weights_update_group") for fake in fakes]
        assert joins == ([2, 2 * version - 1] if transport == "group" else [0, 0]), (
            "a new process has no group of before"
        )
        for fake in fakes:
            assert fake.version == str(version)
            for (name, frozen), (_, changed) in zip(mini_weights(2.0), mini_weights(factor), strict=True):
                assert torch.equal(fake.weights[name], frozen if name in VISION else changed), name
    held = written(tmp_path)
    assert held is not None and sorted(held) == sorted(NAMES)


def test_files_are_written_while_the_run_goes_on(
    share: Share, fakes: list[FakeSGLang], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: a hand-over does not wait for the disk; a server that comes back waits for the files to be whole."""
    supervision, disk = FakeSupervision(fakes), threading.Event()
    together, add = share(servers=supervision), Spool.add

    def slowly(spool: Spool, tensors: Any) -> None:
        disk.wait(20.0)
        add(spool, tensors)

    monkeypatch.setattr(Spool, "add", slowly)
    together.update(2.0, 1)
    assert draw(together.first)[0][0].policy_version == 1 and written(tmp_path) is None
    fakes[1].restart()
    restoring = threading.Thread(target=supervision.restarted, args=(fakes[1].url,))
    restoring.start()
    assert fakes[1].version == "default"
    disk.set()
    restoring.join()
    assert_holds(fakes[1], 2.0, 1)


@pytest.mark.parametrize("transport", ["tensor", "disk"])
def test_a_disk_that_takes_nothing_is_told(
    transport: Transport, share: Share, fakes: list[FakeSGLang], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: at once where the folder is the way, else before the next hand-over; by the rank whose disk it is."""
    together, add = share(transport=transport), Spool.add

    def full(spool: Spool, tensors: Any) -> None:
        if tensors[0][0] in SHARES[1]:
            raise WeightSyncError(f"the weights cannot be written to {spool.folder}: no space")
        add(spool, tensors)

    monkeypatch.setattr(Spool, "add", full)
    if transport == "disk":
        with pytest.raises(LostVersionError, match="cannot be written to"):
            together.update(2.0, 1)
        return
    together.update(2.0, 1)
    wait_for(lambda: together.second.problem_with_files() is not None)
    assert "cannot be written to" in (together.second.problem_with_files() or "")
    assert together.first.problem_with_files() is None


def test_a_part_that_never_comes_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    """Claim: as where hosts do not share the run's folder."""
    writer = spool_writer.SpoolWriter(tmp_path, like=FOLDER, parts_seconds=0.05)
    writer.begin(0, 0, left_out=frozenset())
    writer.add([("x", torch.ones(2))])
    writer.finish()
    with pytest.raises(WeightSyncError, match="another rank has not written its part; do all hosts see this folder"):
        writer.join(0, [0, 1]).result()
    writer.close()


@pytest.mark.parametrize("transport", ["tensor", "disk"])
def test_colocated_servers_sleep_and_wake_around_a_shared_update(
    transport: Transport, share: Share, fakes: list[FakeSGLang]
) -> None:
    """Claim: memory of weights, then all pieces, then that of keys and values: the fake dies of another order.

    Servers that let go of a version say so, that it can be handed over again; one that is written comes back without.
    """
    together = share(colocated=True, transport=transport)
    together.first.sleep()
    together.update(1.0, 1)
    together.first.wake()
    together.first.sleep()
    assert together.first.lacks_weights and not together.first.holds_rest()
    together.update(2.0, 2)
    assert not together.first.lacks_weights
    together.first.wake()
    together.first.sleep()
    together.first.wake()
    for fake in fakes:
        assert_holds(fake, 2.0, 2)
        assert not fake.released


def test_colocated_servers_that_fail_are_filled_again(share: Share, fakes: list[FakeSGLang]) -> None:
    """Claim: memory that is there already is not asked for twice, which would end a server."""
    together = share(colocated=True, transport="tensor")
    together.update(1.0, 1)
    together.first.wake()
    together.first.sleep()
    fakes[1].refuse = {"/begin_weight_update": 1}
    with pytest.raises(LostVersionError, match="woke without weights"):
        together.update(2.0, 2)
    together.update(2.0, 2)
    together.first.wake()
    for fake in fakes:
        assert_holds(fake, 2.0, 2)
        assert not fake.released


def test_a_tensor_that_nobody_brings_is_missed(
    share: Share, fakes: list[FakeSGLang], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: the names are whole, and a rank forgets one of its own all the same."""
    together = share()
    second = together.second

    def forgetful(update: Any, brought: Any, **how: Any) -> Any:
        brought.own_shapes = dict(list(brought.own_shapes.items())[:-1])
        brought._tensors = iter(list(brought._tensors)[:-1])
        return type(second).send_share(second, update, brought, **how)

    monkeypatch.setattr(second, "send_share", forgetful)
    with pytest.raises(LostVersionError, match=f"{len(NAMES) - 1} of {len(NAMES)} weights came"):
        together.update(2.0, 1)
    assert fakes[0].version == "default"
    assert BY_GROUP not in fakes[0].paths()
