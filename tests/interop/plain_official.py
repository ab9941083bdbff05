"""Every family computed plainly from the official tensors: whole maps, boolean masks, one sample at a time.

Shares no code with the package and none of its modules: a mistake in a name, a reshape or a size shows up here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.interop.official_tensors import Sizes, window_index
from tests.interop.plain_official_layers import Weights, attend, block, decode, fill, spread, targets
from tests.interop.plain_official_pyramids import sparse_swin, table_swin, um_pyramid
from tests.nn.plain_hog import plain_hog

MFF_NAMES = (  # mmpretrain's and MAE's, one after the other
    ("backbone.", ""),
    ("neck.ln1", "decoder_norm"),
    ("neck.", ""),
    (".ffn.layers.0.0.", ".mlp.fc1."),
    (".ffn.layers.1.", ".mlp.fc2."),
    ("layers.", "blocks."),
    ("proj_blocks.", "proj_layers."),
    (".ln", ".norm"),
    ("ln1", "norm"),
    ("projection", "proj"),
)


def reference(
    family: str,
    tensors: Mapping[str, Tensor],
    z: Sizes,
    images: Tensor,
    masked: Tensor,
    secondary: Tensor,
    thrown: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss, and predictions (B, N, P) of all tokens; the masks are (B, N) bool on the mask grid."""
    w = Weights(tensors)
    if family == "mff_vit":
        renamed = {}
        for key, tensor in tensors.items():
            for old, new in MFF_NAMES:
                key = key.replace(old, new)
            renamed[key] = tensor
        w = Weights(renamed)
    total, count, predictions = torch.zeros((), dtype=images.dtype), torch.zeros((), dtype=images.dtype), []
    if family.startswith("local_mim"):
        return local_mim(family, w, z, images, masked, thrown)
    for image, hidden, second, gone in zip(images, masked, secondary, thrown, strict=True):
        if "simmim" in family:
            prediction, patch = simmim(family, w, z, image, hidden, gone)
            error = (prediction - targets(image, patch, z.get("norm_pix_loss", False))).abs()
        else:
            prediction, patch = masked_autoencoder(family, w, z, image, hidden, second, gone)
            error = (prediction - targets(image, patch, z.get("norm_pix_loss", True))).square()
        total, count = total + error[hidden].sum(), count + error[hidden].numel()
        predictions.append(prediction)
    return total / (count + (3e-5 if family in ("simmim_vit", "simmim_swin") else 0)), torch.stack(predictions)


def masked_autoencoder(
    family: str, w: Weights, z: Sizes, image: Tensor, hidden: Tensor, second: Tensor, gone: Tensor
) -> tuple[Tensor, int]:
    """MAE, MFF, UM-MAE and GreenMIM: predictions (N, P), and the side of a patch."""
    legacy = None
    if family == "green_mim_swin":
        patch, x = 32, sparse_swin(w.at("encoder."), z, image, hidden, z.get("row_major_merge", False), False)[-1]
        x = w.linear("decoder_embed", w.norm("encoder.norm", x).flatten(0, 1))[~hidden]
    elif "vit" in family:
        patch, layers = z["patch_size"], vit(w, z, image, hidden, second)
        x = layers[-1]
        if family == "mff_vit":
            shares = w["proj_weights"].flatten().softmax(0)
            taken = [layers[tap] for tap in z["taps"]]
            taken = [*(w.linear(f"proj_layers.{k}", y) for k, y in enumerate(taken[:-1])), taken[-1]]
            x = sum((share * y for share, y in zip(shares, taken, strict=True)), torch.zeros_like(x))
        x = w.linear("decoder_embed", w.norm("norm", x))
    else:
        patch, side = 16, z["img_size"] // 16
        x = um_pyramid(family, w, z, image, hidden, second)
        x = F.pixel_shuffle(w.linear("decoder_embed", x).permute(2, 0, 1), 2).flatten(1).T  # a token for each 2x2 block
        visible = (~hidden).nonzero()[:, 0]
        of_block = visible // side // 2 * (side // 2) + visible % side // 2
        x, legacy = x[of_block], visible[of_block]
    grid = decode(w, z, x, hidden, gone, legacy)
    return w.linear("decoder_pred", w.norm("decoder_norm", grid)), patch


def vit(w: Weights, z: Sizes, image: Tensor, hidden: Tensor, second: Tensor) -> list[Tensor]:
    """The (1 + V, D) output of every block."""
    x = w.conv("patch_embed.proj", image).flatten(0, 1)
    if w.has("vis_mask_token"):
        x = torch.where(second[:, None], w["vis_mask_token"][0], x)
    table = w["pos_embed"][0]
    x = torch.cat([w["cls_token"][0] + table[:1], (x + table[1:])[~hidden]])
    layers = []
    for i in range(z["depth"]):
        x = block(w.at(f"blocks.{i}."), x, z["num_heads"])
        layers.append(x)
    return layers


