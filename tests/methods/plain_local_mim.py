"""LocalMIM written plainly: every cell of every scale on whole maps, then boolean masks, one sample at a time.

It borrows a model's weights and its list of sizes, and no code of the package. Below it: a model and a plan to try it
on, and the comparison.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.methods.plain_green_mim import plain_stages
from tests.methods.plain_methods import norm_of, patches_of, vit_blocks
from tests.nn.plain_hog import plain_hog
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.methods.local_mim import Config, LocalMIM
from ummim.nn.aggregation import PartialConfig


def plain_local_mim(model: Any, images: Tensor, masked: Tensor, thrown: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss, and for each scale the predictions of all cells (B, N_k, F); the masks are (B, N) bool.

    Without an aggregation, thrown tokens are in no mean and no loss.
    """
    filled = hasattr(model.decoders[0].aggregation, "layer")
    sums, weights = [torch.zeros(())] * 4, [torch.zeros(())] * 4
    predictions: list[list[Tensor]] = [[], [], [], []]
    for image, hidden, throw in zip(images, masked, thrown, strict=True):
        scales = vit_scales if hasattr(model, "taps") else swin_scales
        for k, (prediction, weight) in enumerate(scales(model, image, hidden, throw, filled)):
            error = (prediction - target_of(model, image, k)).square().mean(1)
            sums[k] = sums[k] + (error * weight).sum()
            weights[k] = weights[k] + weight.sum()
            predictions[k].append(prediction)
    losses = [total / weight for total, weight in zip(sums, weights, strict=True)]
    return torch.stack(losses).sum(), [torch.stack(each) for each in predictions]


def target_of(model: Any, image: Tensor, k: int) -> Tensor:
    """(N_k, F)."""
    cell = model.cells[k]
    if model.config.target == "hog":
        bias = tuple(model.hog.get_buffer(f"bias_{k}").tolist()) if model.config.hog_bias else (0.0, 0.0)
        return torch.from_numpy(plain_hog(image.numpy(), model.config.hog_bins, cell, bias))
    pixels = patches_of(image, cell)
    if not model.norm_pix_loss:
        return pixels
    return (pixels - pixels.mean(1, keepdim=True)) / (pixels.var(1, keepdim=True) + 1e-6).sqrt()


def vit_scales(model: Any, image: Tensor, hidden: Tensor, throw: Tensor, filled: bool) -> list[tuple[Tensor, Tensor]]:
    """For each scale, the prediction of all cells (N_k, F) and how far each counts (N_k,)."""
    encoder, (h, w) = model.encoder, model.grid
    conv = encoder.patch_embed.proj
    tokens = F.conv2d(image[None], conv.weight, conv.bias, stride=model.patch_size)[0].flatten(1).T
    tokens = tokens + encoder.pos_embed[0, 1:]
    x = torch.cat([encoder.cls_token[0] + encoder.pos_embed[0, :1], tokens[~hidden]])
    outputs = []
    for block in encoder.blocks:
        x = vit_blocks(x, [block])
        outputs.append(x)
    scales = []
    counted = (hidden if filled else hidden & ~throw).double().view(h, w)
    present = 1.0 - (torch.zeros_like(counted) if filled else throw.double().view(h, w))
    for k, tap in enumerate(model.taps):
        tokens = decode(model.decoders[k], norm_of(outputs[tap], model.norms[k]), hidden, throw, (h, w), cls=True)
        tokens = tokens.T.reshape(1, -1, h, w)
        if k < 3:
            side = 4 // 2**k
            weight = counted.repeat_interleave(side, 0).repeat_interleave(side, 1)
        else:
            tokens = F.avg_pool2d(tokens * present, 2) / F.avg_pool2d(present[None, None], 2).clamp(min=1e-9)
            weight = F.avg_pool2d(counted[None, None], 2)[0, 0]
        prediction = head(model.decoders[k].head.pred, tokens)[0]  # (F, h', w')
        scales.append((prediction.flatten(1).T, weight.flatten()))
    return scales


def head(layers: Any, x: Tensor) -> Tensor:
    """(1, C, h, w) -> (1, F, h', w'): the convolutions of the paper."""
    for layer in layers if isinstance(layers, nn.Sequential) else [layers]:
        if isinstance(layer, nn.ConvTranspose2d):
            x = F.conv_transpose2d(x, layer.weight, layer.bias, stride=2)
        elif isinstance(layer, nn.LayerNorm):
            x = norm_of(x.permute(0, 2, 3, 1), layer).permute(0, 3, 1, 2)
        elif isinstance(layer, nn.Linear):
            x = F.conv2d(x, layer.weight[:, :, None, None], layer.bias)
        else:
            x = F.gelu(x)
    return x


