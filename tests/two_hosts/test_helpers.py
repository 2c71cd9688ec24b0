"""What plays two hosts judges by: rows, torn files, lines, times. Quick; ``test_cuts.py`` plays the run itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.observability.activity import Activity
from tests.two_hosts import rank
from tests.two_hosts.__main__ import main, parse
from tests.two_hosts.cuts import NOTICED_SECONDS, all_cuts
from tests.two_hosts.hosts import NoHostsError, two_hosts
from tests.two_hosts.outcome import differences, error_line, rows_of, torn
from tests.waiting import wait_for

LISTEN = """
import socket, sys
with socket.create_server((sys.argv[1], 7)) as server:
    print(socket.gethostname(), flush=True)
    server.accept()
"""
REACH = "import socket, sys; socket.create_connection((sys.argv[1], 7), timeout=float(sys.argv[2]))"


def write_rows(output: Path, rows: Sequence[dict[str, Any]], *, end: str = "\n") -> Path:
    output.mkdir(exist_ok=True)
    (output / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + end, encoding="utf-8")
    return output


def test_rows_are_compared_to_the_bit_and_clocks_are_left_out(tmp_path: Path) -> None:
    row = {"step": 0, "loss": 0.1, "note": None}
    mine = rows_of(write_rows(tmp_path / "a", [row | {"seconds/rollout": 1.0, "memory/host_gib": 2.0, "time": "x"}]))
    assert mine == [row]
    assert differences(mine, [row]) == []
    assert differences(mine, [row | {"loss": 0.1 + 2**-56}]) == ["step 0: loss is 0.1 and 0.10000000000000002"]
    assert differences(mine, [row | {"more": 1}]) == ["step 0: more is None and 1"]
    assert differences(mine, [row | {"step": 1}]) == ["steps [0] beside [1]"]
    assert differences([*mine, *mine], mine) == ["steps [0, 0] beside [0]"]


def test_what_is_half_written_under_a_final_name_is_told(tmp_path: Path) -> None:
    output = write_rows(tmp_path / "run", [{"step": 0}])
    assert torn(output) == []
    hidden = output / "checkpoints" / ".step_000002.saving"
    hidden.mkdir(parents=True)
    (output / ".summary.json.7.part").write_text("{", encoding="utf-8")
    assert torn(output) == [], "hidden names are of work under way"
    hidden.rename(hidden.with_name("step_000002"))
    (output / "summary.json").write_text('{"ended"', encoding="utf-8")
    (output / "hf").mkdir()
    assert [one.partition(":")[0] for one in torn(output)] == [
        "step_000002",
        "summary.json",
        "an export of a run that has not ended",
    ]


def test_the_line_that_counts_stands_above_any_traceback() -> None:
    above = "saved\nerror: all ranks on a are there\nTraceback (most recent call last):\n"
    assert error_line(above) == "error: all ranks on a are there"
    assert error_line("Traceback (most recent call last):\nerror: late\n") is None


def test_every_host_that_is_left_has_its_time() -> None:
    """Claim: a killed process is noticed at once, a silent one after the timeout; a link alone leaves both hosts."""
    cuts = all_cuts()
    assert cuts["crash-policy"].bound_seconds(2) == NOTICED_SECONDS
    assert {cuts[name].bound_seconds(2) for name in ("power-policy", "link")} == {NOTICED_SECONDS + 120.0}
    assert [cuts[name].survivors for name in ("crash-policy", "power-master", "link")] == [(0,), (1,), (0, 1)]
    assert {cut.place for cut in cuts.values() if cut.how == "power"} >= {"rollout", "weight_sync", "checkpoint"}


def test_a_rank_stands_still_in_its_phase_of_its_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Activity, "phase", Activity.phase)
    reached: list[tuple[int | None, str]] = []
    activity = Activity()
    rank.watch_phases("policy", 2, lambda: reached.append((activity.step, "policy")))
    for step in (1, 2, 3):
        activity.step = step
        for name in ("rollout", "policy"):
            with activity.phase(name):
                assert activity.text().startswith(f"step {step}: {name}")
    assert reached == [(2, "policy")]


def test_cuts_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--cuts", "none"]).cuts == []
    assert parse(["--cuts", "full", "link"]).cuts == ["full", "link"]
    assert parse([]).cuts == [*all_cuts(), "full"]
    with pytest.raises(SystemExit):
        parse(["--cuts", "flood"])
    assert "crash-policy" in capsys.readouterr().err


def test_who_cannot_make_hosts_is_told_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--cuts", "none"]) == 2
    assert "error: no `ip` on this machine" in capsys.readouterr().err
    for name, script in (
        ("ip", "#!/bin/sh\necho 'Operation not permitted' >&2\nexit 1\n"),
        ("unshare", ""),
        ("hostname", ""),
    ):
        (tmp_path / name).write_text(script, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("tests.two_hosts.hosts._exists", lambda _host: False)
    assert main(["--cuts", "none"]) == 2
    assert "Operation not permitted (it needs root)" in capsys.readouterr().err


def test_hosts_have_names_of_their_own_and_nothing_outlives_them() -> None:
    """Claim: a process is found on its host, the cable carries and is cut, and what is left in the end is killed."""
    try:
        with two_hosts() as (first, second):
            server = subprocess.Popen(
                first.command([sys.executable, "-c", LISTEN, first.address]), stdout=subprocess.PIPE
            )
            assert server.stdout is not None and server.stdout.readline().decode().strip() == first.space
            assert first.processes() == [server.pid] and second.processes() == []
            second.set_link(up=False)
            words = [sys.executable, "-c", REACH, first.address]
            assert subprocess.run(second.command([*words, "0.2"]), capture_output=True, check=False).returncode
            second.set_link(up=True)
            left = subprocess.Popen(second.command(["sleep", "1000"]))
            wait_for(lambda: second.processes() == [left.pid])
            subprocess.run(second.command([*words, "30"]), check=True)
            assert server.wait(timeout=60) == 0
        assert left.wait(timeout=60) == -9
        assert not any(
            space in path.name for path in Path("/run/netns").iterdir() for space in (first.space, second.space)
        )
    except NoHostsError as error:
        pytest.skip(str(error))
