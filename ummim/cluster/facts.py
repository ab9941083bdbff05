"""What a host says of itself before a job: the code, the data, the output folder, the disks and the GPUs it sees."""

import hashlib
import os
import shutil
import socket
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ummim.data import DataConfig, ShardIndex
from ummim.environment import environment
from ummim.errors import DataError, describe

TOKEN = ".preflight-"
SERVER_SECONDS = 20.0  # for a server that holds the shards


@dataclass(frozen=True)
class Question:
    """What a host is asked.

    Attributes:
        data: the recipe's data section.
        output: the run's folder.
        token: the file in it that the launching host wrote.
    """

    data: dict[str, Any]
    output: str
    token: str

    @staticmethod
    def about(data: DataConfig, output: str, token: str) -> "Question":
        return Question(asdict(replace(data, retry_seconds=min(data.retry_seconds, SERVER_SECONDS))), output, token)


@dataclass(frozen=True)
class Facts:
    """One host's answers.

    Attributes:
        hostname: its own name for itself.
        commit: of the checkout the package runs from; None outside git.
        source: digest of the package's files, which sees what a commit does not.
        versions: of Python and of the packages that decide results; None where one is missing.
        index: digest of the shards' index; empty if there is none to be read.
        data_error: why the shards cannot be read; empty if they can.
        sees_token: whether the launching host's file is in the output folder.
        output_error: why the output folder cannot be written; empty if it can.
        free: free bytes of the disk below each folder, by what it is for.
        gpus: names of the GPUs.
        address: by which this host was reached; empty if not by ssh.
    """

    hostname: str
    commit: str | None
    source: str
    versions: dict[str, str | None]
    index: str
    data_error: str
    sees_token: bool
    output_error: str
    free: dict[str, int]
    gpus: list[str]
    address: str


def gather(question: Question) -> Facts:
    """This host's facts."""
    data = DataConfig(**question.data)
    index, data_error = _index(data)
    sees_token, output_error = _visit(Path(question.output), question.token)
    known = environment(1, torch.device("cpu"), index)
    connection = os.environ.get("SSH_CONNECTION", "").split()  # client's address and port, server's address and port
    return Facts(
        hostname=socket.gethostname(),
        commit=known["git_commit"],
        source=_source_digest(),
        versions={"python": known["python"], **known["packages"]},
        index=index,
        data_error=data_error,
        sees_token=sees_token,
        output_error=output_error,
        free=_free(data, question.output),
        gpus=[torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        address=connection[2] if len(connection) == 4 else "",
    )


def _index(data: DataConfig) -> tuple[str, str]:
    try:
        index = ShardIndex.open(data.shards, data.shard_cache())
        index.check()
    except (DataError, OSError) as error:
        return "", describe(error) or str(error)
    return index.digest, ""


def _visit(output: Path, token: str) -> tuple[bool, str]:
    mine = output / f"{TOKEN}{socket.gethostname()}-{os.getpid()}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        mine.write_text("written by ummim preflight\n")
        mine.unlink()
    except OSError as error:
        return False, describe(error) or str(error)
    return (output / token).is_file(), ""


def _source_digest() -> str:
    root = Path(str(resources.files("ummim"))).parent
    patterns = ("train.py", "ds_configs/*.json", "ummim/**/*.py", "ummim/**/*.yaml")
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
        digest.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _free(data: DataConfig, output: str) -> dict[str, int]:
    cache = data.shard_cache()
    folders = {
        "output": Path(output),
        "temporary files": Path(tempfile.gettempdir()),
        "shared memory": Path("/dev/shm"),
    }
    if cache is not None:
        folders["shard cache"] = cache.folder
    return {name: shutil.disk_usage(_existing(folder)).free for name, folder in folders.items()}


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
