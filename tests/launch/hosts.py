"""Hosts for tests: namespaces of this machine that behave like machines of their own.

Each has a network (veth on a bridge), process ids, a name, mounts and an sshd of its own, and files in common with
all others, as a cluster with a shared file system has; ``/etc/hosts`` names a host itself as 127.0.1.1, as Debian
does. Nothing outlives the test: a host's first process dies with the process that made it, even by SIGKILL, and
with it go all its other processes, its mounts and its network.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

SUBNET = "10.77.0"
NEEDED = ("unshare", "nsenter", "ip", "mount", "sshd", "ssh", "ssh-keygen", "pdsh")
_PATH = os.pathsep.join(("/usr/sbin", "/sbin", os.environ.get("PATH", "")))

SSHD = """
Port 22
ListenAddress 0.0.0.0
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
MaxStartups 100
"""

# The first process of a host. Its arguments: folder, name. It waits for its network, then becomes sshd.
START = """
set -eu
folder=$1 name=$2
mount --make-rprivate /
mount -t proc proc /proc
mount -t sysfs sysfs /sys || true
hostname "$name"
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/ssh" "$HOME/.ssh"
mkdir -p /run/sshd
ip link set lo up
read -r address
ip link set eth0 up
ip address add "$address/24" dev eth0
echo up
exec "$(command -v sshd)" -D -e -f "$folder/sshd_config"
"""


def why_not() -> str | None:
    """Why this machine cannot make hosts; None if it can."""
    missing = [name for name in NEEDED if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install openssh-server openssh-client pdsh iproute2)"
    trial = ["unshare", "--net", "--pid", "--uts", "--mount", "--fork", "sh", "-c",
             "hostname trial && mount -t proc proc /proc && ip link add trial type bridge"]  # fmt: skip
    done = subprocess.run(trial, capture_output=True, text=True, env={**os.environ, "PATH": _PATH}, timeout=30)
    return None if done.returncode == 0 else f"namespaces are not allowed here: {done.stderr.strip()}"


class Hosts:
    """``with Hosts(folder, 2) as hosts``: host1, host2, ... at 10.77.0.1, 10.77.0.2, ...

    folder: for keys and logs. ``hosts.names``; commands run by ``run`` and ``popen`` on a host, as root.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.names = [f"host{number}" for number in range(1, count + 1)]
        self._processes: dict[str, subprocess.Popen[Any]] = {}
        self._logs: list[Any] = []

    def __enter__(self) -> Hosts:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for name in list(self._processes):
            self.kill(name)
        for log in self._logs:
            log.close()
        self._logs = []

    def address(self, name: str) -> str:
        return f"{SUBNET}.{self.names.index(name) + 1}"

    def hostfile(self, path: Path, slots: int = 1, names: Sequence[str] | None = None) -> Path:
        """Write a hostfile of these hosts."""
        path.write_text("".join(f"{name} slots={slots}\n" for name in names or self.names))
        return path

    def words(self, name: str, command: Sequence[str]) -> list[str]:
        """The argv that runs a command in all namespaces of a host."""
        return ["nsenter", "--target", str(self.first_process(name)), "--all", f"--wd={Path.cwd()}", *command]

    def run(self, name: str, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, with the environment of a shell that has logged in there."""
        options = {"capture_output": True, "text": True, "timeout": 240, "env": self.environment(), **options}
        return subprocess.run(self.words(name, command), **options)

    def popen(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(self.words(name, command), **{"env": self.environment(), **options})

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        path = os.pathsep.join((str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin"))
        return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", **extra}

    def processes(self, name: str, word: str = "") -> dict[int, str]:
        """Command lines that hold ``word``, by this machine's process ids, of a host's processes but its sshd's."""
        space = Path(f"/proc/{self.first_process(name)}/ns/pid").readlink()
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and Path(folder / "ns/pid").readlink() == space:
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if line and not line.startswith(("sshd:", "/usr/sbin/sshd")) and word in line:
                        found[int(folder.name)] = line
            except OSError:
                continue  # it has ended
        return found

    def link(self, name: str, state: str) -> None:
        """``down`` pulls a host's cable out, ``up`` puts it back."""
        self._switch("ip", "link", "set", name, state)

    def mount(self, name: str, *words: str) -> None:
        """Mount something on one host only."""
        self.run(name, ["mount", *words], check=True)

    def kill(self, name: str) -> None:
        """Power off."""
        process = self._processes.pop(name)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (*map(int, children), process.pid):  # the first process in it, then unshare, which waits for it
            os.kill(pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def first_process(self, name: str) -> int:
        """This machine's id of a host's first process."""
        unshare = self._processes[name].pid
        return int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0])

    def _start(self) -> None:
        self._keys()
        self._processes["switch"] = self._spawn(["unshare", "--net", "sleep", "infinity"], "switch")
        _wait(lambda: _has_own_network(self._processes["switch"].pid))
        self._switch("ip", "link", "add", "bridge", "type", "bridge")
        self._switch("ip", "link", "set", "bridge", "up")
        for name in self.names:
            self._start_host(name)
        for name in self.names:
            table = Path(f"/proc/{self.first_process(name)}/net/tcp")
            _wait(partial(_listens, table, 22))

    def _start_host(self, name: str) -> None:
        folder = self.folder / name
        others = "".join(f"{self.address(other)} {other}\n" for other in self.names if other != name)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}.cluster {name}\n{others}")
        (folder / "sshd_config").write_text(SSHD.format(folder=folder))
        Path.home().joinpath(".ssh").mkdir(mode=0o700, exist_ok=True)
        spaces = ["unshare", "--net", "--pid", "--uts", "--mount", "--ipc", "--fork", "--kill-child=KILL"]
        process = self._spawn([*spaces, "sh", "-c", START, "sh", str(folder), name], name)
        self._processes[name] = process
        _wait(lambda: bool(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()))
        first = str(self.first_process(name))
        self._switch("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", first)
        self._switch("ip", "link", "set", name, "master", "bridge", "up")
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{self.address(name)}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "up\n", (self.folder / f"{name}.log").read_text()

    def _keys(self) -> None:
        """One key pair for the user on every host, and a host key each, all known to all."""
        for name in self.names:
            (self.folder / name / "ssh").mkdir(parents=True)
            _new_key(self.folder / name / "host_key")
        _new_key(self.folder / "key")
        known = "".join(
            f"{name},{self.address(name)} {(self.folder / name / 'host_key.pub').read_text()}" for name in self.names
        )
        for name in self.names:
            folder = self.folder / name
            shutil.copy(self.folder / "key.pub", folder / "authorized_keys")
            shutil.copy(self.folder / "key", folder / "ssh" / "id_ed25519")
            (folder / "ssh" / "known_hosts").write_text(known)

    def _spawn(self, words: Sequence[str], name: str) -> subprocess.Popen[str]:
        log = (self.folder / f"{name}.log").open("w")
        self._logs.append(log)
        pipe, env = subprocess.PIPE, {**self.environment(), "PATH": _PATH}
        return subprocess.Popen(
            words, stdin=pipe, stdout=pipe, stderr=log, text=True, env=env, preexec_fn=_die_with_parent
        )

    def _switch(self, *words: str) -> None:
        space = ["nsenter", "--target", str(self._processes["switch"].pid), "--net"]
        subprocess.run([*space, *words], check=True, env={**os.environ, "PATH": _PATH})


def _new_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _has_own_network(pid: int) -> bool:
    return Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()


def _listens(table: Path, port: int) -> bool:
    """Whether a host's table of TCP sockets has one that listens on ``port``."""
    rows = [line.split() for line in table.read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


def _wait(holds: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "a namespace did not come up"
        time.sleep(0.01)


def wait(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
