"""What a run ran on, written beside its results: ``environment.json``."""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ummim import __version__
from ummim.atomic import write_text

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "webdataset", "fairscale", "numpy", "numba", "pillow")


def environment(world_size: int, device: torch.device, shard_digest: str) -> dict[str, Any]:
    """Versions, git commit, devices and the digest of the shards' index."""
    return {
        "ummim": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "world_size": world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "shard_digest": shard_digest,
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_environment(folder: Path, world_size: int, device: torch.device, shard_digest: str) -> None:
    """Write ``environment.json``; what earlier starts of the same run wrote stays under ``earlier``."""
    path = folder / "environment.json"
    record = environment(world_size, device, shard_digest)
    try:
        before = json.loads(path.read_text())
        record["earlier"] = [*before.pop("earlier", []), before]
    except (OSError, ValueError, AttributeError):
        record["earlier"] = []
    write_text(path, json.dumps(record, indent=2) + "\n")


def git_commit() -> str | None:
    """Commit of the checkout the package runs from, with ``+changes`` if it has any; None outside git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
