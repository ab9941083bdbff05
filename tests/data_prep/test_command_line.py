import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import build as building
from data_prep.__main__ import main
from tests.conftest import ROOT


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["pack", "a", "b"],
        ["build", "a"],
        ["build", "a", "b", "--shard-count", "0"],
        ["build", "a", "b", "--shard-bytes", "many"],
        ["build", "a", "b", "--quality", "101"],
        ["build", "a", "b", "--max-bad", "2"],
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m data_prep" in capsys.readouterr().err


def test_sizes_are_decimal(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(building, "build", lambda src, dst, options, *_: seen.append(options))
    for text in ("500", "3kB", "256MB", "2G"):
        assert main(["build", str(tree), str(tmp_path / "dst"), "--shard-bytes", text]) == 0
    assert [options.shard_bytes for options in seen] == [500, 3000, 256_000_000, 2_000_000_000]


def test_ctrl_c_is_one_line(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "build", interrupted)
    assert main(["build", str(tree), str(tmp_path / "dst")]) == 130
    assert capsys.readouterr().err == "ummim: interrupted; the same command goes on from here\n"


def test_no_command_loads_torch(tree: Path, tmp_path: Path) -> None:
    """It takes seconds to import, and its threads and memory would be in every worker process, too."""
    shards = tmp_path / "shards"
    commands = [
        ["build", str(tree), str(shards), "--workers", "1"],
        ["index", str(shards), "--workers", "1"],
        ["verify", str(shards), "--workers", "1"],
        ["inspect", str(shards), "--workers", "1"],
    ]
    code = f"""
import sys
from data_prep.__main__ import main
print([main(command) for command in {commands}])
print(sorted({{"torch", "torchvision", "numba", "fsspec", "aiohttp"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-2:] == ["[0, 0, 0, 0]", "[]"], done.stderr
