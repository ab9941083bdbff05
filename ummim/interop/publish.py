"""An export in a folder that may hold more: a clone of a hub's repository, say, with its .git, a licence and notes.

Of what is there, only the earlier export is replaced.
"""

import os
import shutil
from pathlib import Path

from ummim.atomic import TEMPORARY, sync_folder
from ummim.errors import UserError
from ummim.interop.certificate import IN_FOLDER, read_json, uncertified
from ummim.interop.huggingface import CONFIG, PREPROCESSOR, WEIGHTS

OWN = {CONFIG, PREPROCESSOR, WEIGHTS}
HALFWAY = "halfway"  # beside a staged export while its files get their names


def check_folder(out: Path) -> None:
    """Refuse a folder that an export cannot go into without losing what is not its own.

    Raises:
        UserError: it holds other files and no earlier export, or weights that a loader may take for the export's.
    """
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    stated = read_json(out / IN_FOLDER).get("exported")
    earlier = stated.get("files") if isinstance(stated, dict) else None
    if not isinstance(earlier, dict) or not earlier or OWN & names - earlier.keys():
        raise UserError(f"{out}: holds other files, no earlier export; name another folder")
    if taken := uncertified(out, OWN)[0]:
        raise UserError(
            f"{out}: holds {taken[0]}, which a loader may take for the weights; move it, or name another folder"
        )


def publish_folder(staged: Path, out: Path) -> None:
    """Give a staged folder its name, or its files theirs in a folder that holds an earlier export and maybe more.

    The certificate comes last, so that a mixture of old and new files is never certified. The staged folder stays whole
    until the end: after a kill in between, ``mend`` goes on.

    Args:
        staged: the whole export, alone in a folder beside ``out``.
        out: no link.

    Raises:
        OSError: a file cannot be written.
    """
    if not out.is_dir() or not any(out.iterdir()):
        staged.rename(out)  # onto an empty folder, too
        return
    halfway = staged.parent / HALFWAY
    names = sorted((path.name for path in staged.iterdir()), key=lambda name: (name == IN_FOLDER, name))
    try:
        for name in names:
            _place(staged / name, out / (name + TEMPORARY))
        halfway.touch()
        for name in names:
            (out / (name + TEMPORARY)).replace(out / name)
        sync_folder(out)
        halfway.unlink()
    finally:
        for name in names:
            (out / (name + TEMPORARY)).unlink(missing_ok=True)


def is_halfway(staging: Path) -> bool:
    """Whether files of the staged export, and not all, have their names: it must stay."""
    return (staging / HALFWAY).exists()


def mend(staging: Path, out: Path) -> None:
    """Finish the publishing of an earlier export that was killed, so that ``out`` is a whole one."""
    if is_halfway(staging):
        (staged,) = (path for path in staging.iterdir() if path.is_dir())
        publish_folder(staged, out)


def _place(source: Path, target: Path) -> None:
    """The same file under another name, or where the file system has no such links a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
