"""``ummim preflight``: each host that is not fit is named, with the reason and the remedy."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.launch.conftest import build_shards
from tests.launch.hosts import Hosts, wait
from ummim.cluster.facts import Facts
from ummim.cluster.hosts import Host, slurm_hosts
from ummim.cluster.judge import GIB, Checked, judge, table
from ummim.errors import UserError

GOOD = Facts(
    hostname="one",
    commit="a" * 40,
    source="b" * 64,
    versions={"python": "3.11.7", "torch": "2.14.1", "deepspeed": "0.19.8"},
    index="c" * 64,
    data_error="",
    sees_token=True,
    output_error="",
    free={"output": 50 * GIB, "temporary files": 5 * GIB, "shared memory": 64 * 2**20},
    gpus=["H100"] * 8,
    address="10.0.0.1",
)


def faults(facts: Facts, clock: float = 0.0, tolerance: float = 0.0, workers: int = 0, slots: int = 8) -> list[str]:
    """What is found wrong with a host beside a good one."""
    one = Checked(Host("one", 8), GOOD)
    two = Checked(Host("two", slots), facts, clock, tolerance)
    judge([one, two], GOOD, 20 * GIB, workers)
    assert workers or not one.faults
    return two.faults


def test_what_is_not_committed_beside_the_package_is_no_fault():
    assert faults(replace(GOOD, commit="a" * 40 + "+changes")) == []


def test_a_host_like_the_others_is_fit():
    assert faults(GOOD, clock=1.9) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"commit": "d" * 40}, "commit dddddddd, here aaaaaaaa"),
        ({"commit": None}, "commit none"),
        ({"source": "d" * 64}, "differs from here at the same commit"),
        ({"source": "d" * 64, "commit": "a" * 40 + "+changes"}, "differs from here at the same commit"),
        ({"versions": {**GOOD.versions, "torch": "2.13.0"}}, "torch 2.13.0, here 2.14.1"),
        ({"versions": {**GOOD.versions, "deepspeed": None}}, "deepspeed missing"),
        ({"index": "d" * 64}, "digest dddddddddddd, not cccccccccccc"),
        ({"index": "", "data_error": "/data/index.json is missing"}, "cannot be read there: /data/index.json"),
        ({"sees_token": False}, "a file system that all hosts share"),
        ({"sees_token": False, "output_error": "read-only"}, "cannot be written there: read-only"),
        ({"free": {**GOOD.free, "output": 19 * GIB}}, "only 19.0 GiB are free for output, 20.0 GiB are wanted"),
        ({"free": {**GOOD.free, "temporary files": 0}}, "only 0.0 GiB are free for temporary files"),
        ({"free": {**GOOD.free, "shard cache": 0}}, "free for shard cache"),
        ({"gpus": ["H100"] * 7}, "sees 7 GPUs, 8 are expected"),
        ({"gpus": []}, "sees 0 GPUs"),
    ],
)
def test_what_differs_is_one_fault(change: dict, told: str):
    (fault,) = faults(replace(GOOD, **change))
    assert told in fault


def test_shared_memory_counts_only_where_workers_use_it():
    assert faults(GOOD, workers=0) == []
    assert "shared memory" in faults(GOOD, workers=8)[0]


def test_a_clock_is_judged_with_what_the_way_there_blurs():
    assert "7.0 s behind" in faults(GOOD, clock=-7.0)[0]
    assert "2.5 s ahead of" in faults(GOOD, clock=2.5)[0]
    assert faults(GOOD, clock=2.5, tolerance=1.0) == []


def test_without_slots_all_hosts_must_see_the_same_gpus():
    assert faults(GOOD, slots=0) == []
    assert "sees 4 GPUs, 8 are expected" in faults(replace(GOOD, gpus=["H100"] * 4), slots=0)[0]


def test_the_launching_host_need_not_hold_the_shards():
    one, two = Checked(Host("one", 8), GOOD), Checked(Host("two", 8), replace(GOOD, index="d" * 64))
    judge([one, two], replace(GOOD, index="", data_error="not here"), GIB, 0)
    assert (one.faults, len(two.faults)) == ([], 1)


def test_the_table_has_a_line_for_each_host_also_for_a_silent_one():
    silent = Checked(Host("longer-name", 8), None, faults=["cannot be reached"])
    lines = table([Checked(Host("one", 8), GOOD), silent]).splitlines()
    assert [line.split()[0] for line in lines] == ["host", "one", "longer-name"]
    assert lines[1].split()[-1] == "ok"
    assert lines[2].split() == ["longer-name", "8", "FAILS"]


def test_outside_slurm_there_are_no_nodes():
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST is not set"):
        slurm_hosts({})


@pytest.mark.namespaces
@pytest.mark.slow
def test_every_unfit_host_is_found_in_one_go(recipe: Path, shards: Path, tmp_path: Path):
    """host2: other code, another output folder; host3: other shards, a clock that is fast, a full disk; no host9."""
    code, output, cache, site = (tmp_path / name for name in ("code", "run", "cache", "site"))
    for folder in (output, cache, site, tmp_path / "fast"):
        folder.mkdir()
    shutil.copytree(ROOT / "ummim", code, ignore=shutil.ignore_patterns("__pycache__"))
    (code / "another.py").touch()
    (tmp_path / "other").mkdir()
    other = build_shards(tmp_path / "other", seed=1)
    (tmp_path / "fast" / "sitecustomize.py").write_text(
        "import time\nreal = time.time\ntime.time = lambda: real() + 7\n"
    )
    with Hosts(tmp_path / "hosts", 3) as hosts:
        hosts.mount("host2", "--bind", str(code), str(ROOT / "ummim"))  # not ROOT: it may hold the environment
        hosts.mount("host2", "-t", "tmpfs", "tmpfs", str(output))
        hosts.mount("host3", "--bind", str(other), str(shards))
        hosts.mount("host3", "--bind", str(tmp_path / "fast"), str(site))
        hosts.mount("host3", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(cache))
        hostfile = hosts.hostfile(tmp_path / "hostfile", names=["host1", "host2", "host3", "host9"])
        words = [str(recipe), f"output={output}", f"data.cache={cache}", "--hostfile", str(hostfile), "--free-gib", "0"]
        env = hosts.environment(PYTHONPATH=str(site))
        done = hosts.run("host1", [sys.executable, "-m", "ummim", "preflight", *words], env=env)
        wait(lambda: not any(hosts.processes(name) for name in hosts.names), 20)
    assert done.returncode == 2, done.stderr
    first, *told = done.stderr.splitlines()
    assert first == "ummim: error: 3 of 4 hosts cannot take part:"
    expected = {
        "host2": ["its code differs from here at the same commit", "does not see what this machine writes"],
        "host3": [
            "index has digest",
            r"its clock is (6\.[5-9]|7\.[0-5]) s ahead of",
            "only 0.0 GiB are free for shard cache",
        ],
        "host9": ["cannot be reached by ssh: .*host9"],
    }
    found = [line.strip().split(": ", 1) for line in told]
    assert [name for name, _ in found] == [name for name, texts in expected.items() for _ in texts]
    for (_, text), pattern in zip(found, [t for texts in expected.values() for t in texts], strict=True):
        assert re.search(pattern, text), text
    assert not list(output.iterdir())
