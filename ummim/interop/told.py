"""What the tensors of an official file do not tell: from the certificate beside it, or an error instead of a guess."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ummim.backbones.pvt import PVTConfig
from ummim.backbones.swin import SwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.downstream.adapt import Pretrained, image_size_of
from ummim.errors import UserError
from ummim.interop.certificate import certificate_path, hashes, read_json
from ummim.interop.families.fine_tuned import FINE_TUNED_SIZE
from ummim.interop.official import FAMILIES

NARROWEST_VIT = 192  # ViT-Tiny's; published heads are 64 wide from there on (ViT-H: 80)
SWIN_WIDTHS = (96, 128, 192)  # of Swin-T and S, B, L
PVT_WIDTHS = PVTConfig().embed_dims


def certificate_of(path: Path) -> Mapping[str, Any]:
    """The certificate beside an official file, if it is about this very file; else nothing.

    Raises:
        UserError: a certificate of the file with sizes that no export states.
    """
    found = read_json(certificate_path(path))
    exported, recipe = found.get("exported"), found.get("recipe")
    if not isinstance(exported, dict) or exported.get("form") != "official" or not isinstance(recipe, dict):
        return {}
    files, stated = exported.get("files"), exported.get("arguments")
    if not isinstance(files, dict) or not isinstance(stated, dict) or hashes(path)[path.name] not in files.values():
        return {}
    for name, value in stated.items():
        values = value if _is_list(value) else [value]
        if not all(isinstance(one, str) if name == "target" else isinstance(one, int) and one >= 0 for one in values):
            raise UserError(f"{certificate_path(path)}: is damaged: {name} = {value!r}; export again")
    return found


def certified_sizes(
    path: Path, family: str, certificate: Mapping[str, Any], given: Mapping[str, Any], override: bool
) -> dict[str, Any]:
    """The sizes that are given, and those that the certificate states.

    Args:
        path: the file.
        family: of it, a key of ``FAMILIES``.
        certificate: of the file, or nothing.
        given: sizes under the keywords of ``load_official``.
        override: let the certificate's stand where both say something.

    Raises:
        UserError: without ``override``, a given size that is not the certificate's.
    """
    stated = certificate["exported"]["arguments"] if certificate else {}
    stated = {name: value for name, value in stated.items() if name in FAMILIES[family].sizes}
    for name, value in given.items():
        if not override and value is not None and name in stated and _plain(value) != stated[name]:
            raise UserError(
                f"{path}: {name} = {_plain(value)!r}, but {certificate_path(path).name} says {stated[name]!r}: "
                f"leave {name} out"
            )
    return {**given, **stated}


def refuse_guesses(path: Path, encoder: Pretrained, told: Mapping[str, Any]) -> None:
    """Refuse heads and windows that were guessed for a model that is none of the published ones.

    Args:
        path: the file.
        encoder: as it was read.
        told: the sizes that were no guess, besides those that tensors tell.

    Raises:
        UserError: such a guess.
    """
    config = encoder.config
    name, published, of = "num_heads", True, ""
    if isinstance(config, ViTConfig):
        width = config.embed_dim
        published, of = width >= NARROWEST_VIT and width % 64 == 0, f"a ViT of width {width}"
    elif isinstance(config, PVTConfig):
        published, of = tuple(config.embed_dims) == PVT_WIDTHS, f"a PVT of widths {_plain(config.embed_dims)}"
    elif isinstance(config, SwinConfig):
        name, side = "window_size", image_size_of(encoder)
        published = config.embed_dim in SWIN_WIDTHS and side == FINE_TUNED_SIZE
        of = f"a Swin of width {config.embed_dim} for {side} pixels"
    if not published and told.get(name) is None:
        recipes = "classify.encoder in a recipe or " if name == "num_heads" else ""
        raise UserError(
            f"{path}: nothing tells {name}, and {_plain(getattr(config, name))} would be a guess, as {of} is no "
            f"published one: keep ummim export's certificate of this very file beside it, export it as safetensors, or "
            f"state {name}: {recipes}load_encoder in Python takes it"
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value
