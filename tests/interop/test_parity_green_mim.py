"""GreenMIM in the official format, and a full-size one in float64 against the official code's numbers.

The official decoder puts visible features back in the order of the noise (Q-G6). We do not, so the test does.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interop.fixtures import KEYS, images, noise, weights
from tests.methods.plain_green_mim import plain_green_mim
from ummim.backbones.table_swin import TableSwinConfig
from ummim.interop import load_official, save_official
from ummim.interop.families import green_mim as family
from ummim.masking import MaskPlan
from ummim.methods.api import Method
from ummim.methods.green_mim import Config, GreenMIM
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig
from ummim.nn.layers import take
from ummim.nn.targets import mean_squared_error, pixel_targets

NAME = "green_mim_swin"
SMALL = Config(
    TableSwinConfig(embed_dim=8, depths=(2, 1, 3, 2), num_heads=(1, 2, 2, 4), window_size=4, mlp_ratio=2.0),
    DecoderConfig(embed_dim=24, depth=2, num_heads=4, mlp_ratio=2.0),
)


def small(throwing: bool = False) -> GreenMIM:
    torch.manual_seed(0)
    return GreenMIM(128, SMALL, PartialConfig(kernel_size=5), throwing)


def order_of_the_noise() -> Tensor:
    """(2, 49): units by ascending noise, the first 12 visible; the noise is one for the batch."""
    return noise(49)[:1].argsort(1).expand(2, -1)


def official_tensors() -> dict[str, Tensor]:
    keys = {key: shape for key, shape in KEYS[NAME].items() if not key.endswith("relative_position_index")}
    with torch.device("meta"):
        model = GreenMIM(224, Config())
    return {**weights(keys), **family.position_indices(model)}


def loss_in_the_official_order(model: Any, image: Tensor, plan: MaskPlan, shuffled: Tensor) -> Tensor:
    """The visible features, in raster order, take the places of the visible units in the noise's order."""
    visible = model.embed(model.encoder(image, plan))
    tokens, kept = model.decoder(visible, plan, visible_at=shuffled[:, :12])
    assert tokens.shape[1] == 12
    target = pixel_targets(image, plan.kept, 32, norm_pix=True)
    return mean_squared_error(model.head(kept), target)


def test_the_official_numbers_in_the_official_order() -> None:
    shuffled = order_of_the_noise()
    plan = MaskPlan.from_mask(torch.ones(2, 49, dtype=torch.bool).scatter(1, shuffled[:, :12], False))
    assert plan.shared == (1, 4, 9, 12, 17, 22, 25, 30, 33, 38, 43, 46)
    model = load_official(NAME, official_tensors())
    loss = loss_in_the_official_order(model, images(224), plan, shuffled)
    assert loss.item() == pytest.approx(1.9881975528, abs=6e-11)
    loss.backward()
    grads = {name: parameter.grad.norm() for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    assert grads["encoder.patch_embed.proj.weight"].item() == pytest.approx(7.07729289e-02, rel=3e-9)
    assert torch.stack(list(grads.values())).norm().item() == pytest.approx(2.21180091, rel=3e-9)


@pytest.mark.slow
def test_the_mended_order_is_the_plain_implementations() -> None:
    """At full size; the smaller ones are in tests/methods."""
    masked = torch.ones(2, 49, dtype=torch.bool).scatter(1, order_of_the_noise()[:, :12], False)
    model = load_official(NAME, official_tensors())
    with torch.no_grad():
        output = model(images(224), MaskPlan.from_mask(masked))
        loss, prediction = plain_green_mim(model, images(224), masked, torch.zeros_like(masked))
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert output.loss.item() == pytest.approx(1.9886036241, abs=6e-11)  # ours, to notice changes
    torch.testing.assert_close(take(output.prediction, output.ids), take(prediction, output.ids), rtol=1e-9, atol=1e-9)


def test_names_order_and_shapes_are_the_official_ones() -> None:
    with torch.device("meta"):
        model = GreenMIM(224, Config())
    saved = save_official(model, NAME)
    assert {key: list(tensor.shape) for key, tensor in saved.items()} == KEYS[NAME]
    stored = [key for key in KEYS[NAME] if not key.endswith("relative_position_index")]
    assert [key for key in saved if key in stored] == stored


@pytest.mark.parametrize("throwing", [False, True])
def test_saving_inverts_loading_to_the_byte(throwing: bool) -> None:
    first = save_official(small(throwing), NAME)
    model = load_official(NAME, first, decoder_num_heads=4)
    again = save_official(model, NAME)
    assert list(again) == list(first)
    for key, tensor in first.items():
        assert again[key].dtype == tensor.dtype
        assert again[key].numpy().tobytes() == tensor.numpy().tobytes(), key
    assert loss_of(model) == loss_of(small(throwing))


def loss_of(model: Method) -> Tensor:
    masked = torch.ones(2, 16, dtype=torch.bool)
    masked[:, [1, 6, 11, 12]] = False
    image = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    return model(image, MaskPlan.from_mask(masked)).loss


def test_sizes_are_read_off_the_tensors_or_given() -> None:
    tensors = save_official(small(), NAME)
    read: Any = load_official(NAME, tensors, decoder_num_heads=4)
    assert read.encoder.config == SMALL.encoder
    given: Any = load_official(
        NAME, tensors, img_size=128, patch_size=4, embed_dims=[8, 16, 32, 64], depths=[2, 1, 3, 2], mlp_ratio=2.0,
        num_heads=[1, 2, 2, 4], window_size=4, decoder_embed_dim=24, decoder_depth=2, decoder_num_heads=4,
        norm_pix_loss=False,
    )  # fmt: skip
    assert given.encoder.config == SMALL.encoder
    assert not given.norm_pix_loss
    with pytest.raises(ValueError, match="must double at every stage"):
        load_official(NAME, tensors, embed_dims=[8, 16, 32, 48], decoder_num_heads=4)
    with pytest.raises(ValueError, match="left-over keys"):
        load_official(NAME, tensors, depths=[2, 1, 2, 2], decoder_num_heads=4)


def test_the_first_releases_merge_is_asked_for() -> None:
    tensors = save_official(small(), NAME)
    first: Any = load_official(NAME, tensors, decoder_num_heads=4, row_major_merge=True)
    assert all(layer.downsample.row_major for layer in list(first.encoder.layers)[1:])
    assert loss_of(first) != loss_of(small())


def test_index_tables_are_swins_and_must_not_differ() -> None:
    tensors = save_official(small(), NAME)
    index = tensors["encoder.layers.0.blocks.0.attn.relative_position_index"]
    assert index.shape == (16, 16)
    assert [index[0, 0], index[0, 15], index[15, 0], index[0, 1]] == [24, 0, 48, 23]  # of 49 rows; query first
    changed = {**tensors, "encoder.layers.0.blocks.0.attn.relative_position_index": index + 1}
    with pytest.raises(ValueError, match=r"fixed tensors differ: encoder.layers.0.blocks.0.attn"):
        load_official(NAME, changed, decoder_num_heads=4)
