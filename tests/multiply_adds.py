"""Multiply-adds of a forward pass by hand: Linear, convolution, QK^T and AV; nothing element-wise."""

from dataclasses import replace

from ummim.backbones.group_attention import unit_groups
from ummim.backbones.pvt import PVTConfig
from ummim.backbones.relative_vit import RelativeViTConfig
from ummim.backbones.swin import SwinConfig
from ummim.backbones.table_swin import TableSwinConfig
from ummim.backbones.vit import ViTConfig
from ummim.cost import meta_inputs
from ummim.methods import green_mim, local_mim, mae, mff, simmim, tec, um_mae
from ummim.recipe import Recipe


def block(tokens: float, dim: int, keys: float | None = None) -> float:
    """A Transformer block with an MLP of ratio 4; ``keys`` that each token attends to, by default all."""
    return 12 * tokens * dim**2 + 2 * tokens * (tokens if keys is None else keys) * dim


def decoding(recipe: Recipe, dim: int, depth: int, cls: int, pixels: int) -> float:
    """Decoder blocks on [class,] visible and kept tokens, aggregation, and head on what is in the loss."""
    sampler = recipe.sampler()
    tokens = sampler.grid[0] * sampler.grid[1]
    conv = recipe.throw_ratio > 0 and recipe.partial.aggregation == "conv"
    predicted = sampler.kept_count + (sampler.thrown_count if conv else 0)
    total = depth * block(cls + sampler.visible_count + sampler.kept_count, dim) + predicted * dim * pixels
    return total + (tokens * dim * recipe.partial.kernel_size**2 if conv else 0)


def of_mae(recipe: Recipe) -> float:
    """MAE; UM-MAE on a ViT is the same but for its masks."""
    assert isinstance(recipe.method, (mae.Config, um_mae.Config))
    encoder, decoder, visible = recipe.method.encoder, recipe.method.decoder, recipe.sampler().visible_count
    assert isinstance(encoder, ViTConfig)
    pixels = 3 * encoder.patch_size**2
    return (
        visible * pixels * encoder.embed_dim
        + encoder.depth * block(visible + 1, encoder.embed_dim)
        + (visible + 1) * encoder.embed_dim * decoder.embed_dim
        + decoding(recipe, decoder.embed_dim, decoder.depth, 1, pixels)
    )


