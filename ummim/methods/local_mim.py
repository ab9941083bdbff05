"""LocalMIM: reconstruct at four scales, each from the depth of the encoder that sees it, and so teach lower layers
directly. The target is a histogram of oriented gradients (HOG) for each cell of a scale, or its pixels.

Source: "Masked Image Modeling with Local Multi-Scale Reconstruction" (Wang et al., CVPR 2023), section 3.

    image ── visible patches ──> ViT ──┬── block 2 ──> norm, decoder ──> cells of  4 pixels
                                       ├── block 4 ──> norm, decoder ──> cells of  8 pixels
                                       ├── ...     ──> norm, decoder ──> cells of 16 pixels
                                       └── last    ──> norm, decoder ──> cells of 32 pixels

and likewise a Swin's four stages, at 8, 16, 32 and 32 pixels. Each decoder has PR-MIM's aggregation of its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ummim.backbones.sparse_swin import SparseSwin
from ummim.backbones.table_swin import UNIT, TableSwinConfig
from ummim.backbones.vit import ViT, ViTConfig
from ummim.masking import MaskPlan
from ummim.methods.api import Method, MethodConfig, MIMOutput, check_swin, check_width
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig
from ummim.nn.hog import HOG
from ummim.nn.layers import LayerNorm, finer_cells, init_mae, take
from ummim.nn.local_decoder import CoarseHead, FineHead, LocalDecoder, LocalPrediction
from ummim.nn.targets import pixel_targets

Four = tuple[int, int, int, int]


@dataclass(frozen=True)
class LocalDecoderConfig:
    """The four decoders' size.

    Attributes:
        embed_dims: width at each scale; the official Swin's are 64, 128, 128, 128.
        depth: number of blocks.
        num_heads: attention heads; the official Swin's decoders have 4.
        mlp_ratio: hidden width of the MLP, in widths.
    """

    embed_dims: Four = (256, 256, 256, 256)
    depth: int = 1
    num_heads: int = 8
    mlp_ratio: float = 4.0

    def scale(self, k: int) -> DecoderConfig:
        """Of one decoder."""
        return DecoderConfig(self.embed_dims[k], self.depth, self.num_heads, self.mlp_ratio)


@dataclass(frozen=True)
class Config(MethodConfig):
    """LocalMIM on a ViT or a Swin.

    Attributes:
        encoder: the encoder; the Swin sees visible 32-pixel units only, and needs ``mask.shared_by``.
        decoder: the decoders.
        target: histograms of oriented gradients, or pixels.
        hog_bins: orientations that pi is divided into.
        hog_bias: add a random constant to each scale's gradients (ViT-L's and Swin's official recipes do).
        norm_pix_loss: normalise target pixels by their cell's mean and deviation.
        taps: ViT: indices of the four blocks whose output is decoded; None: the second, the fourth, the third
            last and the last.
        row_major_merge: Swin: merge 2x2 tokens in the order of the official pre-training, which is not that of
            the official fine-tuning (nor of any other Swin). For official checkpoints; off by default.
        legacy_coordinates: Swin: place the tokens of stages 2 and 3 as the official code does: nine of ten at
            another token's place. For official checkpoints; off by default.
    """

    encoder: ViTConfig | TableSwinConfig = field(default_factory=ViTConfig)
    decoder: LocalDecoderConfig = field(default_factory=LocalDecoderConfig)
    target: Literal["hog", "pixel"] = "hog"
    hog_bins: int = 9
    hog_bias: bool = False
    norm_pix_loss: bool = True
    taps: Four | None = None
    row_major_merge: bool = False
    legacy_coordinates: bool = False

    @property
    def shared_mask(self) -> bool:
        return isinstance(self.encoder, TableSwinConfig)

    @property
    def static_shapes(self) -> bool:
        return isinstance(self.encoder, ViTConfig)

    def mask_grid(self, image_size: int) -> tuple[int, int]:
        patch = self.encoder.patch_size if isinstance(self.encoder, ViTConfig) else UNIT
        return image_size // patch, image_size // patch

    def check_sizes(self, image_size: int) -> Iterable[tuple[str, str]]:
        if isinstance(self.encoder, ViTConfig):
            yield from self._check_vit(image_size, self.encoder)
        else:
            yield from self._check_swin(image_size, self.encoder)
        for width in self.decoder.embed_dims:
            for key, problem in check_width("method.decoder", width, self.decoder.num_heads):
                yield key.replace("embed_dim", "embed_dims"), problem
        if self.hog_bins < 1:
            yield "method.hog_bins", "must be at least 1"

    def _check_vit(self, image_size: int, encoder: ViTConfig) -> Iterable[tuple[str, str]]:
        patch = encoder.patch_size
        if patch < 4 or patch % 4:
            yield "method.encoder.patch_size", f"a patch is divided into 4x4 cells: use a multiple of 4, not {patch}"
        elif image_size < 2 * patch or image_size % (2 * patch):
            yield (
                "data.image_size",
                f"{image_size} pixels are no multiple of {2 * patch}, the largest cell of patches of {patch}",
            )
        yield from check_width("method.encoder", encoder.embed_dim, encoder.num_heads)
        taps = self.decoded_blocks(encoder.depth)
        if len(taps) != 4 or list(taps) != sorted(set(taps) & set(range(encoder.depth))):
            yield (
                "method.taps",
                f"{list(taps)}{'' if self.taps else ', the default,'} are not four ascending indices of the encoder's "
                f"{encoder.depth} blocks: give others, from 0 to {encoder.depth - 1}",
            )
        for key in ("row_major_merge", "legacy_coordinates"):
            if getattr(self, key):
                yield f"method.{key}", "is an option of the Swin encoder; leave it out"

    def _check_swin(self, image_size: int, encoder: TableSwinConfig) -> Iterable[tuple[str, str]]:
        yield from check_swin(encoder, image_size)
        if self.taps is not None:
            yield "method.taps", "is an option of the ViT encoder: a Swin is decoded after each stage; leave it out"

    def decoded_blocks(self, depth: int) -> Four:
        """Indices of the ViT's blocks whose output is decoded."""
        return self.taps or (1, 3, depth - 3, depth - 1)

    def cell_size(self, cell: int) -> int:
        """Numbers that are predicted for a cell of that side, in pixels."""
        return 3 * (self.hog_bins if self.target == "hog" else cell**2)

    def build(self, image_size: int, partial: PartialConfig, throwing: bool) -> "LocalMIM":
        kind = LocalMIMViT if isinstance(self.encoder, ViTConfig) else LocalMIMSwin
        return kind(image_size, self, partial, throwing)