def swin_scales(model: Any, image: Tensor, hidden: Tensor, throw: Tensor, filled: bool) -> list[tuple[Tensor, Tensor]]:
    """The same on a Swin; the masks are on the grid of 32-pixel units."""
    maps = plain_stages(model.encoder, image, hidden, model.config.row_major_merge)
    scales = []
    for k, x in enumerate(maps):
        h, w, _ = x.shape
        side = h // model.grid[0]
        fine_hidden, fine_throw = (
            each.view(model.grid).repeat_interleave(side, 0).repeat_interleave(side, 1).flatten()
            for each in (hidden, throw)
        )
        x = norm_of(x.flatten(0, 1)[~fine_hidden], model.norms[k])
        tokens = decode(model.decoders[k], x, fine_hidden, fine_throw, (h, w), cls=False)
        prediction = F.linear(tokens, model.decoders[k].head.pred[0].weight, model.decoders[k].head.pred[0].bias)
        scales.append((prediction, (fine_hidden if filled else fine_hidden & ~fine_throw).double()))
    return scales


def decode(module: Any, x: Tensor, hidden: Tensor, throw: Tensor, grid: tuple[int, int], cls: bool) -> Tensor:
    """([1 +] V, D) -> (h * w, d) normed tokens of the whole grid, thrown ones filled in where there is a way to."""
    x = F.linear(x, module.embed.weight, module.embed.bias)
    table = module.decoder.pos_embed[0]
    tokens = module.decoder.mask_token[0].expand(len(hidden), -1).clone()
    tokens[~hidden] = x[int(cls) :]
    tokens = tokens + table[int(cls) :]
    sequence = torch.cat([x[:1] + table[:1], tokens[~throw]]) if cls else tokens[~throw]
    full = torch.zeros_like(tokens)
    full[~throw] = vit_blocks(sequence, module.decoder.blocks)[int(cls) :]
    if throw.any() and hasattr(module.aggregation, "layer"):
        conv = module.aggregation.layer
        side = conv.weight.shape[-1]
        filled = F.conv2d(full.T.reshape(1, -1, *grid), conv.weight, conv.bias, padding=side // 2, groups=full.shape[1])
        full = torch.where(throw[:, None], filled[0].flatten(1).T, full)
    return norm_of(full, module.head.norm)


def job(
    config: Config, image_size: int, mask: MaskConfig, throw: float, aggregation: str = "conv", batch: int = 2
) -> tuple[LocalMIM, Tensor, MaskPlan]:
    """A model of random weights in float64, images, and a plan."""
    torch.manual_seed(0)
    partial = PartialConfig(aggregation, kernel_size=3)  # type: ignore[arg-type]
    model = config.build(image_size, partial, throw > 0).double()
    for parameter in model.parameters():  # no zero biases: they would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    sampler = PlanSampler(model.grid, mask, throw)
    plan = sampler.stack([sampler(0 if mask.shared_by > 1 else seed) for seed in range(batch)])
    return model, torch.randn(batch, 3, image_size, image_size, dtype=torch.float64), plan


def every_scale(model: Any, images: Tensor, plan: MaskPlan) -> list[Any]:
    """The model's predictions at all four scales."""
    scales = zip(model.norms, model.decoders, model.encode(images, plan), strict=True)
    return [decoder(norm(tokens), fine) for norm, decoder, (tokens, fine) in scales]


def check_against_the_plain_one(model: LocalMIM, images: Tensor, plan: MaskPlan) -> None:
    """Loss, every scale's predictions, and the gradients of all parameters."""
    masked = plan.mask()
    loss, predictions = plain_local_mim(model, images, masked, torch.zeros_like(masked).scatter(1, plan.thrown, True))
    output = model(images, plan)
    torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=0)
    for ours, plain in zip(every_scale(model, images, plan), predictions, strict=True):
        assert ours.values.shape[1] == ours.cells.shape[1]
        expected = plain.gather(1, ours.cells[:, :, None].expand(-1, -1, plain.shape[2]))
        counted = torch.ones_like(ours.cells) > 0 if ours.weight is None else ours.weight > 0
        torch.testing.assert_close(ours.values[counted], expected[counted], rtol=1e-8, atol=1e-8)
    shown = predictions[model.shown]
    assert output.prediction.shape == shown.shape
    at = torch.zeros_like(masked).scatter(1, output.ids, True)
    torch.testing.assert_close(output.prediction[at], shown[at], rtol=1e-8, atol=1e-8)
    assert output.prediction[~at].eq(0).all()
    parameters = list(model.parameters())
    fast, slow = (torch.autograd.grad(each, parameters) for each in (output.loss, loss))
    torch.testing.assert_close(fast, slow, rtol=1e-7, atol=1e-9)
