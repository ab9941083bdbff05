"""Classifiers on pre-trained encoders; the official numbers are in tests/interop/test_classifier.py."""

from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from tests.methods.plain_methods import embed_map, norm_of, swin_stages, vit_blocks
from tests.methods.plain_um_mae_pvt import embed_pvt, pvt_stages
from tests.methods.tiny import METHODS
from ummim.backbones.pvt import PVT, PVTConfig
from ummim.backbones.relative_vit import RelativeViT
from ummim.backbones.swin import Swin, SwinConfig
from ummim.backbones.table_swin import TableSwin, TableSwinConfig
from ummim.backbones.vit import ViT, ViTConfig
from ummim.downstream.adapt import Encoder, image_size_of, new_encoder
from ummim.downstream.classify import Classifier, build_classifier
from ummim.downstream.drop_path import DroppedLinear
from ummim.errors import UserError
from ummim.nn.aggregation import PartialConfig
from ummim.nn.layers import eps_of

SIDE = {"vit": 32, "swin": 64, "pvt": 64}


def encoder_of(kind: str, hiding: Any = "compact") -> Encoder:
    torch.manual_seed(0)
    encoder: Encoder
    if kind == "vit":
        encoder = ViT(32, ViTConfig(8, 24, 2, 3), secondary=True)
    elif kind == "swin":
        encoder = Swin(64, SwinConfig(8, (2, 2, 1, 1), (1, 2, 2, 4), window_size=2, pos_mlp_dim=6), hiding)
    else:
        encoder = PVT(64, PVTConfig((8, 12, 16, 24), (1, 2, 1, 1), (1, 2, 4, 3), sr_ratios=(4, 2, 1, 1)), hiding)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder.double()


def plain_logits(model: Any, image: Tensor) -> Tensor:
    encoder = model.encoder
    if isinstance(encoder, ViT):
        conv = encoder.patch_embed.proj
        x = F.conv2d(image[None], conv.weight, conv.bias, stride=8)[0].flatten(1).T
        x = torch.cat([encoder.cls_token[0], x]) + encoder.pos_embed[0]
        tokens = vit_blocks(x, encoder.blocks)[1:]
    elif isinstance(encoder, PVT):
        tokens = pvt_stages(encoder, embed_pvt(encoder, image)).flatten(0, 1)
    else:
        tokens = swin_stages(encoder, *embed_map(encoder, image)).flatten(0, 1)
    mean = torch.stack(list(tokens)).sum(0) / len(tokens)
    return F.linear(norm_of(mean, model.fc_norm), model.head.weight, model.head.bias)


@pytest.mark.parametrize("kind", SIDE)
def test_logits_and_gradients_equal_the_plain_implementation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_classifier(encoder_of(kind), 5).double()
    for module in (model.fc_norm, model.head):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    # The plain encoders end in a norm, which a classifier's has not.
    for home in ("tests.methods.plain_methods", "tests.methods.plain_um_mae_pvt"):
        monkeypatch.setattr(f"{home}.norm_of", lambda x, norm, eps=1e-6: _norm_or_not(x, norm, eps))
    images = torch.randn(2, 3, SIDE[kind], SIDE[kind], dtype=torch.float64)
    logits, expected = model(images), torch.stack([plain_logits(model, image) for image in images])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    fast, plain = (torch.autograd.grad(x.square().sum(), list(model.parameters())) for x in (logits, expected))
    torch.testing.assert_close(fast, plain, rtol=1e-7, atol=1e-8)


def _norm_or_not(x: Tensor, norm: Any, eps: float) -> Tensor:
    return x if isinstance(norm, nn.Identity) else F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps)


@pytest.mark.parametrize("kind", SIDE)
def test_the_pre_trained_weights_are_copied_all_but_norm_and_mask_tokens(kind: str) -> None:
    pretrained = encoder_of(kind)
    model = build_classifier(pretrained, 5)
    left = set(pretrained.state_dict()) - set(model.encoder.state_dict())
    assert left == {"norm.weight", "norm.bias", "vis_mask_token"}
    before = {key: tensor.clone() for key, tensor in pretrained.state_dict().items()}
    for key, tensor in model.encoder.state_dict().items():
        assert tensor.equal(before[key]), key
        tensor.add_(1)
    assert all(tensor.equal(before[key]) for key, tensor in pretrained.state_dict().items())


@pytest.mark.parametrize("kind", SIDE)
def test_the_position_table_is_trained_unless_told_otherwise(kind: str) -> None:
    for train in (True, False):
        encoder = build_classifier(encoder_of(kind), 5, train_positions=train).encoder
        trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
        assert ("pos_embed" in trained) == (train and kind != "swin")
        assert ("pos_embed" in encoder.state_dict()) == (kind != "swin")


