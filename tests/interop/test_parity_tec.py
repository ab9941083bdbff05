"""TEC at full size in float64 against the official code's numbers (docs/fidelity.md), whose targets are formulas."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from tests.interop.fixtures import images, random_mask, weight
from ummim.backbones.teacher import Lesson
from ummim.backbones.vit import ViTConfig
from ummim.masking import MaskPlan
from ummim.methods.tec import TEC, Config, feature_loss
from ummim.nn.decoder import DecoderConfig

PREFIXES = (  # ours and the official ones
    ("encoder.", ""),
    ("adaptor.norm_before.", "encoder_adaptor.adap_before."),
    ("adaptor.fuse.", "encoder_adaptor.fuse_fcs."),
    ("adaptor.refine.", "encoder_adaptor.adap_mlps."),
    ("adaptor.norm_after.", "encoder_adaptor.adap_after."),
    ("decoder.pos_embed", "decoder_pos_embed"),
    ("decoder.blocks.", "decoder_blocks."),
    ("feature_embed.mask_token", "forward_fea_decoder.mask_token"),
    ("feature_embed.proj.", "forward_fea_decoder.decoder_embed."),
    ("feature_head.norm.", "forward_fea_decoder.decoder_norm."),
    ("feature_head.pred.", "forward_fea_decoder.decoder_pred."),
    ("attention_embed.mask_token", "forward_att_decoder.mask_token"),
    ("attention_embed.proj.", "forward_att_decoder.decoder_embed."),
    ("attention_head.norm.", "forward_att_decoder.decoder_norm."),
    ("attention_head.qk.", "forward_att_decoder.decoder_qk."),
)
TOP = [[3, 17, 50, 60, 77, 99, 120, 150, 180], [1, 2, 40, 66, 80, 101, 133, 160, 190]]


class Formula(nn.Module):
    """Targets by formula in place of a teacher's; its attention is (B, queries, heads, keys)."""

    def forward(self, images: Tensor, dtype: torch.dtype) -> Lesson:
        features = torch.sin(0.31 * torch.arange(2 * 196 * 768, dtype=torch.float64)).view(2, 196, 768)
        attention = 2 * torch.sin(0.17 * torch.arange(2 * 10 * 12 * 196, dtype=torch.float64)).view(2, 10, 12, 196)
        return Lesson(features, torch.tensor(TOP), attention.transpose(1, 2))


def official_name(ours: str) -> str:
    prefix, official = next(row for row in PREFIXES if ours.startswith(row[0]))
    return ours.replace(prefix, official, 1)


def formula_weight(official: str, shape: torch.Size) -> Tensor:
    """The fixtures' rule, in which the adaptor's LayerNorms are LayerNorms too, whatever they are called."""
    is_norm = official in ("encoder_adaptor.adap_before.weight", "encoder_adaptor.adap_after.weight")
    return weight(official, shape) + is_norm  # 1 + 0.1 (2u - 1) instead of 0.1 (2u - 1)


def fill(model: TEC) -> Mapping[str, str]:
    """Give the model the fixtures' weights; returns {our key: official key}."""
    names = {ours: official_name(ours) for ours in model.state_dict()}
    assert len(set(names.values())) == len(names)
    model.load_state_dict({ours: formula_weight(names[ours], t.shape) for ours, t in model.state_dict().items()})
    return names


@pytest.mark.slow
def test_tec() -> None:
    model = TEC(224, Config(), Formula()).double()
    names = fill(model)
    plan, pixels = MaskPlan.from_mask(random_mask()), images(224)
    output = model(pixels, plan)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(7.2477781386, abs=6e-11)
    grads = {names[key]: parameter.grad for key, parameter in model.named_parameters()}
    norms = torch.stack([grad.norm() for grad in grads.values() if grad is not None])
    patch = grads["patch_embed.proj.weight"]
    assert patch is not None
    assert len(norms) == len(grads)
    assert patch.norm().item() == pytest.approx(3.68742339e-01, rel=3e-9)
    assert norms.norm().item() == pytest.approx(4.55531900, rel=3e-9)
    with torch.no_grad():
        lesson = model.teacher(pixels, torch.float64)
        fea = feature_loss(output.predicted, lesson.features, output.ids).item()
        att = output.loss.item() - fea
    assert fea == pytest.approx(1.9620607267, abs=6e-11)
    assert att == pytest.approx(5.2857174120, abs=6e-11)


def test_parameter_counts_are_the_official_ones() -> None:
    """All tensors of the state dict, the fixed tables included, without the teacher."""
    large = Config(ViTConfig(16, 1024, 24, 16), DecoderConfig(768, 2, 16))
    with torch.device("meta"):
        counts = [
            sum(tensor.numel() for tensor in TEC(224, config, nn.Identity()).state_dict().values())
            for config in (Config(), large)
        ]
    assert counts == [118_594_304, 405_553_408]
