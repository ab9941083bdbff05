"""The rows of accuracy_study.py: PR-MIM's Table 2, and choices of design that the paper leaves open or compares."""

from dataclasses import replace
from typing import Literal, NamedTuple

from ummim.masking import MaskConfig
from ummim.nn.aggregation import PartialConfig

RANDOM, FURTHEST = MaskConfig(throwing="random"), MaskConfig(throwing="furthest")
NONE, CONV = PartialConfig(aggregation="none"), PartialConfig(aggregation="conv")
UNITS = MaskConfig(ratio=0.6, unit=2)  # SimMIM's mask, in squares of 2x2 tokens


class Row(NamedTuple):
    """One way to pre-train.

    Attributes:
        name: in results and file names.
        ratio: thrown tokens as a share of all (PR-MIM's r).
        mask: how tokens are masked and thrown; masks must not differ between rows of a method.
        partial: how thrown tokens are filled in.
        method: what is pre-trained.
        reference: the row that this one is compared with, seed by seed.
        attention_pass: TEC's ``method.attention_pass``.
        pretrained: False for a control, whose encoder is tuned with fresh weights.
    """

    name: str
    ratio: float
    mask: MaskConfig
    partial: PartialConfig
    method: Literal["mae", "simmim", "tec"] = "mae"
    reference: str = "full"
    attention_pass: Literal["thrown", "whole"] = "thrown"
    pretrained: bool = True


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


def option(name: str, partial: PartialConfig, mask: MaskConfig = FURTHEST) -> Row:
    """A variant of PR-MIM at r = 50%, compared with PR-MIM's defaults."""
    return Row(f"r50-both-{name}", 0.50, mask, partial, reference="r50-both")


OPTIONS = (
    option("kernel-3", PartialConfig(kernel_size=3)),
    option("pool", PartialConfig(aggregation="pool")),
    option("transformer", PartialConfig(aggregation="transformer")),
    option("convnext", PartialConfig(aggregation="convnext")),
    option("fill-all", PartialConfig(fill="all")),
    option("fill-residual", PartialConfig(fill="residual")),
    option("after-norm", PartialConfig(after_norm=True)),
    option("ties-lowest", CONV, MaskConfig(throwing="furthest", ties="lowest")),
    option("no-bias", PartialConfig(bias=False)),
)
SIMMIM = (
    Row("simmim-full", 0.0, UNITS, NONE, "simmim", "simmim-full"),
    Row("simmim-tokens", 0.50, UNITS, CONV, "simmim", "simmim-full"),
    Row("simmim-units", 0.50, replace(UNITS, throw_unit=2), CONV, "simmim", "simmim-tokens"),
)
TEC = (
    Row("tec-full", 0.0, RANDOM, NONE, "tec", "tec-full"),
    Row("tec-thrown", 0.50, FURTHEST, CONV, "tec", "tec-full"),
    Row("tec-whole", 0.50, FURTHEST, CONV, "tec", "tec-thrown", attention_pass="whole"),
)
REFERENCES = tuple(row for row in TABLE if row.name in ("full", "r50-both"))  # what the options are compared with


def with_control(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """``rows`` and, after the first, the method's own encoder from scratch.

    SimMIM's has no absolute positions and layer scale, TEC's here a block less than MAE's.
    """
    first, *others = rows
    name = "scratch" if first.method == "mae" else f"scratch-{first.method}"
    return (first, Row(name, 0.0, RANDOM, NONE, first.method, first.name, pretrained=False), *others)


GROUPS = {
    "table": with_control(TABLE),
    "options": with_control(REFERENCES + OPTIONS),
    "simmim": with_control(SIMMIM),
    "tec": with_control(TEC),
    "all": with_control(TABLE) + OPTIONS + with_control(SIMMIM) + with_control(TEC),
}
