"""What the scripts make of a launcher that fails silently, leaves processes behind, or is told to stop."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from ummim.cluster import supervise
from ummim.cluster.deepspeed_job import environment_file, quoted
from ummim.cluster.jobs import VARIABLE, end, processes
from ummim.cluster.supervise import LocalRanks, Supervisor, new_job, outcome
from ummim.errors import UserError

RANK = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print('up', flush=True)
time.sleep(60)
"""


def rank(job: str, code: str = RANK) -> subprocess.Popen[str]:
    """A process of a job that has a rank, ready for signals."""
    env = {**os.environ, VARIABLE: job, "RANK": "0"}
    made = subprocess.Popen([sys.executable, "-S", "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    with made.stdout:
        made.stdout.readline()
    return made


def test_a_jobs_processes_are_known_by_its_name_alone():
    mine, other = new_job(), new_job()
    one, two = rank(mine), rank(other)
    try:
        assert processes(mine) == processes(mine, ranks=True) == [one.pid]
        helper = subprocess.Popen(["sleep", "60"], env={**os.environ, VARIABLE: mine})
        time.sleep(0.1)
        assert processes(mine) == sorted([one.pid, helper.pid])
        assert processes(mine, ranks=True) == [one.pid]
        waiter = threading.Thread(target=helper.wait)
        waiter.start()
        threading.Thread(target=one.wait).start()
        assert end(mine, seconds=1) == 1
        waiter.join(10)
        assert (one.wait(), helper.wait()) == (143, -signal.SIGKILL)  # a rank may save, nothing else is waited for
        assert two.poll() is None
    finally:
        two.kill()
        two.wait()


def supervised(script: str, **options: object) -> tuple[int, Supervisor]:
    job = new_job()
    ranks = LocalRanks(job)
    supervisor = Supervisor(["bash", "-c", script], {**os.environ, VARIABLE: job}, ranks.stop, **options)  # type: ignore[arg-type]
    try:
        return supervisor.run(), supervisor
    finally:
        end(job, 0)


def test_a_launchers_exit_code_is_passed_on():
    assert supervised("exit 7")[0] == 7
    assert supervised("kill -9 $$")[0] == 137


def test_a_launcher_that_lost_a_host_is_ended(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(supervise, "GRACE", 0.5)
    begun = time.monotonic()
    code, _ = supervised("echo 'pdsh@here: host2: ssh exited with exit code 247' >&2; sleep 60")
    assert code == 247
    assert time.monotonic() - begun < 20
    assert "not all ranks have ended in time" in capfd.readouterr().err


def test_a_signal_reaches_the_ranks_and_the_launcher_ends_with_them():
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
    script = "RANK=0 bash -c 'trap \"exit 143\" USR1; sleep 60 & wait'"
    code, supervisor = supervised(script)
    assert (code, supervisor.asked) == (143, signal.SIGUSR1)


def test_a_launcher_that_starts_ranks_anew_is_ended_once_they_are_gone():
    job = new_job()
    ranks = LocalRanks(job)
    script = f"while true; do RANK=0 {shlex.join([sys.executable, '-S', '-c', RANK])}; done"
    supervisor = Supervisor(["bash", "-c", script], {**os.environ, VARIABLE: job}, ranks.stop, ranks.remaining)
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    begun = time.monotonic()
    code = supervisor.run()
    end(job, 0)
    assert code != 0
    assert outcome(code, supervisor.asked, "unused", []) == 143
    assert time.monotonic() - begun < 20
    assert not processes(job)


def test_without_a_rank_to_save_a_signal_ends_the_launcher():
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    code, supervisor = supervised("sleep 60")
    assert outcome(code, supervisor.asked, "unused", []) == 130


def test_a_killed_supervisor_leaves_nothing_running(tmp_path: Path):
    """Its launcher, deaf to other signals, is killed, and the ranks, which may be on other hosts, are asked to save."""
    script = f"""
import os, shlex, sys
from pathlib import Path
from ummim.cluster.jobs import VARIABLE
from ummim.cluster.supervise import LocalRanks, Supervisor
rank = {RANK!r}
command = ["bash", "-c", f"trap '' TERM; RANK=0 setsid {{sys.executable}} -S -c {{shlex.quote(rank)}} & sleep 60; true"]
ending = [[sys.executable, "-m", "ummim.cluster.jobs", "killed-one", "end"]]
folder = Path({str(tmp_path)!r}) / "folder"
folder.mkdir()
environment = {{**os.environ, VARIABLE: "killed-one"}}
Supervisor(command, environment, LocalRanks("killed-one").stop, ending=ending, folder=folder).run()
"""
    words = [sys.executable, "-c", script]
    supervisor = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    assert supervisor.stdout.readline() == "up\n"
    assert processes("killed-one", ranks=True)
    supervisor.kill()
    printed, errors = supervisor.communicate(timeout=60)  # until the last of them has closed its end
    assert "this job's supervisor was killed: all ranks save and end" in errors
    deadline = time.monotonic() + 20
    while processes("killed-one") or (tmp_path / "folder").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_launcher_is_told_of(capfd: pytest.CaptureFixture[str]):
    supervised("kill -9 $$")
    assert "ummim: the launcher was killed by SIGKILL: all ranks save and end" in capfd.readouterr().err


def test_exit_code_0_is_not_believed(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    words = ["5", "quickstart", f"output={tmp_path}", "--", "true"]
    done = subprocess.run(
        [sys.executable, "-m", "ummim.cluster.supervise", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    early = "the launcher ended with exit code 0 before the run was at its end: was a part of it killed?"
    assert done.stderr == f"ummim: {early}\nummim: {tmp_path}: no checkpoint yet\n"


AWKWARD = [
    "a b",
    "it's",
    '"quoted"',
    "$HOME",
    "`id`",
    "50%n",
    "%h",
    "\\",
    "[1, 2]",
    "{a: b}",
    "*",
    "é",
    "a;b|c&d>e",
    "~",
    "!x",
    "#",
]


@pytest.mark.parametrize("word", AWKWARD)
def test_an_argument_survives_deepspeed_pdsh_and_the_remote_shell(word: str):
    sent = quoted(word)
    assert " " not in sent  # DeepSpeed would put double quotes around it
    assert "%" not in sent  # pdsh would put the host's name or number there
    done = subprocess.run(["bash", "-c", f"printf %s {sent}"], capture_output=True, text=True, check=True)
    assert done.stdout == word


def test_plain_arguments_stay_readable():
    assert quoted("data.shards=/fast/imagenet,v2") == "data.shards=/fast/imagenet,v2"


@pytest.mark.parametrize("variable", ["A=$(id)", 'A="x"', "A=`id`", "A=b\nC=d", "no value", "A=50%n", "9A=b"])
def test_a_variable_that_a_shell_would_read_is_refused(tmp_path: Path, variable: str):
    with pytest.raises(UserError, match="cannot be passed to other hosts"):
        environment_file(tmp_path, [variable])


def test_the_environment_file_has_no_blank_line(tmp_path: Path):
    path = environment_file(tmp_path, ["PATH=/a b:/c", "OMP_NUM_THREADS=4"])
    assert path.read_text() == "PATH=/a b:/c\nOMP_NUM_THREADS=4\n"


@pytest.mark.parametrize("script", ["deepspeed.sh", "torchrun.sh", "slurm.sbatch"])
def test_dry_run_prints_the_commands_and_runs_nothing(script: str, tmp_path: Path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("nowhere1.invalid slots=8\nnowhere2.invalid slots=8\n")
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "HOSTFILE": str(hostfile),
        "NNODES": "2",
        "RDZV_ENDPOINT": "nowhere:1",
    }
    command = ["bash", f"launch/{script}", "--dry-run", "quickstart", "name=two words", f"output={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "two words" in " ".join(shlex.split(done.stdout, comments=True)).replace("\\x20", " ")
    assert (
        "--nnodes" in done.stdout or "train.py" in done.stdout or "srun" in done.stdout
    ) and "quickstart" in done.stdout
    assert list(tmp_path.iterdir()) == [hostfile]
