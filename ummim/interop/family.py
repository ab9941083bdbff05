"""A family of official checkpoints: how to build its model from tensors, and what its tensors are called."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ummim.interop.errors import OfficialError
from ummim.interop.sizes import Sizes, Tensors
from ummim.methods.api import Method


def _none(model: Any) -> dict[str, Tensor]:
    return {}


def _never(key: str) -> bool:
    return False


def _always(model: Any) -> bool:
    return True


def _all_said(model: Any) -> str:
    return ""


class Family(NamedTuple):
    """One kind of official model.

    Attributes:
        method: the class of our module.
        build: our module from the checkpoint's tensors and the sizes given (each under one spelling;
            ``norm_pix_loss`` always there). Raises OfficialError where they do not fit each other.
        sizes: keywords of ``load_official``.
        names: model -> {official key: our key of its state dict}, in the official order.
        pointwise: official keys that are 1x1 convolutions there and linear layers here.
        constants: official keys of fixed tensors that we compute instead of storing (indices, masks): they must be
            equal on loading, and are written on saving.
        accepts: whether a model of the class ``method`` is of this family.
        unsaid: what the format cannot say of a model of this family, an option's name in front; empty: nothing.
        norm_pix: the published models' ``norm_pix_loss``, where neither call nor checkpoint tell.
    """

    method: type[Method]
    build: Callable[[Tensors, Sizes], Method]
    sizes: tuple[str, ...]
    names: Callable[[Any], dict[str, str]]
    pointwise: Callable[[str], bool] = _never
    constants: Callable[[Any], dict[str, Tensor]] = _none
    accepts: Callable[[Any], bool] = _always
    unsaid: Callable[[Any], str] = _all_said
    norm_pix: bool = True

    def shape(self, official: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The official shape of our tensor."""
        return (*shape, 1, 1) if len(shape) == 2 and self.pointwise(official) else tuple(shape)


def rename(model: Any, prefixes: Sequence[tuple[str, str]]) -> dict[str, str]:
    """{official key: our key}: the first row of (our prefix, official prefix) that fits replaces the prefix. The
    order of the rows is the order of the keys; within a row our order is kept.

    Raises:
        OfficialError: one of our keys fits no row.
    """
    ranked: list[tuple[int, str, str]] = []
    for ours in model.state_dict():
        place = next((i for i, (prefix, _) in enumerate(prefixes) if ours.startswith(prefix)), None)
        if place is None:
            raise OfficialError(
                f"{ours} has no official name, so this {type(model).__name__} cannot be written as such"
            )
        ranked.append((place, ours.replace(*prefixes[place], 1), ours))
    ranked.sort(key=lambda entry: entry[0])  # stable
    return {official: ours for _, official, ours in ranked}


def reorder(names: Mapping[str, str], place: Callable[[str], Any]) -> dict[str, str]:
    """The same names, stably sorted by ``place`` of the official key."""
    return dict(sorted(names.items(), key=lambda item: place(item[0])))
