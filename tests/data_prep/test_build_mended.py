"""Images that are mended between two runs of a build that has not finished."""

from pathlib import Path

import pytest

from data_prep.__main__ import main
from tests.data.pictures import contents, encode, picture


def run(*arguments: object) -> int:
    return main([str(argument) for argument in (*arguments, "--workers", 1)])


def flat(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{i:02d}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(encode(picture(i)))
    return paths


def spoil(*paths: Path) -> list[bytes]:
    """Make images unreadable, of the same size; returns what they were."""
    before = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(bytes(path.stat().st_size))
    return before


def test_images_mended_after_too_many_were_bad_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = flat(tmp_path / "src", 8)
    command = ("build", tmp_path / "src", tmp_path / "dst", "--shard-count", 1, "--no-shuffle", "--max-bad", 0.3)
    bad = (paths[1], paths[3], paths[5])
    before = spoil(*bad)
    assert run(*command) == 2
    assert "mend or remove them" in capsys.readouterr().err
    stamp = (tmp_path / "dst" / "shard-000000.tar").stat().st_mtime_ns
    for path, data in zip(bad, before, strict=True):
        path.write_bytes(data)
    assert run(*command) == 0
    assert (tmp_path / "dst" / "shard-000000.tar").stat().st_mtime_ns == stamp
    assert run("build", tmp_path / "src", tmp_path / "reference", *command[3:]) == 0
    assert contents(tmp_path / "dst") == contents(tmp_path / "reference")


def test_images_that_are_still_bad_do_not_hold_up_a_build_that_goes_on(tmp_path: Path) -> None:
    paths = flat(tmp_path / "src", 8)
    command = ("build", tmp_path / "src", tmp_path / "dst", "--shard-count", 2, "--no-shuffle", "--max-bad")
    spoil(paths[1], paths[5])
    assert run(*command, 0.2) == 2
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").glob("*.tar")}
    assert len(stamps) == 2
    paths[1].write_bytes(b"\xff\xd8" + paths[1].read_bytes()[2:])  # bad in another way
    assert run(*command, 0.3) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert run("build", tmp_path / "src", tmp_path / "reference", *command[3:], 0.3) == 0
    assert contents(tmp_path / "dst") == contents(tmp_path / "reference")


def test_fewer_shards_than_before_leave_none_behind(tmp_path: Path) -> None:
    paths = flat(tmp_path / "src", 5)
    command = ("build", tmp_path / "src", tmp_path / "dst", "--shard-count", 1, "--no-shuffle", "--max-bad")
    before = spoil(paths[0], paths[4])
    assert run(*command, 0.2) == 2
    paths[0].write_bytes(before[0])
    spoil(paths[1], paths[2])
    assert run(*command, 0.9) == 0
    assert len(list((tmp_path / "dst").glob("*.tar"))) == 2
    assert run("verify", tmp_path / "dst") == 0


def test_a_mended_image_that_moves_the_borders_of_the_shards(tmp_path: Path) -> None:
    paths = flat(tmp_path / "src", 12)
    options = ("--shard-bytes", "8kB", "--no-shuffle", "--max-bad", 0.2, "--quality", 90)
    paths[8].write_bytes(encode(picture(8, (900, 700)), quality=90))  # the mean that the borders follow is smaller
    command = ("build", tmp_path / "src", tmp_path / "dst", *options)  # while it cannot be read
    bad = (paths[8], paths[10], paths[11])
    before = spoil(*bad)
    assert run(*command) == 2
    finished = len(list((tmp_path / "dst").glob("*.tar")))
    assert finished > 1
    for path, data in zip(bad, before, strict=True):
        path.write_bytes(data)
    assert run(*command) == 0
    assert run("build", tmp_path / "src", tmp_path / "reference", *options) == 0
    assert contents(tmp_path / "dst") == contents(tmp_path / "reference")