def test_the_table_of_a_pre_trained_encoder_stays_fixed() -> None:
    pretrained = encoder_of("vit")
    build_classifier(pretrained, 5)
    assert "pos_embed" in dict(pretrained.named_buffers())


@pytest.mark.parametrize("hiding", ["compact", "replace"])
def test_windows_and_pooling_of_whole_images(hiding: str) -> None:
    """Pre-trained on the compact grid, both widen with the map; pre-trained on the whole one, they stay."""
    widen = 2 if hiding == "compact" else 1
    swin, pvt = (build_classifier(encoder_of(kind, hiding), 5).encoder for kind in ("swin", "pvt"))
    assert isinstance(swin, Swin)
    assert swin.config.window_size == 2 * widen
    assert isinstance(pvt, PVT)
    assert pvt.config.sr_ratios == ((8, 4, 2, 1) if widen == 2 else (4, 2, 1, 1))


def test_the_head_starts_as_in_the_official_code() -> None:
    torch.manual_seed(0)
    model = Classifier(ViT(32, ViTConfig(8, 384, 1, 6), final_norm=False), 1000)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert model.head.bias.eq(0).all()
    assert isinstance(model.fc_norm, nn.LayerNorm)
    assert model.fc_norm.eps == 1e-6
    assert model.fc_norm.weight.eq(1).all()
    swin = Classifier(new_encoder(TableSwinConfig(48, (1, 1, 1, 1), (1, 1, 2, 2), 2), 64), 1000)
    assert swin.head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def classifier_of(name: str, **options: Any) -> Classifier:
    """Five classes on a tiny method's encoder, all weights random."""
    torch.manual_seed(0)
    tiny = METHODS[name]
    method = tiny.config.for_inference().build(tiny.image_size, PartialConfig(), False)
    model = build_classifier(method.backbone(), 5, **options)  # type: ignore[arg-type]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def pictures(model: Classifier) -> Tensor:
    side = image_size_of(model.encoder)
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_every_kind_is_trained(name: str) -> None:
    model = classifier_of(name, drop_path=0.2).train()
    logits = model(pictures(model))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    assert model.adapted is not None
    norm = {"norm.weight", "norm.bias"}
    kept = isinstance(model.encoder, TableSwin) or name == "local_mim"  # LocalMIM's ViT has none
    assert norm & set(model.adapted.left) == (set() if kept else norm)


@pytest.mark.parametrize("name", ["mae", "simmim", "simmim_swin", "green_mim", "um_mae"])
def test_what_the_head_sees(name: str) -> None:
    """Microsoft's Swin: norm, then mean. All others: mean, then norm."""
    model, plain = classifier_of(name), classifier_of(name)
    images = pictures(model)
    x = model.tokens(images)
    if isinstance(model.encoder, TableSwin):
        assert isinstance(model.fc_norm, nn.Identity)
        norm, plain.encoder.norm = plain.encoder.norm, nn.Identity()
        features = norm(plain.tokens(images)).mean(1)
        assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {
            1e-6 if name == "green_mim" else 1e-5  # the pre-training's
        }
    else:
        assert isinstance(model.fc_norm, nn.LayerNorm)
        patches = x[:, 1:] if isinstance(model.encoder, ViT | RelativeViT) else x
        features = F.layer_norm(patches.mean(1), patches.shape[2:], model.fc_norm.weight, model.fc_norm.bias, 1e-6)
    torch.testing.assert_close(model(images), model.head(features), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.features(images), features, rtol=1e-5, atol=1e-5)


def test_a_norm_behind_the_mean_of_microsofts_swin() -> None:
    """LocalMIM's fine-tuning."""
    model = classifier_of("local_mim_swin", norm_last=True)
    images = pictures(model)
    assert isinstance(model.fc_norm, nn.LayerNorm)
    assert model.fc_norm.eps == eps_of(model.encoder)
    tokens = model.encoder(images).flatten(1, 2)
    torch.testing.assert_close(model(images), model.head(model.fc_norm(tokens.mean(1))))
    assert not any("norm.weight" in key for key in dict(model.encoder.named_parameters()) if key.startswith("norm"))
    with pytest.raises(UserError, match="norm_last: is for Microsoft's Swin"):
        classifier_of("mae", norm_last=True)


@pytest.mark.parametrize(("name", "norm"), [("mae", True), ("simmim", True), ("local_mim", False)])
def test_the_class_token_goes_through_the_pre_trained_norm(name: str, norm: bool) -> None:
    model = classifier_of(name, pool="class")
    images = pictures(model)
    assert isinstance(model.encoder.norm, nn.LayerNorm)
    assert isinstance(model.fc_norm, nn.Identity)
    torch.testing.assert_close(model(images), model.head(model.encoder(images)[:, 0]))
    assert model.adapted is not None
    assert "norm.weight" not in model.adapted.left
    assert model.adapted.fresh == (() if norm else ("norm.weight", "norm.bias"))


