"""LocalMIM in the official format, and full-size models against the official code's numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interop.fixtures import fraction, images, random_mask, weight
from ummim.backbones.table_swin import TableSwinConfig, relative_index
from ummim.backbones.vit import ViTConfig
from ummim.interop import load_official, save_official
from ummim.masking import MaskPlan
from ummim.methods.local_mim import Config, LocalDecoderConfig
from ummim.nn.aggregation import PartialConfig

SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
SWIN_DECODER = LocalDecoderConfig((64, 128, 128, 128), num_heads=4)
SMALL = {
    "local_mim_vit": (
        Config(ViTConfig(8, 24, 8, 3, mlp_ratio=2.0), LocalDecoderConfig((16, 24, 8, 16), 2, 2, 2.0), hog_bias=True),
        32,
        {"num_heads": 3, "decoder_num_heads": 2},
    ),
    "local_mim_swin": (
        Config(
            TableSwinConfig(embed_dim=8, depths=(2, 1, 3, 2), num_heads=(1, 2, 2, 4), window_size=4),
            LocalDecoderConfig((8, 16, 16, 24), num_heads=2),
            hog_bins=18,
            row_major_merge=True,
            legacy_coordinates=True,
        ),
        128,
        {"decoder_num_heads": 2},
    ),
}


def block(name: str, dim: int, table: dict[str, list[int]] | None = None) -> dict[str, list[int]]:
    return {
        **affine(f"{name}.norm1", dim),
        **(table or {}),
        **linear(f"{name}.attn.qkv", dim, 3 * dim),
        **linear(f"{name}.attn.proj", dim, dim),
        **affine(f"{name}.norm2", dim),
        **linear(f"{name}.mlp.fc1", dim, 4 * dim),
        **linear(f"{name}.mlp.fc2", 4 * dim, dim),
    }


def linear(name: str, dim: int, out: int, *kernel: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [out, dim, *kernel], f"{name}.bias": [out]}


def deconv(name: str, dim: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [dim, dim // 2, 2, 2], f"{name}.bias": [dim // 2]}


def affine(name: str, dim: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [dim], f"{name}.bias": [dim]}


def decoder(k: int, encoder_dim: int, dim: int, tokens: int) -> dict[str, list[int]]:
    return {
        f"decoder.{k}.mask_token": [1, 1, dim],
        f"decoder.{k}.pos_embed": [1, tokens, dim],
        **linear(f"decoder.{k}.embed", encoder_dim, dim),
        **block(f"decoder.{k}.blocks.0", dim),
        **affine(f"decoder.{k}.norm", dim),
    }


def hog_keys(bias: bool) -> dict[str, list[int]]:
    leaves = {"weight": [2, 1, 3, 3], "bias": [2]} if bias else {"weight": [2, 1, 3, 3]}
    return {f"hog_enc.{k}.conv.{leaf}": shape for k in range(4) for leaf, shape in leaves.items()}


def vit_keys(dim: int, depth: int, bins: int, bias: bool) -> dict[str, list[int]]:
    """Official names and shapes of LocalMIM on a ViT."""
    keys = {"cls_token": [1, 1, dim], "pos_embed": [1, 197, dim], **linear("patch_embed.proj", 3, dim, 16, 16)}
    for i in range(depth):
        keys |= block(f"blocks.{i}", dim)
    for k in range(4):
        keys |= affine(f"norm.{k}", dim)
    fine = linear("decoder.0.pred.4", 64, 3 * bins, 1, 1)
    preds = (
        {
            **deconv("decoder.0.pred.0", 256),
            **affine("decoder.0.pred.1", 128),
            **deconv("decoder.0.pred.3", 128),
            **fine,
        },
        {**deconv("decoder.1.pred.0", 256), **linear("decoder.1.pred.1", 128, 3 * bins, 1, 1)},
        linear("decoder.2.pred.0", 256, 3 * bins, 1, 1),
        linear("decoder.3.pred.1", 256, 3 * bins, 1, 1),
    )
    for k, pred in enumerate(preds):
        keys |= {**decoder(k, dim, 256, 197), **pred}
    return {**keys, **hog_keys(bias)}


def swin_keys(outs: tuple[int, int, int, int]) -> dict[str, list[int]]:
    """Those of LocalMIM on Swin-B of window 7, without the indices and HOG filters."""
    keys = {**linear("encoder.patch_embed.proj", 3, 128, 4, 4), **affine("encoder.patch_embed.norm", 128)}
    for s, depth in enumerate((2, 2, 18, 2)):
        dim = 128 * 2**s
        for i in range(depth):
            name = f"encoder.layers.{s}.blocks.{i}"
            keys |= block(name, dim, {f"{name}.attn.relative_position_bias_table": [169, 4 * 2**s]})
        if s < 3:
            merge = f"encoder.layers.{s}.downsample"
            keys |= {f"{merge}.reduction.weight": [2 * dim, 4 * dim], **affine(f"{merge}.norm", 4 * dim)}
    dims = (256, 512, 1024, 1024)
    for k, dim in enumerate(dims):
        keys |= affine(f"encoder.norm.{k}", dim)
    for k, (dim, width, tokens, out) in enumerate(
        zip(dims, SWIN_DECODER.embed_dims, (784, 196, 49, 49), outs, strict=True)
    ):
        keys |= {**decoder(k, dim, width, tokens), **linear(f"decoder.{k}.pred", width, out)}
    return keys


def official_tensors(keys: dict[str, list[int]]) -> dict[str, Tensor]:
    """The formula's weights, in float64; the Sobel filters stay."""
    tensors = {}
    for name, shape in keys.items():
        if name.startswith("hog_enc."):
            tensors[name] = torch.stack([SOBEL, SOBEL.T])[:, None].double()
        elif name == "decoder.0.pred.1.weight" and len(shape) == 1:  # the channel LayerNorm, without norm in its name
            phase = (sum(name.encode()) % 1000) / 100
            index = torch.arange(1, shape[0] + 1, dtype=torch.float64)
            tensors[name] = 1 + 0.1 * (2 * fraction(torch.sin(index * 12.9898 + phase) * 43758.5453) - 1)
        else:
            tensors[name] = weight(name, shape)
    return tensors


