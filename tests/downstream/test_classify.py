"""Classifiers on pre-trained encoders; the official numbers are in tests/interop/test_classifier.py."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.methods.plain_methods import embed_map, norm_of, swin_stages, vit_blocks
from tests.methods.plain_um_mae_pvt import embed_pvt, pvt_stages
from ummim.backbones.pvt import PVT, PVTConfig
from ummim.backbones.swin import Swin, SwinConfig
from ummim.backbones.vit import ViT, ViTConfig
from ummim.downstream.classify import Classifier, Encoder, build_classifier

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
    assert model.fc_norm.eps == 1e-6
    assert model.fc_norm.weight.eq(1).all()