@pytest.mark.parametrize("name", ["um_mae", "um_mae_pvt", "green_mim"])
def test_a_pyramid_has_no_class_token(name: str) -> None:
    with pytest.raises(UserError, match="pool: a (Swin|PVT|TableSwin) has no class token"):
        classifier_of(name, pool="class")


def ids_of(model: Classifier) -> dict[str, set[int]]:
    """{part of the model: ids of its parameters}."""
    found: dict[str, set[int]] = {}
    for name, i in model.layer_ids().items():
        part = name.removeprefix("encoder.")
        words = part.split(".")
        at = 1 + max(
            [k for k, word in enumerate(words) if word.isdigit() or word in ("merge", "downsample")], default=0
        )
        found.setdefault(".".join(words[: at if words[0] in ("blocks", "stages", "layers") else 1]), set()).add(i)
    return found


def test_layers_of_a_vit_are_numbered_as_in_mae() -> None:
    assert ids_of(classifier_of("mff")) == {
        **{name: {0} for name in ("cls_token", "pos_embed", "patch_embed")},
        **{f"blocks.{k}": {k + 1} for k in range(3)},
        **{name: {4} for name in ("fc_norm", "head")},
    }
    assert ids_of(classifier_of("mae", pool="class"))["norm"] == {2}
    relative = classifier_of("simmim").layer_ids()
    assert relative["encoder.blocks.1.rel_pos_bias.relative_position_bias_table"] == 2


@pytest.mark.parametrize(("kind", "merges"), [("swin", {1: 2, 2: 3, 3: 6}), ("um_swin", {1: 3, 2: 4, 3: 7})])
def test_merges_count_with_the_block_before_or_behind_them(kind: str, merges: dict[int, int]) -> None:
    """SimMIM's: a stage's downsample has the id of its last block. UM-MAE's: of the block that owns it."""
    depths, heads = (2, 1, 3, 1), (1, 1, 2, 2)
    config = TableSwinConfig(8, depths, heads, 2) if kind == "swin" else SwinConfig(8, depths, heads, 2, pos_mlp_dim=4)
    ids = ids_of(build_classifier(new_encoder(config, 64), 5))
    stage, name = ("layers", "downsample") if kind == "swin" else ("stages", "merge")
    blocks = [(s, b) for s in range(4) for b in range(depths[s])]
    for k, (s, b) in enumerate(blocks):
        assert ids[f"{stage}.{s}.blocks.{b}"] == {k + 1}
    assert {s: ids[f"{stage}.{s}.{name}"] for s in (1, 2, 3)} == {s: {i} for s, i in merges.items()}
    assert ids["patch_embed"] == {0}
    assert ids["head"] == ids["norm" if kind == "swin" else "fc_norm"] == {8}


def test_vectors_tokens_and_tables_are_not_decayed() -> None:
    for name, expected in (
        ("mae", {"cls_token", "pos_embed"}),
        ("simmim", {"cls_token", "relative_position_bias_table"}),
        ("simmim_swin", {"relative_position_bias_table"}),
        ("um_mae_pvt", {"pos_embed"}),
    ):
        model = classifier_of(name)
        shapes = {key: value.ndim for key, value in model.named_parameters()}
        spared = model.no_weight_decay()
        assert {key.rpartition(".")[2] for key in spared if shapes[key] > 1} == expected
        assert spared >= {key for key, ndim in shapes.items() if ndim == 1}


@pytest.mark.parametrize("name", METHODS)
def test_branches_are_dropped_ever_more_often_with_depth(name: str) -> None:
    model = classifier_of(name, drop_path=0.3)
    blocks: list[Any] = model.blocks()
    for i, block in enumerate(blocks):
        chance = 0.3 * i / max(1, len(blocks) - 1)
        found = [module.drop_prob for module in block.modules() if isinstance(module, DropPath) and module.drop_prob]
        assert found == pytest.approx([chance, chance] if chance else [])
    images = pictures(model)
    assert model(images).equal(model(images))  # not in eval mode
    plain = classifier_of(name)
    plain.load_state_dict(model.state_dict())  # the keys are the same with and without
    torch.testing.assert_close(plain(images), model(images))


@pytest.mark.parametrize("name", ["mae", "simmim", "simmim_swin", "um_mae", "um_mae_pvt"])
def test_a_dropped_block_hands_its_input_on(name: str) -> None:
    model = classifier_of(name, drop_path=0.5).train()
    block: Any = model.blocks()[-1]
    for module in block.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 1 - 1e-9  # both branches of every sample
            module.scale_by_keep = False
    seen: list[Any] = []
    block.register_forward_hook(lambda _m, inputs, output: seen.append((inputs[0], output)))
    model(pictures(model))
    assert isinstance(block.attn.proj, DroppedLinear) == name.startswith("um_mae")
    if len(model.blocks()) > 1:
        assert seen[0][1].equal(seen[0][0])