def gradients(model: Any) -> tuple[float, float]:
    """Norms of the gradients of the patch embedding and of all parameters."""
    grads = {name: parameter.grad.double().norm() for name, parameter in model.named_parameters()}
    return grads["encoder.patch_embed.proj.weight"].item(), torch.stack(list(grads.values())).norm().item()


def test_vit_base_gives_the_official_numbers_in_float32() -> None:
    tensors = {key: tensor.float() for key, tensor in official_tensors(vit_keys(768, 12, 9, False)).items()}
    model = load_official("local_mim_vit", tensors)
    output = model(images(224).float(), MaskPlan.from_mask(random_mask()))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(2.91257644, rel=1e-6)
    # The official norm was taken in float32: in float64 ours is 1.7257125, in float32 1.7257043.
    patch, every = gradients(model)
    assert patch == pytest.approx(1.72570419, rel=1e-5)
    assert every == pytest.approx(18.8047, rel=2e-6)
    assert output.prediction.shape == (2, 196, 27)


def test_swin_base_with_pixels_gives_the_official_numbers() -> None:
    tensors = official_tensors(swin_keys((192, 768, 3072, 3072)))
    indices = {
        key.replace("bias_table", "index"): relative_index(7, torch.device("cpu"))
        for key in tensors
        if key.endswith("relative_position_bias_table")
    }
    model: Any = load_official("local_mim_swin", {**tensors, **indices})
    assert model.config == Config(TableSwinConfig(), SWIN_DECODER, "pixel", hog_bins=1024, row_major_merge=True,
                                  legacy_coordinates=True)  # fmt: skip
    visible = torch.tensor([2, 5, 9, 14, 17, 21, 24, 28, 33, 36, 40, 47])
    masked = torch.ones(2, 49, dtype=torch.bool).scatter(1, visible.expand(2, -1), False)
    output = model(images(224), MaskPlan.from_mask(masked))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(8.1022004443, abs=6e-11)
    patch, every = gradients(model)
    assert patch == pytest.approx(1.38065101e-01, rel=4e-9)
    assert every == pytest.approx(3.11160997, rel=3e-9)
    assert output.prediction.shape == (2, 49, 3072)


@pytest.mark.parametrize(
    ("encoder", "bins", "bias", "count"),
    [
        (ViTConfig(), 9, False, 90_269_236),
        (ViTConfig(16, 1024, 24, 16), 18, True, 308_055_016),
    ],
)
def test_a_vits_names_order_shapes_and_count_are_the_official_ones(
    encoder: ViTConfig, bins: int, bias: bool, count: int
) -> None:
    with torch.device("meta"):
        model = Config(encoder, hog_bins=bins, hog_bias=bias).build(224, PartialConfig(), False)
    saved = save_official(model, "local_mim_vit")
    keys = vit_keys(encoder.embed_dim, encoder.depth, bins, bias)
    assert [(key, list(tensor.shape)) for key, tensor in saved.items()] == list(keys.items())
    assert sum(tensor.numel() for tensor in saved.values()) == count


