"""Data: tar shards and their index, the order of samples, and the way from bytes to masked batches.

What is named here is imported when it is first asked for: torch takes seconds to import, and who only builds or checks
shards (``data_prep``) needs none of the modules that use it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ummim.data.augment import Augment, Box
    from ummim.data.batch import Batch
    from ummim.data.config import DataConfig
    from ummim.data.images import decode
    from ummim.data.loader import Loader, build_loader
    from ummim.data.samples import fixed_batch
    from ummim.data.shards import ShardIndex

__all__ = ["Augment", "Batch", "Box", "DataConfig", "Loader", "ShardIndex", "build_loader", "decode", "fixed_batch"]

_MODULES = {
    "Augment": "augment",
    "Batch": "batch",
    "Box": "augment",
    "DataConfig": "config",
    "Loader": "loader",
    "ShardIndex": "shards",
    "build_loader": "loader",
    "decode": "images",
    "fixed_batch": "samples",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
