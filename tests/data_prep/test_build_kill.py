"""Builds that are killed at any moment."""

import fcntl
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tqdm import tqdm

from data_prep import build as building
from data_prep import journal
from data_prep.__main__ import main
from data_prep.journal import Journal
from data_prep.shard_writer import ShardWriter
from tests.conftest import ROOT
from tests.data.pictures import contents, encode, is_running, picture, write_tree
from tests.data_prep.archives import foreign_shards, imagenet_train, tar


def images(folder: Path) -> Path:
    return write_tree(folder / "images", each=40)


def class_tars(folder: Path) -> Path:
    """A tar of tars."""
    path = folder / "train.tar"
    return imagenet_train(images(folder), path)


def foreign(folder: Path) -> Path:
    src = foreign_shards(folder / "laion", shards=8, each=9)
    broken = [
        ("x.cls", b"0"),
        ("x.jpg", b"no picture"),
        ("y.json", b"{}"),
        ("z.jpg", encode(picture())),
        ("z.cls", b"1"),
    ]
    (src / "broken.tar").write_bytes(tar(broken))
    return src


def parquet(folder: Path) -> Path:
    pytest.importorskip("pyarrow")
    from tests.data_prep.test_sources_parquet import hugging_face

    for i in range(4):
        hugging_face(folder / "data" / f"{i}.parquet")
    return folder / "data"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in (*arguments, "--workers", 1)])


def _build(src: Path, dst: Path, options: tuple[str, ...]) -> None:
    tqdm.set_lock(threading.RLock())  # its own: killed with the one it shares, it would hold that for ever
    sys.exit(main(["build", str(src), str(dst), "--shard-count", "5", "--max-bad", "0.1", *options]))


@pytest.mark.parametrize("source", [images, class_tars, foreign, parquet])
def test_killed_again_and_again_the_shards_are_the_same(source: Callable[[Path], Path], tmp_path: Path) -> None:
    rng = random.Random(source.__name__)
    src = source(tmp_path)
    reference, dst = tmp_path / "reference", tmp_path / "dst"
    assert main(["build", str(src), str(reference), "--shard-count", "5", "--max-bad", "0.1", "--workers", "1"]) == 0
    kills, ended, delay = 0, False, 0.02
    while not ended:
        options = ("--workers", str(rng.choice([1, 2, 3])))
        process = multiprocessing.get_context("fork").Process(target=_build, args=(src, dst, options))
        process.start()
        process.join(rng.uniform(0, delay))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        ended = process.exitcode == 0
        kills += not ended
        delay *= 1.2  # or it would never end
    assert kills >= 2
    assert contents(dst) == contents(reference)


def test_a_torn_journal_is_believed_up_to_the_tear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst = images(tmp_path), tmp_path / "dst"
    arguments = ["build", str(src), str(dst), "--shard-count", "5", "--workers", "1"]
    assert main(["build", str(src), str(tmp_path / "reference"), *arguments[3:]]) == 0
    monkeypatch.setattr(journal.Journal, "finish", lambda self: None)
    assert main(arguments) == 0
    monkeypatch.undo()
    path = dst / "build.journal"
    path.write_bytes(path.read_bytes()[:-200])
    (dst / "shard-000009.tar").unlink()
    stamp = (dst / "shard-000003.tar").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (dst / "shard-000003.tar").stat().st_mtime_ns == stamp
    assert contents(dst) == contents(tmp_path / "reference")


def kill_at(point: str, count: int) -> None:
    """SIGKILL this process at the ``count``-th pass of a point of the build."""
    owner: object
    owner, name = {
        "inside a shard": (ShardWriter, "add"),
        "before the journal's line": (Journal, "add"),
        "before the index": (building, "write_index"),
        "before the journal goes": (Journal, "finish"),
    }[point]
    original = getattr(owner, name)
    calls = iter(range(1, 10**6))

    def killing(*arguments: object) -> object:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(owner, name, killing)


