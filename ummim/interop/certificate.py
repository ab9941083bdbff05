"""The certificate beside an export: where it comes from, what it is to the byte, and how far it was found to agree.

It is JSON, ``OUT.certificate.json`` for a file and ``certificate.json`` in a folder; docs/export.md explains its keys.
"""

import hashlib
import json
import re
from collections.abc import Container, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ummim.data import ShardIndex
from ummim.data.urls import is_url, local_path
from ummim.engine.checkpoint import FOLDER, STATE
from ummim.environment import environment
from ummim.errors import UserError
from ummim.interop.check import ExportFailed, Target, compare_samples, library, loaded_outputs
from ummim.interop.stated import check_statement
from ummim.recipe_file import to_dict
from ummim.run_config import RunConfig

VERSION = 1
IN_FOLDER = "certificate.json"
CARD_IN_FOLDER = "README.md"
LOADED = (".bin", ".safetensors", ".pth", ".pt", ".h5", ".msgpack", ".ckpt")  # suffixes of what loaders look for
ADAPTER = "adapter_config.json"  # names weights that transformers adds


def certificate_path(exported: Path) -> Path:
    """Where the certificate of a file or folder is."""
    return exported / IN_FOLDER if exported.is_dir() else exported.with_name(f"{exported.name}.certificate.json")


def card_path(exported: Path) -> Path:
    """Where the model card of a file or folder is."""
    return exported / CARD_IN_FOLDER if exported.is_dir() else exported.with_name(f"{exported.name}.md")


def make_certificate(
    staged: Path,
    target: Target,
    notes: tuple[str, ...],
    check: dict[str, Any],
    recipe: RunConfig,
    encoder: nn.Module,
    checkpoint: Path,
) -> dict[str, Any]:
    """The certificate of what was staged at a path of its final name.

    Args:
        staged: the file or folder.
        target: what it is.
        notes: what differs from our model, or stays behind.
        check: ``compare``'s result.
        recipe: of the run.
        encoder: of the model.
        checkpoint: the step folder of its weights.
    """
    source = source_of(recipe, checkpoint)
    here = environment(1, torch.device("cpu"), source["data_digest"] or "")
    names = ("safetensors", "transformers")
    return {
        "certificate": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "exported": {**target._asdict(), "name": staged.name, "notes": list(notes), "files": hashes(staged)},
        "encoder": {"class": type(encoder).__name__, **asdict(encoder.config)},  # type: ignore[call-overload]
        "check": {"library": library(target), "images": "ummim.interop.check.fixed_images", **check},
        "source": source,
        "recipe": to_dict(recipe),
        "made_with": {
            **{key: here[key] for key in ("ummim", "git_commit", "python", "platform")},
            "packages": here["packages"] | {name: _version(name) for name in names},
        },
    }


def source_of(recipe: RunConfig, checkpoint: Path) -> dict[str, Any]:
    """The run and its data, as far as the run's files tell; None for what they do not."""
    state = read_json(checkpoint / STATE)
    run = run_folder(checkpoint)
    trained = {} if run is None else read_json(run / "environment.json")
    digest = state.get("index_digest") or trained.get("shard_digest")
    index = local_index(recipe.data.shards)
    match = re.fullmatch(r"step-(\d+)", checkpoint.name)
    return {
        "run": recipe.name,
        "step": state.get("step", int(match[1]) if match else None),
        "epoch": state.get("epoch"),
        "images_seen": state.get("samples"),
        "data_digest": digest,
        "data_images": len(index) if index is not None and index.digest == digest else None,
        "git_commit": trained.get("git_commit"),
        "packages": trained.get("packages"),
    }


def run_folder(checkpoint: Path) -> Path | None:
    """The run that a step folder is part of; None if it was moved out of it."""
    return checkpoint.parent.parent if checkpoint.parent.name == FOLDER else None


