"""Small random checkpoints under the papers' own names, written down from the official key lists.

Nothing here is asked of the package: keys, shapes and order are those of the official codes' state dicts.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.interop.official_cases import Case

Sizes = Mapping[str, Any]


def official_tensors(case: Case, pr: bool = False, hog_bias: bool = True) -> dict[str, Tensor]:
    """A random checkpoint in float32; with ``pr``, PR-MIM's aggregation is part of it."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for key, value in keys_of(case, pr, hog_bias):
        if isinstance(value, Tensor):  # an index, a mask, a Sobel filter
            tensors[key] = value
            continue
        noise = torch.randn(value, generator=generator)
        if len(value) == 1:
            scale = any(part in key for part in ("norm", ".ln", "ln1", "gamma", "pred.1.w")) and not key.endswith(
                "bias"
            )
            tensors[key] = 1 + 0.2 * noise if scale else 0.3 * noise
        else:
            fan = noise[0].numel() if len(value) != 3 else 4
            tensors[key] = noise * fan**-0.5
    return tensors


Keys = Iterator[tuple[str, tuple[int, ...] | Tensor]]


def keys_of(case: Case, pr: bool, hog_bias: bool) -> Keys:
    """Official keys in the official order, with shapes, or with the tensor where it is no weight."""
    family, z = case.family, case.sizes
    if family == "simmim_vit":
        yield from simmim_vit(z)
    elif family == "simmim_swin":
        yield "encoder.mask_token", (1, 1, z["embed_dim"])
        yield from swin("encoder.", z, masks=True)
        yield from affine("encoder.norm", 8 * z["embed_dim"])
        yield from linear("decoder.0", 8 * z["embed_dim"], 3 * 32**2, 1, 1)
    elif family.startswith("um_simmim"):
        yield from um_simmim(family, z)
    elif family.startswith("local_mim"):
        yield from local_mim(family, z, pr, hog_bias)
        return
    elif family == "mff_vit":
        yield from mff(z)
    else:
        yield from mae_like(family, z)
    if pr:
        width = z["embed_dim"] if family == "simmim_vit" else z["decoder_embed_dim"]
        yield from (("pr_dwconv.weight", (width, 1, 5, 5)), ("pr_dwconv.bias", (width,)))