class LocalMIM(Method):
    """(B, 3, H, W) float images, normalised, and their mask plan -> the sum of four losses, and predictions.

    ``predicted`` is the scale whose cells are the mask grid's patches: pixels, or HOG if that is the target.
    """

    norms: nn.ModuleList
    decoders: nn.ModuleList

    def __init__(self, config: Config, cells: Four, shown: int) -> None:
        super().__init__()
        self.config, self.cells, self.shown = config, cells, shown
        self.patch_size = cells[shown]
        self.norm_pix_loss = config.norm_pix_loss
        self.predicts_pixels = config.target == "pixel"
        self.hog = HOG(cells, config.hog_bins, config.hog_bias) if config.target == "hog" else None

    def decoder_blocks(self) -> list[nn.Module]:
        """Of all four decoders."""
        return [block for each in self.decoders for block in each.decoder.blocks]  # type: ignore[union-attr]

    def encode(self, images: Tensor, plan: MaskPlan) -> list[tuple[Tensor, MaskPlan]]:
        """For each scale, the encoder's tokens (B, [1 +] V_k, D_k), and the plan on their grid."""
        raise NotImplementedError

    def targets(self, images: Tensor, predictions: list[LocalPrediction]) -> list[Tensor]:
        """For each scale, what its values should be: (B, m, F), float32 or better."""
        if self.hog is not None:
            maps = self.hog(images)
            return [take(each, p.cells) for each, p in zip(maps, predictions, strict=True)]
        pairs = zip(self.cells, predictions, strict=True)
        return [pixel_targets(images, p.cells, cell, self.norm_pix_loss) for cell, p in pairs]

    def forward(self, images: Tensor, plan: MaskPlan) -> MIMOutput:
        self.check_inputs(images, plan)
        scales = zip(self.norms, self.decoders, self.encode(images, plan), strict=True)
        predictions = [decoder(norm(tokens), fine) for norm, decoder, (tokens, fine) in scales]
        losses = map(local_loss, predictions, self.targets(images, predictions))
        shown = predictions[self.shown]
        return MIMOutput(torch.stack(list(losses)).sum(), shown.values, shown.cells, self.grid[0] * self.grid[1])