def test_a_swins_names_order_shapes_and_count_are_the_official_ones() -> None:
    with torch.device("meta"):
        model = Config(TableSwinConfig(), SWIN_DECODER, hog_bins=18, hog_bias=True).build(224, PartialConfig(), False)
    saved = save_official(model, "local_mim_swin")
    parameters = {key: tensor for key, tensor in saved.items() if not key.endswith("relative_position_index")}
    keys = {**swin_keys((54, 54, 54, 54)), **hog_keys(True)}
    assert [(key, list(tensor.shape)) for key, tensor in parameters.items()] == list(keys.items())
    assert sum(tensor.numel() for tensor in parameters.values()) == 87_849_760
    assert len(saved) - len(parameters) == 24


def small(family: str, throwing: bool, **options: Any) -> Any:
    config, image_size, _ = SMALL[family]
    torch.manual_seed(0)
    return replace(config, **options).build(image_size, PartialConfig(kernel_size=5), throwing)


def loss_of(model: Any) -> Tensor:
    side = model.grid[0] * model.patch_size
    image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    masked = torch.ones(2, 16, dtype=torch.bool)
    masked[:, [1, 6, 11, 12]] = False
    return model(image.to(model.norms[0].weight.dtype), MaskPlan.from_mask(masked)).loss


@pytest.mark.parametrize("throwing", [False, True])
@pytest.mark.parametrize("target", ["hog", "pixel"])
@pytest.mark.parametrize("family", SMALL)
def test_saving_inverts_loading_to_the_byte(family: str, target: str, throwing: bool) -> None:
    model = small(family, throwing, target=target)
    first = save_official(model, family)
    loaded = load_official(family, first, **SMALL[family][2])
    again = save_official(loaded, family)
    assert list(again) == list(first)
    for key, tensor in first.items():
        assert again[key].dtype == tensor.dtype
        assert again[key].numpy().tobytes() == tensor.numpy().tobytes(), key
    assert any(key.endswith("pr_dwconv.weight") for key in first) == throwing
    assert any(key.startswith("hog_enc.") for key in first) == (target == "hog")
    assert loss_of(loaded) == loss_of(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_checkpoint_keeps_its_precision(dtype: torch.dtype) -> None:
    tensors = {
        key: tensor.to(dtype) for key, tensor in save_official(small("local_mim_vit", False), "local_mim_vit").items()
    }
    again = save_official(load_official("local_mim_vit", tensors, num_heads=3), "local_mim_vit")
    assert {tensor.dtype for tensor in again.values()} == {dtype}


def test_sizes_given_and_read_agree_and_others_are_refused() -> None:
    tensors = save_official(small("local_mim_vit", False, taps=(0, 2, 4, 7)), "local_mim_vit")
    given = {"num_heads": 3, "decoder_num_heads": 2}
    model: Any = load_official(
        "local_mim_vit", tensors, **given, target="HOG", hog_nbins=9, taps=[0, 2, 4, 7],
        decoder_embed_dim=[16, 24, 8, 16], decoder_depth=2,
    )  # fmt: skip
    assert model.config == small("local_mim_vit", False, taps=(0, 2, 4, 7)).config
    assert load_official("local_mim_vit", tensors, **given).taps == (1, 3, 5, 7)  # the tensors do not tell
    for wrong, complaint in (
        ({"target": "depth"}, "target is HOG or Pixel, not 'depth'"),
        ({"target": "Pixel"}, "left-over keys: hog_enc.0"),
        ({"hog_nbins": 18}, "decoder.0.pred.4.bias .27,. instead of .54,."),
        ({"taps": [0, 2, 4]}, "not four ascending indices"),
        ({"taps": [0, 2, 4, 8]}, "not four ascending indices of the encoder's 8 blocks"),
        ({"decoder_embed_dim": 16}, "mis-shaped keys: decoder.1"),
        ({"window_size": 7}, "no size window_size"),
    ):
        with pytest.raises(ValueError, match=complaint):
            load_official("local_mim_vit", tensors, **{**given, **wrong})


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("local_mim_vit", "hog_enc.2.conv.weight"),
        ("local_mim_swin", "hog_enc.2.conv.weight"),
        ("local_mim_swin", "encoder.layers.2.blocks.1.attn.relative_position_index"),
    ],
)
def test_fixed_tensors_must_be_the_official_ones(family: str, key: str) -> None:
    tensors = save_official(small(family, False), family)
    with pytest.raises(ValueError, match=f"fixed tensors differ: {key}"):
        load_official(family, {**tensors, key: tensors[key] + 1}, **SMALL[family][2])
    with pytest.raises(ValueError, match=f"missing keys: {key}"):
        load_official(family, {name: value for name, value in tensors.items() if name != key}, **SMALL[family][2])


def test_a_model_of_the_other_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="local_mim_swin is another model"):
        save_official(small("local_mim_vit", False), "local_mim_swin")
