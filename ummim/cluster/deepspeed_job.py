"""``deepspeed`` on the hosts of a hostfile, watched: what ``launch/deepspeed.sh`` runs."""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ummim.cluster.commands import DEFAULT_PORT
from ummim.cluster.hosts import Host, read_hostfile
from ummim.cluster.jobs import LEAVE_SECONDS, VARIABLE
from ummim.cluster.remote import SSH_OPTIONS, ssh_command
from ummim.cluster.supervise import Supervisor, new_job, outcome, tell
from ummim.errors import UserError, run_main

# Safe between the double quotes that DeepSpeed puts around a value, and within pdsh, to which % is special.
_VALUE = re.compile(r"[A-Za-z_]\w*=[\w@+=:,./ \[\]{}~^-]*", re.ASCII)


def quoted(word: str) -> str:
    """``word`` for the remote shell, through DeepSpeed, which puts double quotes around whatever holds a blank, and
    through pdsh, which replaces % and a letter. The shell must know ``$'...'``, as bash and zsh do."""
    if re.fullmatch(r"[\w@+=:,./-]+", word, re.ASCII):
        return word
    escaped = "".join(c if re.match(r"[\w@+=:,./\[\]{}-]", c, re.ASCII) else _escape(c) for c in word)
    return f"$'{escaped}'"


def _escape(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode())


def environment_file(folder: Path, variables: Sequence[str]) -> Path:
    """The file of NAME=VALUE lines that DeepSpeed exports on each host. A blank line in it would crash DeepSpeed."""
    for variable in variables:
        if not _VALUE.fullmatch(variable):
            raise UserError(
                f"{variable!r} cannot be passed to other hosts: NAME=VALUE, without quotes, $, % or newlines"
            )
    path = folder / "environment"
    path.write_text("\n".join(variables) + "\n")
    return path


def deepspeed_command(hostfile: Path, address: str, port: int, arguments: Sequence[str]) -> list[str]:
    """The argv of DeepSpeed's launcher. One host goes through ssh as well: the same quoting, the same environment."""
    deepspeed = Path(sys.executable).parent / "deepspeed"
    options = ["--hostfile", str(hostfile), "--launcher", "pdsh", "--force_multi", "--no_ssh_check"]
    rendezvous = ["--master_addr", address, "--master_port", str(port)]
    return [str(deepspeed), *options, *rendezvous, "train.py", *(quoted(word) for word in arguments)]


def _commands(hosts: Sequence[Host], words: Sequence[str]) -> list[list[str]]:
    """The argvs that run ``ummim.cluster.jobs`` on each host."""
    return [ssh_command(host, [sys.executable, "-m", "ummim.cluster.jobs", *words]) for host in hosts]


def on_hosts(hosts: Sequence[Host], words: Sequence[str], seconds: float) -> int:
    """Run ``ummim.cluster.jobs`` on all hosts at once; returns the sum of what they print, and tells who is silent."""
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    running = [
        subprocess.Popen(c, stdin=none, stdout=pipe, stderr=none, text=True, start_new_session=True)
        for c in _commands(hosts, words)
    ]
    total = 0
    for host, process in zip(hosts, running, strict=True):
        try:
            printed, _ = process.communicate(timeout=seconds)
            total += int(printed)
        except (subprocess.TimeoutExpired, ValueError):
            process.kill()
            process.communicate()
            tell(f"{host.name} does not answer: if it is alive, its own watchdog ends the job there")
    return total


def first_address(host: Host) -> str:
    """The first address that a host gives for itself, by which DeepSpeed would have the others meet there."""
    command = ssh_command(host, ["hostname", "-I"])
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{host.name} cannot be asked for its address ({error}): give MASTER_ADDR") from None
    if not found:
        raise UserError(f"{host.name} has no address but loopback's: give MASTER_ADDR")
    return found[0]


def run(options: argparse.Namespace) -> int:
    """Check the hosts, start the job, watch it, end what is left; the job's exit code."""
    words, hosts, job = [options.recipe, *options.overrides], read_hostfile(options.hostfile), new_job()
    with tempfile.TemporaryDirectory(prefix="ummim-job-") as name:
        folder, address = Path(name), options.master_addr
        exported = environment_file(folder, [*options.env, f"{VARIABLE}={job}"])
        if not options.skip_preflight:
            answer = folder / "address"
            if code := subprocess.run([*_preflight(options), "--address-file", str(answer)]).returncode:
                return code
            address = answer.read_text().strip()
        address = address or first_address(hosts[0])
        variables = {**os.environ, "DS_ENV_FILE": str(exported), "PDSH_SSH_ARGS_APPEND": _ssh_append()}

        def stop(number: signal.Signals) -> int:
            return on_hosts(hosts, [job, number.name.removeprefix("SIG")], 30)

        command = deepspeed_command(options.hostfile, address, options.port, words)
        supervisor = Supervisor(command, variables, stop, ending=_commands(hosts, [job, "end"]), folder=folder)
        code = supervisor.run()
        if left := on_hosts(hosts, [job, "end"], LEAVE_SECONDS + 30):
            tell(f"{left} processes of the job were still there: killed")
    return outcome(code, supervisor.asked, options.recipe, options.overrides)


def dry_run(options: argparse.Namespace) -> None:
    """Print what ``run`` would do."""
    words, first = [options.recipe, *options.overrides], read_hostfile(options.hostfile)[0]
    with tempfile.TemporaryDirectory() as folder:
        lines = environment_file(Path(folder), [*options.env, f"{VARIABLE}={new_job()}"]).read_text().splitlines()
    print("\n".join(["# ENVIRONMENT_FILE, exported on every host:", *(f"#   {line}" for line in lines)]))
    if not options.skip_preflight:
        print(shlex.join(_preflight(options)))
    command = deepspeed_command(
        options.hostfile, options.master_addr or f"ADDRESS_OF_{first.name}", options.port, words
    )
    print(shlex.join(["DS_ENV_FILE=ENVIRONMENT_FILE", f"PDSH_SSH_ARGS_APPEND={_ssh_append()}", *command]))


def _preflight(options: argparse.Namespace) -> list[str]:
    words = [sys.executable, "-m", "ummim", "preflight", options.recipe, *options.overrides]
    words += ["--hostfile", str(options.hostfile), "--port", str(options.port), "--free-gib", str(options.free_gib)]
    return words + (["--master-addr", options.master_addr] if options.master_addr else [])


def _ssh_append() -> str:
    return os.environ.get("PDSH_SSH_ARGS_APPEND") or shlex.join(SSH_OPTIONS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/deepspeed.sh", description="Train on the hosts of a hostfile.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--skip-preflight", action="store_true", help="do not look at the hosts first")
    parser.add_argument("--hostfile", type=Path, required=True)
    parser.add_argument("--master-addr", default="", help="of the first host; found if not given")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--free-gib", type=float, default=20)
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="exported on every host")
    options = parser.parse_intermixed_args()
    if options.dry_run:
        return run_main(lambda: dry_run(options))
    return run_main(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