class LocalMIMViT(LocalMIM):
    """Four depths of a ViT, all on one grid: the finer cells are made by the heads."""

    encoder: ViT

    def __init__(
        self, image_size: int, config: Config, partial: PartialConfig | None = None, throwing: bool = False
    ) -> None:
        assert isinstance(config.encoder, ViTConfig)
        patch = config.encoder.patch_size
        super().__init__(config, (patch // 4, patch // 2, patch, 2 * patch), shown=2)
        self.taps = config.decoded_blocks(config.encoder.depth)
        self.encoder = ViT(image_size, config.encoder, final_norm=False)
        self.grid = self.encoder.grid
        dim = config.encoder.embed_dim
        self.norms = nn.ModuleList(LayerNorm(dim) for _ in self.cells)
        self.decoders = nn.ModuleList()
        for k, (width, cell) in enumerate(zip(config.decoder.embed_dims, self.cells, strict=True)):
            out = config.cell_size(cell)
            head = FineHead(self.grid, width, out, 2 - k) if k < 3 else CoarseHead(self.grid, width, out)
            decoder = config.decoder.scale(k)
            self.decoders.append(
                LocalDecoder(self.grid, dim, decoder, head, True, partial or PartialConfig(), throwing)
            )

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder.blocks, *self.decoder_blocks()]

    def encode(self, images: Tensor, plan: MaskPlan) -> list[tuple[Tensor, MaskPlan]]:
        return [(tokens, plan) for tokens in self.encoder.features(images, plan, self.taps)]


class LocalMIMSwin(LocalMIM):
    """The four stages of a Swin, each on a grid of its own; the plan is drawn on 32-pixel units, one for a batch."""

    encoder: SparseSwin

    def __init__(
        self, image_size: int, config: Config, partial: PartialConfig | None = None, throwing: bool = False
    ) -> None:
        assert isinstance(config.encoder, TableSwinConfig)
        super().__init__(config, (UNIT // 4, UNIT // 2, UNIT, UNIT), shown=3)
        self.encoder = SparseSwin(
            image_size, config.encoder, config.row_major_merge, config.legacy_coordinates, final_norm=False
        )
        self.grid = self.encoder.grid
        dims = [config.encoder.embed_dim * 2**s for s in (1, 2, 3, 3)]  # a stage is tapped after the merge behind it
        self.norms = nn.ModuleList(LayerNorm(dim) for dim in dims)
        self.decoders = nn.ModuleList()
        for k, (width, cell) in enumerate(zip(config.decoder.embed_dims, self.cells, strict=True)):
            grid = (image_size // cell, image_size // cell)
            head = FineHead(grid, width, config.cell_size(cell), 0).apply(init_mae)
            decoder = config.decoder.scale(k)
            self.decoders.append(
                LocalDecoder(grid, dims[k], decoder, head, False, partial or PartialConfig(), throwing)
            )

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder.blocks(), *self.decoder_blocks()]

    def encode(self, images: Tensor, plan: MaskPlan) -> list[tuple[Tensor, MaskPlan]]:
        stages = zip(self.encoder.features(images, plan), self.cells, strict=True)
        return [(tokens.x, finer_plan(plan, tokens.ids, UNIT // cell)) for tokens, cell in stages]


def finer_plan(plan: MaskPlan, visible: Tensor, side: int) -> MaskPlan:
    """The plan on the ``side`` times finer grid; ``visible`` (B, V * side**2) are the visible tokens there."""
    h, w = plan.grid
    return replace(
        plan,
        grid=(h * side, w * side),
        visible=visible,
        secondary=torch.zeros_like(visible, dtype=torch.bool),
        kept=finer_cells(plan.kept, w, side),
        thrown=finer_cells(plan.thrown, w, side),
        compact=False,
        shared=None,
    )


def local_loss(prediction: LocalPrediction, target: Tensor) -> Tensor:
    """Scalar: squared error averaged over a cell's numbers, then over the cells, each weighted as far as masked."""
    error = (prediction.values.to(target.dtype) - target).square().mean(2)  # (B, m)
    if prediction.weight is None:
        return error.mean()
    weight = prediction.weight.to(error.dtype)
    return (error * weight).sum() / weight.sum()
