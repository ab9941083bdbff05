"""The hosts that other tests here stand on, and hostfiles."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.launch.hosts import Hosts
from ummim.cluster.hosts import Host, read_hostfile
from ummim.errors import UserError


@pytest.mark.namespaces
def test_hosts_reach_each_other_by_ssh_and_know_themselves_as_debian_does(hosts: Hosts):
    pdsh = ["pdsh", "-S", "-R", "ssh", "-w", "host1,host2,host3", "hostname; getent hosts host1"]
    done = hosts.run("host1", pdsh)
    assert done.returncode == 0, done.stderr
    lines = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert lines >= {f"host{n}: host{n}" for n in (1, 2, 3)}
    assert "host1: 127.0.1.1 host1.cluster host1" in lines
    assert "host2: 10.77.0.1 host1" in lines


@pytest.mark.namespaces
def test_a_pulled_cable_cuts_one_host_off(hosts: Hosts):
    touch = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=2", "host2", "true"]
    hosts.link("host2", "down")
    try:
        assert hosts.run("host1", touch).returncode == 255
        assert hosts.run("host2", ["true"]).returncode == 0
    finally:
        hosts.link("host2", "up")
    assert hosts.run("host1", touch).returncode == 0


@pytest.mark.namespaces
def test_nothing_outlives_a_killed_test(tmp_path: Path):
    script = f"""
from pathlib import Path
from tests.launch.hosts import Hosts
import time
with Hosts(Path({str(tmp_path)!r}), 1) as hosts:
    hosts.popen("host1", ["setsid", "sleep", "4321"])
    hosts.popen("host1", ["sleep", "4321"])
    print("ready", flush=True)
    time.sleep(60)
"""
    made = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    with made.stdout:
        assert made.stdout.readline() == "ready\n"
    time.sleep(0.3)
    assert mentions(str(tmp_path))
    assert mentions("sleep 4321")
    os.kill(made.pid, signal.SIGKILL)
    made.wait()
    deadline = time.monotonic() + 10
    while (left := mentions(str(tmp_path)) + mentions("sleep 4321")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def mentions(word: str) -> list[str]:
    """Command lines of this machine's processes that hold ``word``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line and not line.startswith("nsenter"):
            found.append(line)
    return found


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path):
    path = tmp_path / "hostfile"
    path.write_text(
        "# the rack on the left\n\nnode-1 slots=8\n  me@node2.lan   slots=4  # two are broken\n10.0.0.7 slots=1\n"
    )
    assert read_hostfile(path) == [Host("node-1", 8), Host("me@node2.lan", 4), Host("10.0.0.7", 1)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("node1\n", "line 1: 'node1' is no host: write NAME slots=GPUS"),
        ("node1 slots=8\nnode1 slots=8\n", "line 2: node1 is named twice"),
        ("node1 slots=0\n", "line 1: node1 has slots=0"),
        ("node1 slots=8 node2 slots=8\n", "line 1"),
        ("-oProxyCommand=x slots=8\n", "line 1: '-oProxyCommand=x' is no host name"),
        ("node1;reboot slots=8\n", "is no host name"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_bad_hostfile_is_refused_by_its_line(tmp_path: Path, text: str, told: str):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_hostfile(path)
    assert str(path) in str(error.value)
    assert told in str(error.value)


def test_a_missing_hostfile_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"none: No such file"):
        read_hostfile(tmp_path / "none")