def simmim(family: str, w: Weights, z: Sizes, image: Tensor, hidden: Tensor, gone: Tensor) -> tuple[Tensor, int]:
    """Predictions (N, P), and the side of a patch."""
    if family.startswith("um_simmim"):
        x = w.linear("decoder_pred", um_pyramid(family, w, z, image, hidden, None)).permute(2, 0, 1)
        return F.pixel_shuffle(x, 2).flatten(1).T, 16
    e = w.at("encoder.")
    if family == "simmim_vit":
        patch, x = z["patch_size"], relative_vit(w, e, z, image, hidden, gone)
    else:
        patch, x = 32, e.norm("norm", table_swin(e, z, image, hidden), 1e-5).flatten(0, 1)
    side = z["img_size"] // patch
    decoded = w.linear("decoder.0", x).T.view(1, -1, side, side)
    return targets(F.pixel_shuffle(decoded, patch)[0], patch, False), patch


def relative_vit(w: Weights, e: Weights, z: Sizes, image: Tensor, hidden: Tensor, gone: Tensor) -> Tensor:
    """(N, D), normed."""
    x = torch.where(hidden[:, None], e["mask_token"][0], e.conv("patch_embed.proj", image).flatten(0, 1))
    stays = torch.cat([torch.tensor([True]), ~gone])
    x = torch.cat([e["cls_token"][0], x])[stays]
    table, side = e["rel_pos_bias.relative_position_bias_table"], z["img_size"] // z["patch_size"]
    index = torch.full((len(stays), len(stays)), (2 * side - 1) ** 2)  # class token to patch
    index[1:, 1:] = window_index(side)
    index[1:, 0] += 1
    index[0, 0] += 2
    bias = table[index[stays][:, stays]].permute(2, 0, 1)
    for i in range(z["depth"]):
        b = e.at(f"blocks.{i}.")
        q, k, v = F.linear(b.norm("norm1", x), b["attn.qkv.weight"]).chunk(3, dim=1)
        y = attend(q + b["attn.q_bias"], k, v + b["attn.v_bias"], z["num_heads"], bias)
        x = x + b["gamma_1"] * b.linear("attn.proj", y)
        x = x + b["gamma_2"] * b.mlp("mlp", b.norm("norm2", x))
    grid = x.new_zeros(len(hidden), x.shape[1])
    grid[~gone] = x[1:]
    return e.norm("norm", fill(w, "pr_dwconv", grid, gone) if w.has("pr_dwconv.weight") else grid)


def local_mim(
    family: str, w: Weights, z: Sizes, images: Tensor, masked: Tensor, thrown: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss, and the predictions of the scale whose cells are the patches."""
    is_vit = family == "local_mim_vit"
    patch = z["patch_size"] if is_vit else 32
    cells = [patch // 4, patch // 2, patch, 2 * patch] if is_vit else [8, 16, 32, 32]
    errors: list[Tensor] = [torch.zeros((), dtype=images.dtype)] * 4
    weights, shown = list(errors), []
    for image, hidden, gone in zip(images, masked, thrown, strict=True):
        if is_vit:
            layers = vit(w, z, image, hidden, torch.zeros_like(hidden))
            levels = [w.norm(f"norm.{k}", layers[tap]) for k, tap in enumerate(z["taps"])]
        else:
            maps = sparse_swin(w.at("encoder."), z, image, hidden, row_major=True, legacy=True)
            levels = [w.norm(f"encoder.norm.{k}", x).flatten(0, 1) for k, x in enumerate(maps)]
        for k, x in enumerate(levels):
            d = w.at(f"decoder.{k}.")
            side = z["img_size"] // (patch if is_vit else cells[k])
            seen, gone_there = ~spread(hidden, side).flatten(), spread(gone, side).flatten()
            x = d.linear("embed", x if is_vit else x[seen])
            x = d.norm("norm", decode(d, z, x, ~seen, gone_there)).T.view(-1, side, side)
            x = (scale_head(d, k, x) if is_vit else d.linear("pred", x.permute(1, 2, 0)).permute(2, 0, 1)).flatten(1).T
            counts = spread(hidden, z["img_size"] // cells[k]).flatten().to(image.dtype)
            if z["target"] == "HOG":
                name = f"hog_enc.{k}.conv.bias"
                bias = tuple(w[name].tolist()) if w.has(name) else (0.0, 0.0)
                aim = torch.from_numpy(plain_hog(image.numpy(), z["hog_nbins"], cells[k], bias)).to(image.dtype)
            else:
                aim = targets(image, cells[k], z.get("norm_pix_loss", True))
            errors[k] = errors[k] + ((x - aim).square().mean(1) * counts).sum()
            weights[k] = weights[k] + counts.sum()
            if k == (2 if is_vit else 3):
                shown.append(x)
    return sum((e / c for e, c in zip(errors, weights, strict=True)), torch.zeros(())), torch.stack(shown)


def scale_head(w: Weights, k: int, x: Tensor) -> Tensor:
    """(d, h, w) -> (F, h', w'): LocalMIM's heads on a ViT."""
    if k < 2:
        x = F.conv_transpose2d(x[None], w["pred.0.weight"], w["pred.0.bias"], stride=2)[0]
    if k == 0:
        x = F.gelu(w.norm("pred.1", x.permute(1, 2, 0))).permute(2, 0, 1)
        x = F.conv_transpose2d(x[None], w["pred.3.weight"], w["pred.3.bias"], stride=2)[0]
    x = F.avg_pool2d(x, 2) if k == 3 else x
    last = f"pred.{(4, 1, 0, 1)[k]}"
    return F.conv2d(x[None], w[f"{last}.weight"], w[f"{last}.bias"])[0]
