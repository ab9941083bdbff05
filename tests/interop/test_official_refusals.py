"""What is wrong with a checkpoint, a size or a model is said in one line that names it and nothing else."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.interop.official_cases import Case
from tests.interop.official_tensors import official_tensors
from tests.interop.test_classifier import SIZES as FINE_TUNED_SIZES
from tests.interop.test_classifier import pretrained
from tests.interop.test_classifier import small as fine_tuned
from tests.interop.test_every_family import FIRST, WITHOUT_PARTIAL, name_of, untold
from ummim.backbones.relative_vit import RelativeViTConfig
from ummim.backbones.vit import ViTConfig
from ummim.errors import UserError
from ummim.interop import load_official, load_official_classifier, save_official
from ummim.interop.official import FAMILIES, family_of
from ummim.methods import amt, local_mim, mae, simmim
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig

SCALES = local_mim.LocalDecoderConfig((16, 16, 16, 16), num_heads=4)
# What stands for others of its kind: blocks and scales after the first, and layers that no size is read off.
REPEATED = re.compile(
    r"(blocks|layers|decoder|hog_enc)\.[1-9]\.(?!blocks\.0|downsample|pred)|\.(attn\.(qkv|proj|kv|q)|norm2|ln2)\."
)


def complaint(family: str, tensors: dict[str, Tensor], **sizes: Any) -> str:
    with pytest.raises(UserError) as error:
        load_official(family, tensors, **sizes)
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", FIRST, ids=name_of)
def test_a_missing_key_is_the_one_complaint(case: Case) -> None:
    tensors = official_tensors(case, pr=case.family not in WITHOUT_PARTIAL)
    for i, key in enumerate(tensors):
        if REPEATED.search(key):
            continue
        sizes = untold(case) if i % 4 and key != "vis_mask_token" else case.sizes
        without = {name: tensor for name, tensor in tensors.items() if name != key}
        assert complaint(case.family, without, **sizes).endswith(f"of these sizes: missing keys: {key}")


@pytest.mark.parametrize("case", FIRST, ids=name_of)
def test_a_mis_shaped_key_is_the_one_complaint(case: Case) -> None:
    """Whatever of it is wrong: sizes are read off several tensors."""
    tensors = official_tensors(case)
    for i, (key, tensor) in enumerate(tensors.items()):
        # Tables alone tell the heads; in a single block of UM-MAE's Swin weight and bias would say different things.
        if REPEATED.search(key) or key.endswith(("relative_position_bias_table", "posmlp.2.weight")):
            continue
        changed = torch.cat([tensor, tensor[..., :1]], dim=-1) if i % 2 else torch.cat([tensor, tensor])
        said = complaint(case.family, {**tensors, key: changed}, **untold(case))
        was, wanted = (tuple(each.shape) for each in (changed, tensor))
        assert said.endswith(f"of these sizes: mis-shaped keys: {key} {was} instead of {wanted}")


@pytest.mark.parametrize("case", FIRST, ids=name_of)
def test_a_stray_key_is_the_one_complaint(case: Case) -> None:
    tensors = official_tensors(case)
    for key in ("head.weight", "module.mask_token", "encoder.pos_embed", next(reversed(tensors)) + "_ema"):
        said = complaint(case.family, {**tensors, key: torch.ones(3)}, **untold(case))
        assert said.endswith(f"of these sizes: left-over keys: {key}")


@pytest.mark.parametrize("case", FIRST, ids=name_of)
def test_unknown_sizes_and_families(case: Case) -> None:
    tensors = official_tensors(case)
    assert complaint(case.family, tensors, drop_path=0.1).startswith(f"{case.family} has no size drop_path; its sizes")
    assert complaint("mae", tensors).startswith("family 'mae' is not supported; supported are: mae_vit, um_mae_vit")
    with pytest.raises(UserError, match="family 'mae' is not supported"):
        save_official(nn.Linear(1, 1), "mae")


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("mae_vit", "decoder_blocks"),
        ("mae_vit", "blocks"),
        ("um_mae_pvt", "decoder_blocks"),
        ("simmim_swin", "encoder.layers.3.blocks"),
        ("green_mim_swin", "encoder.layers.2.blocks"),
        ("local_mim_vit", "decoder.0.blocks"),
        ("mff_vit", "neck.decoder_blocks"),
    ],
)
def test_missing_blocks_are_missed(family: str, blocks: str) -> None:
    """A model without blocks was never published: they are not taken for absent on purpose."""
    case = next(case for case in FIRST if case.family == family)
    tensors = {key: tensor for key, tensor in official_tensors(case).items() if not key.startswith(f"{blocks}.")}
    assert f"missing keys: {blocks}.0." in complaint(family, tensors, **untold(case))


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("mae_vit", {"decoder_num_heads": 6}, "decoder_num_heads: 6 heads do not divide the width 20"),
        ("mae_vit", {"decoder_embed_dim": 22}, "decoder_embed_dim: the position table needs"),
        ("mae_vit", {"img_size": 33}, "img_size: 33 pixels are no multiple"),
        ("local_mim_vit", {"hog_nbins": 0}, "hog_nbins: must be at least 1"),
        ("local_mim_swin", {"decoder_embed_dim": 22}, "decoder_embed_dim: the position table needs"),
        ("green_mim_swin", {"patch_size": 8}, "patch_size is 4 "),
    ],
)
def test_sizes_that_do_not_fit_have_the_callers_names(family: str, sizes: dict[str, Any], message: str) -> None:
    case = next(case for case in FIRST if case.family == family)
    assert complaint(family, official_tensors(case), **{**untold(case), **sizes}).startswith(message)


def test_one_missing_tensor_of_a_set_is_not_a_model_without_the_set() -> None:
    case = next(case for case in FIRST if case.family == "local_mim_vit")
    tensors = official_tensors(case, pr=True)
    for key in ("hog_enc.0.conv.bias", "decoder.0.pr_dwconv.weight"):
        without = {name: tensor for name, tensor in tensors.items() if name != key}
        assert complaint(case.family, without, **untold(case)).endswith(f"missing keys: {key}")


def test_a_kernel_without_a_centre() -> None:
    case = FIRST[0]
    tensors = {**official_tensors(case, pr=True), "pr_dwconv.weight": torch.ones(20, 1, 4, 4)}
    assert "pr_dwconv.weight: a kernel's side must be odd" in complaint(case.family, tensors, **untold(case))


def test_any_fixed_tensor_that_differs_is_named() -> None:
    for case in FIRST:
        tensors = official_tensors(case)
        for key in tensors:
            if not REPEATED.search(key) and key.endswith(("relative_position_index", "attn_mask", "conv.weight")):
                changed = {**tensors, key: tensors[key] + (tensors[key] == 0)}
                said = complaint(case.family, changed, **untold(case))
                assert said.endswith(f"of these sizes: fixed tensors differ: {key}")


@pytest.mark.parametrize("family", FINE_TUNED_SIZES)
def test_a_fine_tuned_checkpoints_missing_or_mis_shaped_key(family: str) -> None:
    tensors, sizes = fine_tuned(family, pretrained(family)), FINE_TUNED_SIZES[family]
    for key, tensor in tensors.items():
        if REPEATED.search(key) or key.endswith("posmlp.2.weight"):
            continue
        without = {name: each for name, each in tensors.items() if name != key}
        for changed, said in ((without, f"missing keys: {key}"), ({**tensors, key: tensor[:, None]}, "mis-shaped")):
            if said == "mis-shaped" and tensor.ndim > 1:
                continue
            with pytest.raises(UserError, match=re.escape(f"fine-tuned {family} of these sizes: {said}")) as error:
                load_official_classifier(family, changed, 7, **sizes)
            assert key in str(error.value)
            assert str(error.value).count("weight") + str(error.value).count("bias") <= 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"relative_position": False}, "relative_position = false"),
        ({"absolute_position": True}, "absolute_position = true"),
        ({"relative_position": False, "absolute_position": True}, "absolute_position = true"),
    ],
)
def test_amts_positions_have_no_place_in_simmims_format(options: dict[str, bool], named: str) -> None:
    encoder = RelativeViTConfig(8, 24, 2, 3, drop_path=0.0, **options)  # type: ignore[arg-type]
    model = amt.Config(encoder).framework.build(32, None, False)  # type: ignore[arg-type]
    assert family_of(model) == "simmim_vit"
    with pytest.raises(UserError, match=f"^simmim_vit cannot hold this SimMIM: method.encoder.{named}: "):
        save_official(model, "simmim_vit")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("aggregation", "pool"),
        ("aggregation", "transformer"),
        ("aggregation", "convnext"),
        ("bias", False),
        ("fill", "residual"),
        ("after_norm", True),
    ],
)
def test_an_aggregation_that_a_checkpoint_cannot_tell_is_not_saved(option: str, value: Any) -> None:
    """It would be lost, or loaded as another."""
    aggregation = PartialConfig(**{option: value, "kernel_size": 5})
    for family, config in (
        ("mae_vit", mae.Config(ViTConfig(8, 24, 1, 3), DecoderConfig(16, 1, 4))),
        ("simmim_vit", simmim.Config(RelativeViTConfig(8, 24, 1, 3))),
        ("local_mim_vit", local_mim.Config(ViTConfig(8, 24, 4, 3), SCALES, taps=(0, 1, 2, 3))),
    ):
        model = config.build(32, aggregation, True)
        with pytest.raises(UserError, match=f"^{family} cannot hold this .*: partial.{option} = {value}: only "):
            save_official(model, family)
        save_official(config.build(32, aggregation, False), family)


def test_a_method_that_adds_weights_to_another_has_no_official_format() -> None:
    class Extended(mae.MAE):
        def __init__(self) -> None:
            super().__init__(32, mae.Config(ViTConfig(8, 24, 1, 3), DecoderConfig(16, 1, 4)))
            self.extra = nn.Linear(2, 2)

    with pytest.raises(UserError, match=r"extra.weight has no official name, so this Extended"):
        save_official(Extended(), "mae_vit")


def test_no_model_is_of_two_families() -> None:
    for case in FIRST:
        model = load_official(case.family, official_tensors(case), **untold(case))
        for other in FAMILIES.keys() - {case.family}:
            with pytest.raises(UserError, match=f"{other} is another model"):
                save_official(model, other)


def test_simmims_files_are_read_and_other_objects_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SimMIM stores its configuration, an object of a package that need not be installed."""
    package, module = ModuleType("yacs"), ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module.CfgNode = node  # type: ignore[attr-defined]
    config = node(MODEL=node(TYPE="vit"))
    config.__dict__["__immutable__"] = True
    case = next(case for case in FIRST if case.family == "simmim_vit")
    tensors = official_tensors(case)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "yacs", package)
        patched.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": tensors, "epoch": 99, "config": config}, tmp_path / "ckpt_epoch_99.pth")
    loaded = save_official(load_official("simmim_vit", tmp_path / "ckpt_epoch_99.pth"), "simmim_vit")
    assert all(loaded[key].equal(tensor) for key, tensor in tensors.items())
    torch.save({"model": tensors, "where": tmp_path}, tmp_path / "unsafe.pth")
    with pytest.raises(
        UserError, match=r"unsafe.pth cannot be read as a checkpoint: it holds a pathlib\S*; only tensors"
    ):
        load_official("simmim_vit", tmp_path / "unsafe.pth")
