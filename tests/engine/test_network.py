"""The network interface that a run takes, on hosts with several, and a host that is cut off.

Hosts are network namespaces, without torch; skipped where those are not allowed.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import environment
from tests.engine.processes import SILENT, Group, two_ranks

ALLOWED = subprocess.run(["unshare", "-n", "-m", "-u", "ip", "link"], capture_output=True, text=True)
pytestmark = pytest.mark.skipif(ALLOWED.returncode != 0, reason=f"no network namespaces: {ALLOWED.stderr.strip()}")

# A host with two networks. Each case: MASTER_ADDR, further variables, a default route's interface.
HOST = """
import json, os, socket, subprocess, sys
from ummim.engine.network import choose_interface, own_address
from ummim.errors import UserError

def ip(*words):
    subprocess.run(["ip", *words], check=True)

ip("link", "set", "lo", "up")
for number in (7, 8):
    ip("link", "add", f"net{number}", "type", "veth", "peer", "name", f"peer{number}")
    ip("addr", "add", f"10.{number}.0.5/24", "dev", f"net{number}")
    ip("link", "set", f"peer{number}", "up")
    ip("link", "set", f"net{number}", "up")
subprocess.run(["mount", "--bind", sys.argv[1], "/etc/hosts"], check=True)
socket.sethostname("worker-5")
names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
for master, extra, route in json.loads(sys.argv[2]):
    os.environ.update({"WORLD_SIZE": "4", "MASTER_ADDR": master, **extra})
    if route:
        ip("route", "add", "default", "via", f"10.{route}.0.1")
    try:
        choose_interface()
        print(json.dumps([os.environ.get(name) for name in names] + [own_address()]))
    except UserError as error:
        print(json.dumps(str(error)))
    if route:
        ip("route", "del", "default")
    for name in (*names, *extra):
        os.environ.pop(name, None)
"""
CASES = {
    "one network": ("10.7.0.1", {}, None),
    "the other": ("10.8.0.1", {}, None),
    "this host": ("10.8.0.5", {}, None),
    "one machine": ("localhost", {"CROSS_SIZE": "2"}, None),  # two launchers on it
    "own name": ("worker-5", {}, None),
    "own name, routed": ("worker-5", {"CROSS_SIZE": "2"}, 8),  # Debian's 127.0.1.1
    "own name, no route": ("worker-5", {"GROUP_WORLD_SIZE": "2"}, None),
    "told": ("10.7.0.1", {"GLOO_SOCKET_IFNAME": "net8"}, None),
    "told wrong": ("10.7.0.1", {"GLOO_SOCKET_IFNAME": "eth9"}, None),
    "NCCL told": ("10.7.0.1", {"NCCL_SOCKET_IFNAME": "ib0"}, None),
    "unknown name": ("worker-9.invalid", {}, None),
    "no route": ("10.9.0.1", {}, None),
}
UNCLEAR = "Its interfaces are lo (127.0.0.1, ::1), net7 (10.7.0.5), net8 (10.8.0.5): name one by GLOO_SOCKET_IFNAME"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    hosts = tmp_path_factory.mktemp("host") / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 worker-5\n")
    words = ["unshare", "-n", "-m", "-u", sys.executable, "-c", HOST, str(hosts), json.dumps(list(CASES.values()))]
    job = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60)
    assert job.returncode == 0, job.stderr
    return dict(zip(CASES, map(json.loads, job.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("one network", ["net7", "=net7", "10.7.0.5"]),
        ("the other", ["net8", "=net8", "10.8.0.5"]),
        ("this host", ["net8", "=net8", "10.8.0.5"]),
        ("one machine", [None, None, "127.0.0.1"]),
        ("own name, routed", ["net8", "=net8", "10.8.0.5"]),
        ("told", ["net8", None, "10.8.0.5"]),
        ("NCCL told", ["net7", "ib0", "10.7.0.5"]),
    ],
)
def test_the_interface_towards_the_first_rank_is_taken(found, case, expected):
    assert found[case] == expected


def test_a_single_host_by_its_own_name_needs_none(found):
    assert found["own name"][:2] == [None, None] and found["own name"][2].startswith("127.0.")


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        (
            "own name, no route",
            "on worker-5, MASTER_ADDR=worker-5 is a loopback address, and there is no default route.",
        ),
        ("told wrong", "GLOO_SOCKET_IFNAME=eth9: worker-5 has no such interface with an address."),
        ("no route", "MASTER_ADDR=10.9.0.1 cannot be reached from worker-5 (Network is unreachable)."),
    ],
)
def test_what_is_unclear_is_told_with_the_addresses_at_hand(found, case, problem):
    text = str(found[case])
    assert text.startswith(problem), text
    assert "net7 (10.7.0.5" in text and "net8 (10.8.0.5" in text and text.endswith(": name one by GLOO_SOCKET_IFNAME")


def test_a_name_that_cannot_be_resolved_is_told(found):
    assert str(found["unknown name"]).startswith("MASTER_ADDR=worker-9.invalid cannot be resolved on worker-5")


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[Group]:
    """Two watched ranks, each in a network of its own; the cable is between ``cable`` and its peer."""
    inside = [["unshare", "-n", "-u", "bash", "-c", SETUP, f"host-{rank}", *words]
              for rank, words in enumerate(two_ranks(tmp_path, hosts=2))]  # fmt: skip
    group = Group(tmp_path, inside, MASTER_ADDR="10.7.0.1", WORLD_SIZE="2", GLOO_SOCKET_IFNAME="cable")
    try:
        yield group
    finally:
        group.kill()


# waits for the test to lay the cable, then becomes the rank
SETUP = 'hostname "$0"; until ip -o addr show cable 2>/dev/null | grep -q 10.7; do sleep 0.1; done; exec "$@"'


def test_ranks_on_both_sides_of_a_cut_end_with_a_message_each(two_hosts):
    pids = [process.pid for process in two_hosts.started]
    two_hosts.wait_for(lambda: all(network(str(pid)) != network("self") for pid in pids))
    lay = ["link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(pids[1])]
    inside(pids[0], *lay)
    for rank, pid in enumerate(pids):
        inside(pid, "link", "set", "cable", "up")
        inside(pid, "addr", "add", f"10.7.0.{rank + 1}/24", "dev", "cable")
    two_hosts.wait_for(lambda: (two_hosts.folder / "step-100-0").exists())
    inside(pids[1], "link", "set", "cable", "down")
    two_hosts.wait_until_gone()
    first, second = sorted(two_hosts.messages())
    assert f"nothing heard from rank 1 on host-1 for {SILENT} s, last in step" in first
    assert "rank 0 at 10.7.0.1 port" in second and f"cannot be reached from host-1 for {SILENT} s" in second
    assert two_hosts.codes() == [1, 1]


def network(pid: str) -> Path:
    return Path(f"/proc/{pid}/ns/net").readlink()


def inside(pid: int, *words: str) -> None:
    subprocess.run(["nsenter", "-t", str(pid), "-n", "ip", *words], check=True, timeout=10)