def of_um_mae_swin(recipe: Recipe) -> float:
    """The position MLPs run once for a micro-batch."""
    assert isinstance(recipe.method, um_mae.Config)
    encoder, decoder = recipe.method.encoder, recipe.method.decoder
    assert isinstance(encoder, SwinConfig)
    side, dim = recipe.data.image_size // 8, encoder.embed_dim  # of the first stage's compact map
    total = float(side**2 * 48 * dim)
    for s, depth in enumerate(encoder.depths):
        if s:
            side, dim = side // 2, dim * 2
            total += side**2 * 4 * (dim // 2) * dim  # the merge
        window = min(encoder.window_size, side)
        total += depth * block(side**2, dim, window**2)
        reach = (2 * window * 2**s + 8) // min(2**s, 4)  # of coordinate differences, in their steps
        hidden = encoder.pos_mlp_dim * (2 + encoder.num_heads[s])
        total += depth * (2 * reach + 1) ** 2 * hidden / recipe.micro_batch
    total += side**2 * dim * 4 * decoder.embed_dim
    return total + decoding(recipe, decoder.embed_dim, decoder.depth, 0, 768)


def of_um_mae_pvt(recipe: Recipe) -> float:
    assert isinstance(recipe.method, um_mae.Config)
    encoder, decoder = recipe.method.encoder, recipe.method.decoder
    assert isinstance(encoder, PVTConfig)
    side, dims = recipe.data.image_size // 8, encoder.embed_dims
    total = float(side**2 * 48 * dims[0])
    for s, depth in enumerate(encoder.depths):
        if s:
            side //= 2
            total += side**2 * 4 * dims[s - 1] * dims[s]
        tokens, pooled = side**2, (side // encoder.sr_ratios[s]) ** 2
        linear = (2 + 2 * encoder.mlp_ratios[s]) * tokens + 3 * pooled  # q, proj and MLP; sr, k and v
        total += depth * (linear * dims[s] ** 2 + 2 * tokens * pooled * dims[s])
    total += side**2 * dims[3] * 4 * decoder.embed_dim
    return total + decoding(recipe, decoder.embed_dim, decoder.depth, 0, 768)


def of_mff(recipe: Recipe) -> float:
    """MAE, and a projection of each fused layer but the last."""
    assert isinstance(recipe.method, mff.Config)
    width, visible = recipe.method.encoder.embed_dim, recipe.sampler().visible_count
    like = mae.Config(recipe.method.encoder, recipe.method.decoder, recipe.method.norm_pix_loss)
    return of_mae(replace(recipe, method=like)) + (len(recipe.method.taps) - 1) * (visible + 1) * width**2


def of_simmim_vit(recipe: Recipe) -> float:
    """Thrown tokens are not in the encoder; masked ones are, but need no embedding."""
    assert isinstance(recipe.method, simmim.Config)
    encoder, sampler = recipe.method.encoder, recipe.sampler()
    assert isinstance(encoder, RelativeViTConfig)
    tokens, dim, pixels = sampler.grid[0] * sampler.grid[1], encoder.embed_dim, 3 * encoder.patch_size**2
    total = encoder.depth * block(1 + tokens - sampler.thrown_count, dim)
    total += (sampler.visible_count + sampler.kept_count + sampler.thrown_count) * pixels * dim
    return total + (tokens * dim * recipe.partial.kernel_size**2 if recipe.throw_ratio else 0)


def of_simmim_swin(recipe: Recipe) -> float:
    """Swin on the whole map; a unit's 64 first-stage tokens are embedded if it is visible, predicted if masked."""
    assert isinstance(recipe.method, simmim.Config)
    encoder, sampler = recipe.method.encoder, recipe.sampler()
    assert isinstance(encoder, TableSwinConfig)
    side, dim = recipe.data.image_size // 4, encoder.embed_dim
    total = float(sampler.visible_count * 64 * 48 * dim)
    for s, depth in enumerate(encoder.depths):
        if s:
            side, dim = side // 2, dim * 2
            total += side**2 * 2 * dim * dim
        total += depth * block(side**2, dim, min(encoder.window_size, side) ** 2)
    return total + sampler.kept_count * dim * 3 * 32**2


def of_local_mim_vit(recipe: Recipe) -> float:
    """Four decoders; the finer heads cut a masked token into 2x2 cells once or twice, the coarse one has 7x7 cells."""
    assert isinstance(recipe.method, local_mim.Config)
    encoder, decoder, sampler = recipe.method.encoder, recipe.method.decoder, recipe.sampler()
    assert isinstance(encoder, ViTConfig)
    dim, numbers = encoder.embed_dim, 3 * recipe.method.hog_bins
    tokens, visible, masked = 196, sampler.visible_count, sampler.kept_count + sampler.thrown_count
    total = float(visible * 768 * dim + encoder.depth * block(visible + 1, dim))
    for k, width in enumerate(decoder.embed_dims):
        half, quarter = width // 2, width // 4
        head = [
            masked * (4 * width * half + 16 * half * quarter + 16 * quarter * numbers),
            masked * (4 * width * half + 4 * half * numbers),
            masked * width * numbers,
            tokens // 4 * width * numbers,
        ][k]
        total += (visible + 1) * dim * width + decoder.depth * block(1 + visible + sampler.kept_count, width) + head
        total += tokens * width * recipe.partial.kernel_size**2 if recipe.throw_ratio else 0
    return total


def of_green_mim(recipe: Recipe) -> float:
    """Swin on the visible units; attention is within groups of windows, filled up to one size."""
    assert isinstance(recipe.method, green_mim.Config)
    encoder, decoder, sampler = recipe.method.encoder, recipe.method.decoder, recipe.sampler()
    plan = meta_inputs(recipe)[1]
    assert plan.shared is not None
    side, dim, total = 8, encoder.embed_dim, float(sampler.visible_count * 64 * 48 * encoder.embed_dim)
    for s, depth in enumerate(encoder.depths):
        if s:
            side, dim = side // 2, dim * 2
            total += sampler.visible_count * side**2 * 2 * dim * dim
        window = min(encoder.window_size, sampler.grid[0] * side)
        shifts = [0 if i % 2 == 0 or window == sampler.grid[0] * side else window // 2 for i in range(depth)]
        for shift in shifts:
            groups, size, _ = unit_groups(plan.shared, sampler.grid, side, window, shift, False).bias_index.shape
            total += 12 * sampler.visible_count * side**2 * dim**2 + 2 * groups * size**2 * dim
    total += sampler.visible_count * dim * decoder.embed_dim
    return total + decoding(recipe, decoder.embed_dim, decoder.depth, 0, 3072)


def of_tec_student(recipe: Recipe) -> float:
    """MAE with an adaptor of all layers and two passes of the decoder; thrown tokens leave both, and are filled in."""
    assert isinstance(recipe.method, tec.Config)
    encoder, decoder, sampler = recipe.method.encoder, recipe.method.decoder, recipe.sampler()
    dim, width, visible, queries = (
        encoder.embed_dim,
        decoder.embed_dim,
        sampler.visible_count,
        1 + recipe.method.teacher.top_k,
    )
    total = visible * 768 * dim + encoder.depth * block(visible + 1, dim) + 8 * dim**2 / recipe.micro_batch
    total += encoder.depth // 3 * (visible + 1) * (3 * dim * dim + 2 * dim * 4 * width)  # the adaptor
    total += 2 * (visible + 1) * dim * width + decoder.depth * block(197 - sampler.thrown_count, width)
    total += 196 * width * recipe.partial.kernel_size**2 if recipe.throw_ratio else 0
    total += (queries + 196) * width * dim + queries * 196 * dim
    return total + decoding(recipe, width, decoder.depth, 1, dim)