def mae_like(family: str, z: Sizes) -> Keys:
    d, patch = z["decoder_embed_dim"], {"mae_vit": z.get("patch_size"), "um_mae_vit": z.get("patch_size")}.get(family)
    green, flat = family == "green_mim_swin", patch is not None
    patch = patch or (32 if green else 16)
    tokens, ratio = (z["img_size"] // patch) ** 2, z["mlp_ratio"]
    last = z["embed_dim"] if flat else (z["embed_dim"][3] if family == "um_mae_pvt" else 8 * z["embed_dim"])
    first = z["embed_dim"][0] if family == "um_mae_pvt" else z["embed_dim"]
    if z.get("vis_mask_ratio"):
        yield "vis_mask_token", (1, 1, first)
    if flat:
        yield from (("cls_token", (1, 1, first)), ("pos_embed", (1, 1 + tokens, first)))
    if family == "um_mae_pvt":
        yield "pos_embed", (1, (z["img_size"] // 4) ** 2, first)
    yield from (("mask_token", (1, 1, d)), ("decoder_pos_embed", (1, tokens + flat, d)))
    if flat:
        yield from linear("patch_embed.proj", 3, first, patch, patch)
        for i in range(z["depth"]):
            yield from block(f"blocks.{i}", first, ratio)
    elif green:
        yield from swin("encoder.", z, masks=False)
    else:
        yield from um_stages(family, z)
    yield from affine("encoder.norm" if green else "norm", last)
    yield from linear("decoder_embed", last, d if flat or green else 4 * d)
    for i in range(z["decoder_depth"]):
        yield from block(f"decoder_blocks.{i}", d, 4.0 if family == "um_mae_pvt" else ratio)
    yield from affine("decoder_norm", d)
    yield from linear("decoder_pred", d, 3 * patch**2)


def um_simmim(family: str, z: Sizes) -> Keys:
    pvt = family == "um_simmim_pvt"
    first, last = (z["embed_dim"][0], z["embed_dim"][3]) if pvt else (z["embed_dim"], 8 * z["embed_dim"])
    yield "mask_token", (1, 1, first)
    if pvt:
        yield "pos_embed", (1, (z["img_size"] // 4) ** 2, first)
    yield from um_stages(family, z)
    yield from affine("norm", last)
    yield from linear("decoder_pred", last, 4 * 768)


def um_stages(family: str, z: Sizes) -> Keys:
    """UM-MAE's Swin and PVT, the blocks in one list."""
    pvt, at, before = "pvt" in family, 0, 0
    dims = z["embed_dim"] if pvt else [z["embed_dim"] * 2**s for s in range(4)]
    ratios = z["mlp_ratio"] if pvt else [z["mlp_ratio"]] * 4
    yield from linear("patch_embed.proj", 3, dims[0], 4, 4)
    if not pvt:
        yield from affine("patch_embed.norm", dims[0])
    for s, dim in enumerate(dims):
        for i in range(z["depth"][s]):
            name = f"blocks.{at}"
            yield from affine(f"{name}.norm1", dim)
            if pvt:
                yield from (*linear(f"{name}.attn.q", dim, dim), *linear(f"{name}.attn.kv", dim, 2 * dim))
                yield from (*linear(f"{name}.attn.proj", dim, dim), *linear(f"{name}.attn.sr", dim, dim, 1, 1))
                yield from affine(f"{name}.attn.norm", dim)
            else:
                yield from linear(f"{name}.attn.posmlp.0", 2, z["posmlp_dim"], 1, 1)
                yield from linear(f"{name}.attn.posmlp.2", z["posmlp_dim"], z["num_heads"][s], 1, 1)
                yield from (*linear(f"{name}.attn.qkv", dim, 3 * dim), *linear(f"{name}.attn.proj", dim, dim))
            yield from mlp(name, dim, ratios[s])
            if s and i == 0:
                if not pvt:
                    yield from affine(f"{name}.downsample.norm", before)
                yield from linear(f"{name}.downsample.proj", before, dim, 2, 2)
            at += 1
        before = dim


def simmim_vit(z: Sizes) -> Keys:
    d, g, e = z["embed_dim"], z["img_size"] // z["patch_size"], "encoder"
    yield from ((f"{e}.cls_token", (1, 1, d)), (f"{e}.mask_token", (1, 1, d)))
    yield from linear(f"{e}.patch_embed.proj", 3, d, z["patch_size"], z["patch_size"])
    rows = (2 * g - 1) ** 2
    yield f"{e}.rel_pos_bias.relative_position_bias_table", (rows + 3, z["num_heads"])
    index = torch.zeros(1 + g * g, 1 + g * g, dtype=torch.long)
    index[1:, 1:] = window_index(g)
    index[0, :], index[:, 0] = rows, rows + 1
    index[0, 0] = rows + 2
    yield f"{e}.rel_pos_bias.relative_position_index", index
    for i in range(z["depth"]):
        name = f"{e}.blocks.{i}"
        yield from ((f"{name}.gamma_1", (d,)), (f"{name}.gamma_2", (d,)), *affine(f"{name}.norm1", d))
        yield from ((f"{name}.attn.q_bias", (d,)), (f"{name}.attn.v_bias", (d,)))
        yield f"{name}.attn.qkv.weight", (3 * d, d)
        yield from (*linear(f"{name}.attn.proj", d, d), *mlp(name, d, z["mlp_ratio"]))
    yield from (*affine(f"{e}.norm", d), *linear("decoder.0", d, 3 * z["patch_size"] ** 2, 1, 1))


def swin(prefix: str, z: Sizes, masks: bool) -> Keys:
    """Microsoft's Swin without its last norm."""
    yield from linear(f"{prefix}patch_embed.proj", 3, z["embed_dim"], 4, 4)
    yield from affine(f"{prefix}patch_embed.norm", z["embed_dim"])
    for s in range(4):
        dim, side = z["embed_dim"] * 2**s, z["img_size"] // 4 // 2**s
        w = min(z["window_size"], side)
        for i in range(z["depth"][s]):
            name = f"{prefix}layers.{s}.blocks.{i}"
            if masks and i % 2 and w < side:
                yield f"{name}.attn_mask", attention_mask(side, w)
            yield from affine(f"{name}.norm1", dim)
            yield f"{name}.attn.relative_position_bias_table", ((2 * w - 1) ** 2, z["num_heads"][s])
            yield f"{name}.attn.relative_position_index", window_index(w)
            yield from (*linear(f"{name}.attn.qkv", dim, 3 * dim), *linear(f"{name}.attn.proj", dim, dim))
            yield from mlp(name, dim, z["mlp_ratio"])
        if s < 3:
            yield f"{prefix}layers.{s}.downsample.reduction.weight", (2 * dim, 4 * dim)
            yield from affine(f"{prefix}layers.{s}.downsample.norm", 4 * dim)


def local_mim(family: str, z: Sizes, pr: bool, hog_bias: bool) -> Keys:
    vit = family == "local_mim_vit"
    hog = z["target"] == "HOG"
    if vit:
        d, patch = z["embed_dim"], z["patch_size"]
        grids, widths, cells = [z["img_size"] // patch] * 4, [d] * 4, [patch // 4, patch // 2, patch, 2 * patch]
        yield from (("cls_token", (1, 1, d)), ("pos_embed", (1, 1 + grids[0] ** 2, d)))
        yield from linear("patch_embed.proj", 3, d, patch, patch)
        for i in range(z["depth"]):
            yield from block(f"blocks.{i}", d, z["mlp_ratio"])
    else:
        cells = [8, 16, 32, 32]
        grids, widths = [z["img_size"] // cell for cell in cells], [z["embed_dim"] * n for n in (2, 4, 8, 8)]
        yield from swin("encoder.", z, masks=False)
    for k in range(4):
        yield from affine(f"norm.{k}" if vit else f"encoder.norm.{k}", widths[k])
    dims = z["decoder_embed_dim"]
    for k, d in enumerate([dims] * 4 if isinstance(dims, int) else dims):
        name, out = f"decoder.{k}", 3 * (z["hog_nbins"] if hog else cells[k] ** 2)
        yield from ((f"{name}.mask_token", (1, 1, d)), (f"{name}.pos_embed", (1, grids[k] ** 2 + vit, d)))
        yield from linear(f"{name}.embed", widths[k], d)
        for i in range(z["decoder_depth"]):
            yield from block(f"{name}.blocks.{i}", d, z["mlp_ratio"])
        yield from affine(f"{name}.norm", d)
        if not vit:
            yield from linear(f"{name}.pred", d, out)
        elif k == 0:
            yield from (*deconv(f"{name}.pred.0", d), *affine(f"{name}.pred.1", d // 2))
            yield from (*deconv(f"{name}.pred.3", d // 2), *linear(f"{name}.pred.4", d // 4, out, 1, 1))
        elif k == 1:
            yield from (*deconv(f"{name}.pred.0", d), *linear(f"{name}.pred.1", d // 2, out, 1, 1))
        else:
            yield from linear(f"{name}.pred.{k - 2}", d, out, 1, 1)
        if pr:
            yield from ((f"{name}.pr_dwconv.weight", (d, 1, 5, 5)), (f"{name}.pr_dwconv.bias", (d,)))
    across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    for k in range(4 if hog else 0):
        yield f"hog_enc.{k}.conv.weight", torch.stack([across, across.T])[:, None]
        if hog_bias:
            yield f"hog_enc.{k}.conv.bias", (2,)


def mff(z: Sizes) -> Keys:
    d, e, tokens = z["embed_dim"], z["decoder_embed_dim"], (z["img_size"] // z["patch_size"]) ** 2
    yield from (("backbone.cls_token", (1, 1, d)), ("backbone.pos_embed", (1, 1 + tokens, d)))
    yield "backbone.proj_weights", (len(z["taps"]), 1, 1, 1)
    yield from linear("backbone.patch_embed.projection", 3, d, z["patch_size"], z["patch_size"])
    for i in range(z["depth"]):
        name, hidden = f"backbone.layers.{i}", int(d * z["mlp_ratio"])
        yield from (*affine(f"{name}.ln1", d), *linear(f"{name}.attn.qkv", d, 3 * d))
        yield from (*linear(f"{name}.attn.proj", d, d), *affine(f"{name}.ln2", d))
        yield from (*linear(f"{name}.ffn.layers.0.0", d, hidden), *linear(f"{name}.ffn.layers.1", hidden, d))
    yield from affine("backbone.ln1", d)
    for k in range(len(z["taps"]) - 1):
        yield from linear(f"backbone.proj_layers.{k}", d, d)
    yield from (("neck.mask_token", (1, 1, e)), ("neck.decoder_pos_embed", (1, 1 + tokens, e)))
    yield from linear("neck.decoder_embed", d, e)
    for i in range(z["decoder_depth"]):
        name, hidden = f"neck.decoder_blocks.{i}", int(e * z["mlp_ratio"])
        yield from (*affine(f"{name}.ln1", e), *linear(f"{name}.attn.qkv", e, 3 * e))
        yield from (*linear(f"{name}.attn.proj", e, e), *affine(f"{name}.ln2", e))
        yield from (*linear(f"{name}.ffn.layers.0.0", e, hidden), *linear(f"{name}.ffn.layers.1", hidden, e))
    yield from (*affine("neck.ln1", e), *linear("neck.decoder_pred", e, 3 * z["patch_size"] ** 2))


def block(name: str, dim: int, ratio: float) -> Keys:
    yield from (*affine(f"{name}.norm1", dim), *linear(f"{name}.attn.qkv", dim, 3 * dim))
    yield from (*linear(f"{name}.attn.proj", dim, dim), *mlp(name, dim, ratio))


def mlp(name: str, dim: int, ratio: float) -> Keys:
    hidden = int(dim * ratio)
    yield from affine(f"{name}.norm2", dim)
    yield from (*linear(f"{name}.mlp.fc1", dim, hidden), *linear(f"{name}.mlp.fc2", hidden, dim))


def linear(name: str, dim: int, out: int, *kernel: int) -> Keys:
    yield from ((f"{name}.weight", (out, dim, *kernel)), (f"{name}.bias", (out,)))


def deconv(name: str, dim: int) -> Keys:
    yield from ((f"{name}.weight", (dim, dim // 2, 2, 2)), (f"{name}.bias", (dim // 2,)))


def affine(name: str, dim: int) -> Keys:
    yield from ((f"{name}.weight", (dim,)), (f"{name}.bias", (dim,)))


def window_index(side: int) -> Tensor:
    """(side**2, side**2) int64: row of a table for query and key, by their row and column differences."""
    places = [(i, j) for i in range(side) for j in range(side)]
    width = 2 * side - 1
    return torch.tensor([[(r - s + side - 1) * width + c - d + side - 1 for s, d in places] for r, c in places])


def attention_mask(side: int, w: int) -> Tensor:
    """(windows, w * w, w * w): -100 between tokens of a shifted window that are no neighbours in the image."""
    shift = w // 2
    strip = [0 if i < side - w else 1 if i < side - shift else 2 for i in range(side)]
    region = torch.tensor([[3 * strip[i] + strip[j] for j in range(side)] for i in range(side)])
    region = region.view(side // w, w, side // w, w).transpose(1, 2).reshape(-1, w * w)
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0)
