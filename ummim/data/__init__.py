"""Data: tar shards and their index, the order of samples, and the way from bytes to masked batches."""

from ummim.data.augment import Augment, Box
from ummim.data.batch import Batch
from ummim.data.config import DataConfig
from ummim.data.images import decode
from ummim.data.loader import Loader, build_loader
from ummim.data.samples import fixed_batch
from ummim.data.shards import ShardIndex

__all__ = ["Augment", "Batch", "Box", "DataConfig", "Loader", "ShardIndex", "build_loader", "decode", "fixed_batch"]
