import errno
import hashlib
import logging
import os
from pathlib import Path

import pytest

from tests.data.remote.server import Server
from ummim.data import download as module
from ummim.data.download import Patience, Stopped, download, fetch_file, fetch_range
from ummim.data.faults import SourceDown
from ummim.data.remote import Interrupted, Refused
from ummim.errors import DataError

NAME = "shard-000001.tar"


class FakeTime:
    """Seconds that pass by sleeping only."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def patience(self, seconds: float) -> Patience:
        return Patience(seconds, sleep=self.sleep, clock=lambda: self.now)


def fetch(server: Server, part: Path, patience: Patience | None = None, size: int | None = 20_000) -> bytes:
    """Download the file of ``NAME`` and give what has come."""
    sha256 = hashlib.sha256((server.folder / NAME).read_bytes()).hexdigest()
    descriptor = download(f"{server.url}/{NAME}", part, sha256, size, patience or Patience(60), write_all)
    os.close(descriptor)
    return part.read_bytes()


def write_all(descriptor: int, data: bytes) -> None:
    assert os.write(descriptor, data) == len(data)


@pytest.mark.usefixtures("short_stalls")
@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "faults",
    [["drop"] * 3, [500, 503, 429], ["short"], ["short", "short"], ["corrupt", "corrupt"], ["stall"], ["drop", 500]],
    ids=lambda faults: "-".join(map(str, faults)),
)
def test_a_failing_server_is_asked_until_the_file_is_right(
    server: Server, tmp_path: Path, faults: list[str | int], ranges: bool, lengths: bool
) -> None:
    server.ranges, server.lengths = ranges, lengths
    server.faults[NAME] = list(faults)
    assert fetch(server, tmp_path / "part") == (server.folder / NAME).read_bytes()
    assert not server.faults[NAME]


@pytest.mark.parametrize("faults", [["drop"], ["short"], ["corrupt"], [500]])
def test_a_file_of_unknown_size_is_known_by_its_checksum(server: Server, tmp_path: Path, faults: list) -> None:
    server.lengths = False
    server.faults[NAME] = faults
    assert fetch(server, tmp_path / "part", size=None) == (server.folder / NAME).read_bytes()


def test_a_broken_download_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.faults[NAME] = ["drop"]
    fetch(server, tmp_path / "part")
    assert [wanted for _, wanted in server.requests] == [None, "bytes=10000-"]
    (tmp_path / "other").write_bytes((server.folder / NAME).read_bytes()[:15_000])  # of a process that was killed
    assert fetch(server, tmp_path / "other") == (server.folder / NAME).read_bytes()
    assert server.requests[-1][1] == "bytes=15000-"


def test_a_damaged_beginning_is_fetched_again(server: Server, tmp_path: Path) -> None:
    for damaged in (b"x" * 15_000, b"x" * 20_000, b"x" * 30_000):
        (tmp_path / "part").write_bytes(damaged)
        assert fetch(server, tmp_path / "part") == (server.folder / NAME).read_bytes()


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_ends_at_once(server: Server, tmp_path: Path, status: int) -> None:
    server.faults[NAME] = [status, "..."]
    with pytest.raises(Refused, match=f"^HTTP {status} "):
        fetch(server, tmp_path / "part")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("corrupt", "its checksum is .* its index says"), ("short", "it has 10000 bytes there, its index says 20000")],
)
def test_the_same_other_file_three_times_is_not_asked_for_again(
    server: Server, tmp_path: Path, fault: str, reason: str
) -> None:
    server.faults[NAME] = [fault, "..."]
    with pytest.raises(Refused, match=reason):
        fetch(server, tmp_path / "part")
    assert len(server.requests) == 3


def test_a_longer_file_is_not_taken(server: Server, tmp_path: Path) -> None:
    server.lengths = False
    with pytest.raises(Refused, match="longer there than the 5000 bytes"):
        fetch(server, tmp_path / "part", size=5000)


def test_pauses_grow_and_end_after_the_stated_time(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_LONGEST_PAUSE", 30.0)
    server.faults[NAME] = [503, "..."]
    fake = FakeTime()
    with caplog.at_level(logging.WARNING), pytest.raises(Interrupted, match="^HTTP 503 Service Unavailable$"):
        fetch(server, tmp_path / "part", fake.patience(300))
    assert fake.now == pytest.approx(300)
    for pause, longest in zip(fake.slept[:-1], [0.5, 1, 2, 4, 8, 16, *[30] * 99], strict=False):
        assert longest / 2 <= pause <= longest
    assert len(server.requests) == len(fake.slept) + 1
    url = f"{server.url}/{NAME}"
    assert caplog.messages == [f"{url}: HTTP 503 Service Unavailable; trying again for up to 300 s"]


def test_time_counts_from_the_last_progress(server: Server, tmp_path: Path) -> None:
    server.faults[NAME] = ["drop"] * 5  # each time further than the last
    fake = FakeTime()
    assert fetch(server, tmp_path / "part", fake.patience(0.02)) == (server.folder / NAME).read_bytes()
    assert fake.now > 0.02
    server.faults[NAME], server.ranges = ["drop", "..."], False  # never further than the first time
    (tmp_path / "part").unlink()
    with pytest.raises(Interrupted, match="the connection ended 10000 bytes early"):
        fetch(server, tmp_path / "part", FakeTime().patience(0.1))
    assert (tmp_path / "part").stat().st_size == 10_000  # kept for the next time


def test_a_server_that_sends_something_else_each_time_is_given_up(server: Server, tmp_path: Path) -> None:
    server.faults[NAME] = ["corrupt", "short"] * 100
    with pytest.raises(Interrupted):
        fetch(server, tmp_path / "part", FakeTime().patience(0.05))
    assert len(server.requests) < 30


@pytest.mark.usefixtures("short_stalls")
def test_a_silent_server_and_none_at_all_are_given_up(server: Server, tmp_path: Path) -> None:
    server.faults[NAME] = ["stall", "..."]
    with pytest.raises(Interrupted, match="^no answer for 0.3 s$"):
        fetch(server, tmp_path / "part", Patience(0.5))
    with Server(tmp_path) as other:
        pass
    with pytest.raises(SourceDown) as caught:
        fetch_file(f"{other.url}/index.json", Patience(0.02))
    assert str(caught.value) == (
        f"{other.url}/index.json: Connection refused (given up after 0.02 s of trying without progress): "
        "check the server and the network, or raise data.retry_seconds"
    )


def test_a_download_that_is_not_wanted_any_more_stops(server: Server, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fetch(server, tmp_path / "part", Patience(60, stopped=lambda: True))
    assert (tmp_path / "part").stat().st_size > 0


def test_ranges_come_from_servers_with_and_without_them(server: Server) -> None:
    data = (server.folder / NAME).read_bytes()
    for server.ranges in (True, False):
        server.faults[NAME] = [502]
        assert fetch_range(f"{server.url}/{NAME}", 5000, 300, Patience(60)) == data[5000:5300]
        assert fetch_range(f"{server.url}/{NAME}", 0, 10, Patience(60)) == data[:10]


def test_secrets_in_a_url_stay_out_of_messages(server: Server, tmp_path: Path) -> None:
    server.faults[NAME] = [500, "..."]
    with pytest.raises(SourceDown) as caught:
        fetch_file(f"{server.url}/{NAME}?signature=secret", Patience(0.01))
    assert "secret" not in str(caught.value)
    assert f"{server.url}/{NAME}: HTTP 500" in str(caught.value)


def test_a_full_disk_is_an_error_of_its_own(server: Server, tmp_path: Path) -> None:
    def full(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        download(f"{server.url}/{NAME}", tmp_path / "part", "", 20_000, Patience(60), full)


@pytest.mark.parametrize("url", ["nonesuch://host/folder", "http://127.0.0.1:port/folder"])
def test_an_impossible_url_is_refused_at_once(url: str) -> None:
    with pytest.raises((Refused, DataError)):
        fetch_file(url, Patience(60))