def hashes(exported: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """{name: bytes and sha256} of an exported file, or of the files of a folder but certificate and card; ``names``:
    of these only, as far as they are there."""
    files = [exported] if not exported.is_dir() else [exported / name for name in _files(exported)]
    wanted = None if names is None else set(names)
    files = [path for path in files if wanted is None or path.name in wanted]
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}


def uncertified(exported: Path, names: Container[str]) -> tuple[list[str], list[str]]:
    """The other files of a folder: those that a loader may take for the weights, and the rest. Folders in it, such as
    .git, are not looked into; beside a file, nothing is."""
    found = [name for name in _files(exported) if name not in names] if exported.is_dir() else []
    taken = [name for name in found if Path(name).suffix.lower() in LOADED or name == ADAPTER]
    return taken, [name for name in found if name not in taken]


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()
                  if path.is_file() and path.name not in (IN_FOLDER, CARD_IN_FOLDER))  # fmt: skip


def read_certificate(exported: Path) -> dict[str, Any]:
    """The certificate of an export.

    Raises:
        UserError: no export there, no certificate beside it, or one that cannot be read or is damaged.
    """
    if not exported.exists():
        raise UserError(f"{exported}: no such file or folder; give what ummim export wrote")
    path = certificate_path(exported)
    if not path.is_file():
        raise UserError(f"{path}: no certificate there; ummim export writes one beside what it exports")
    found = read_json(path)
    if found.get("certificate") != VERSION:
        raise UserError(f"{path}: is no certificate of this version of ummim (certificate: {VERSION}); export again")
    try:
        check_statement(found)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        fault = "a part of it is of another kind"
        if isinstance(error, KeyError | ValueError):
            fault = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: is damaged or no certificate of ummim export ({fault}); export again") from None
    form = found["exported"]["form"]
    if (form == "huggingface") != exported.is_dir():
        here = "folder" if exported.is_dir() else "file"
        raise UserError(f"{path}: certifies the format {form}, which is no {here}; give what ummim export wrote")
    return found


def verify(exported: Path) -> tuple[bool, list[str]]:
    """Check files and numbers of an export against its certificate: whether both hold, and what was found.

    Raises:
        UserError: nothing to check, a damaged certificate, or a library that is not installed.
    """
    certificate = read_certificate(exported)
    stated = certificate["exported"]
    lines, whole = [], True
    found = hashes(exported, stated["files"])
    for name, expected in stated["files"].items():
        same = found.get(name) == expected
        whole = whole and same
        state = "as certified" if same else "changed" if name in found else "missing"
        lines.append(f"{name}: {state}, sha256 {expected['sha256'][:12]}")
    taken, others = uncertified(exported, stated["files"])
    lines += [f"{name}: NOT certified, and a loader may take it for the weights: remove it" for name in taken]
    lines += [f"{name}: not certified" for name in others]
    if not whole or taken:
        return False, [*lines, "the numbers were not checked"]
    target = Target(*(stated[key] for key in Target._fields))
    try:
        check = compare_samples(loaded_outputs(target, exported), certificate["check"])
    except UserError:
        raise
    except ExportFailed as failure:
        return False, [*lines, str(failure)]
    except Exception as error:  # words that do not fit the weights let a library raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return False, [*lines, f"cannot be loaded as its certificate says: {reason}"]
    lines.append(difference_line(target, check))
    return check["passed"], lines


def difference_line(target: Target, check: dict[str, Any]) -> str:
    """The result of a numerical check in one line."""
    verdict = "equal" if check["passed"] else "NOT equal"
    found = ", ".join(f"{name} {each['max_abs_difference']:.1e}" for name, each in check["outputs"].items())
    return f"loaded by {library(target)}: {verdict} (largest difference: {found}; tolerance {check['tolerance']:.0e})"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_index(shards: str) -> ShardIndex | None:
    """The index of the shards, where they are still at hand."""
    if is_url(shards):
        return None
    try:
        return ShardIndex.open(local_path(shards))
    except (UserError, OSError):
        return None


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds, if it is a JSON object; else nothing."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
