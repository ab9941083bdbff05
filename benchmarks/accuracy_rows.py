"""The rows of accuracy_study.py: PR-MIM's Table 2, and choices of design that the paper leaves open or compares."""

from typing import NamedTuple

from ummim.masking import MaskConfig
from ummim.nn.aggregation import PartialConfig

RANDOM, FURTHEST = MaskConfig(throwing="random"), MaskConfig(throwing="furthest")
NONE, CONV = PartialConfig(aggregation="none"), PartialConfig(aggregation="conv")


class Row(NamedTuple):
    """One way to pre-train.

    Attributes:
        name: in results and file names.
        ratio: thrown tokens as a share of all (PR-MIM's r).
        mask: how tokens are masked and thrown; masks must not differ between rows.
        partial: how thrown tokens are filled in.
    """

    name: str
    ratio: float
    mask: MaskConfig
    partial: PartialConfig


TABLE = (
    Row("full", 0.0, RANDOM, NONE),
    Row("r25-plain", 0.25, RANDOM, NONE),
    Row("r25-progressive", 0.25, RANDOM, CONV),
    Row("r25-furthest", 0.25, FURTHEST, NONE),
    Row("r25-both", 0.25, FURTHEST, CONV),
    Row("r50-plain", 0.50, RANDOM, NONE),
    Row("r50-progressive", 0.50, RANDOM, CONV),
    Row("r50-furthest", 0.50, FURTHEST, NONE),
    Row("r50-both", 0.50, FURTHEST, CONV),
    Row("r65-plain", 0.65, RANDOM, NONE),
    Row("r65-progressive", 0.65, RANDOM, CONV),
    Row("r65-furthest", 0.65, FURTHEST, NONE),
    Row("r65-both", 0.65, FURTHEST, CONV),
)
OPTIONS = (Row("r50-both-kernel-3", 0.50, FURTHEST, PartialConfig(aggregation="conv", kernel_size=3)),)
REFERENCES = tuple(row for row in TABLE if row.name in ("full", "r50-both"))  # what the options are compared with
GROUPS = {"table": TABLE, "options": REFERENCES + OPTIONS, "all": TABLE + OPTIONS}