def _killed_build(point: str, count: int, src: Path, dst: Path, *options: str) -> None:
    kill_at(point, count)
    run("build", src, dst, "--shard-count", 5, *options)


@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("inside a shard", 1),
        ("inside a shard", 13),
        ("before the journal's line", 3),
        ("before the index", 1),
        ("before the journal goes", 1),
    ],
)
def test_a_killed_build_run_again_gives_the_same_bytes(
    tree: Path, shards: Path, tmp_path: Path, point: str, count: int
) -> None:
    dst = tmp_path / "killed"
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_killed_build, args=(point, count, tree, dst))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (dst / "index.json").exists() == (point == "before the journal goes")
    assert (dst / "build.journal").exists()
    assert run("build", tree, dst, "--shard-count", 5) == 0
    assert contents(dst) == contents(shards)


def test_a_killed_build_that_overwrites_goes_on(tree: Path, shards: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    assert run("build", tree, dst, "--shard-count", 9) == 0
    process = multiprocessing.get_context("fork").Process(
        target=_killed_build, args=("before the journal's line", 3, tree, dst, "--overwrite")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    stamp = (dst / "shard-000001.tar").stat().st_mtime_ns
    assert run("build", tree, dst, "--shard-count", 5, "--overwrite") == 0
    assert (dst / "shard-000001.tar").stat().st_mtime_ns == stamp
    assert contents(dst) == contents(shards)
    assert run("build", tree, dst, "--shard-count", 5, "--overwrite") == 0  # a finished one is made again
    assert (dst / "shard-000001.tar").stat().st_mtime_ns != stamp


def test_an_unfinished_build_is_overwritten_from_the_start(tree: Path, shards: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    process = multiprocessing.get_context("fork").Process(
        target=_killed_build, args=("before the journal's line", 3, tree, dst)
    )
    process.start()
    process.join()
    stamp = (dst / "shard-000000.tar").stat().st_mtime_ns
    assert run("build", tree, dst, "--shard-count", 5, "--overwrite") == 0
    assert (dst / "shard-000000.tar").stat().st_mtime_ns != stamp
    assert contents(dst) == contents(shards)


@pytest.mark.parametrize("moment", ["while the lock is waited for", "before the journal is opened"])
def test_a_build_that_waits_for_its_like_finds_it_finished(
    tree: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    before, path = contents(shards), shards / "build.journal"
    other = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)

    def end(*_: object) -> None:
        path.unlink(missing_ok=True)
        fcntl.flock(other, fcntl.LOCK_UN)

    owner, name = (journal.time, "sleep") if moment.startswith("while") else (journal, "refuse_others")
    monkeypatch.setattr(owner, name, end)
    assert run("build", tree, shards, "--shard-count", 5) == 0
    os.close(other)
    assert "already built, nothing to do" in capsys.readouterr().out
    assert contents(shards) == before


def test_an_unfinished_build_is_not_taken_for_shards(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_killed_build, args=("before the index", 1, tree, tmp_path / "dst")
    )
    process.start()
    process.join()
    assert run("index", tmp_path / "dst") == 2
    assert run("verify", tmp_path / "dst") == 2
    output = capsys.readouterr()
    assert "unfinished build" in output.err
    assert "the build has not finished" in output.out + output.err


def test_workers_end_with_a_build_that_is_killed(tmp_path: Path) -> None:
    src = write_tree(tmp_path / "images", each=40)
    slow = (
        "import os, time, data_prep.packing as p, data_prep.__main__ as m\n"
        "convert = p.convert\n"
        "def slow(*arguments):\n"
        "    os.write(1, f'{os.getpid()}\\n'.encode()); time.sleep(0.5)\n"  # one write: two workers share the pipe
        "    return convert(*arguments)\n"
        "p.convert = slow\n"
        f"m.main(['build', {str(src)!r}, {str(tmp_path / 'dst')!r}, '--workers', '2', '--shard-count', '10'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        workers: set[int] = set()
        while len(workers) < 2:
            workers.add(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "worker processes outlive the build"
        time.sleep(0.05)
