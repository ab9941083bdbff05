"""Does mending UM-MAE's decoder order matter? A small paired study on Fashion-MNIST, on one core.

    apt-get install dataset-fashion-mnist
    nice -n 10 python benchmarks/um_mae_decoder_order.py [--output FILE.json] [--plot FILE.png] [--smoke]

The official code gives most visible tokens another patch's position embedding in the decoder
(``legacy_decoder_order``). For each seed, a small Swin is pre-trained in the mended and in the official order, from
the same weights, with the same images and masks, and fine-tuned on a few labels; a third arm is fine-tuned from
scratch. A pixel of Fashion-MNIST becomes one 4x4-pixel token, 4x4 of them a mask patch: 8x8 patches an image.

Every part (an arm's pre-training or tuning, of one seed) writes its results when it ends; a study that was cut off
goes on with the next one.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from decoder_order_report import plot, print_table, summarise
from fashion_mnist import Data
from safetensors.torch import load_file, save_file
from small_study import Classifier, Pretraining, Tuning, batches, curve_of, optimise, provenance, stored, tune
from torch import Tensor

from ummim.atomic import write_text
from ummim.backbones.swin import Swin, SwinConfig
from ummim.masking import MaskConfig, MaskPlan, PlanSampler, sample_seed
from ummim.methods.um_mae import UMMAE, Config
from ummim.nn.decoder import DecoderConfig
from ummim.nn.targets import normalise_patches, patchify

IMAGE_SIZE = 128  # 28 pixels, 2 of background on each side, 4x4 pixels for each
GRID = (8, 8)  # mask patches
ARMS = ("fixed", "legacy", "scratch")
ENCODER = SwinConfig(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=4, pos_mlp_dim=16)
DECODER = DecoderConfig(embed_dim=64, depth=2, num_heads=4)


@dataclass(frozen=True)
class Study:
    seeds: int = 3
    pretraining: Pretraining = field(default_factory=lambda: Pretraining(images=20000, steps=1400, batch=32))
    tuning: Tuning = field(default_factory=Tuning)


SMOKE = Study(1, Pretraining(64, 4, 8, held_out_images=16, curve_every=2), Tuning(32, 1, 8, test_images=32))


def share_in_place(side: int) -> float:
    """Expected share of visible tokens that keep their own position in the official order, on a side x side grid.

    In a row of blocks, raster order lists the visible patches of the upper patch row, then those of the lower one.
    So a token stays in place if no lower one comes before it and it is an upper one, or the mirror image of that.
    Upper and lower are drawn without replacement from a pool with as many of each (UM-MAE).
    """
    pool = 4 * math.ceil(side * side / 8)
    leading, probability = 0.0, 1.0
    for i in range(side // 2):
        probability *= (pool / 2 - i) / (pool - i)  # the first i + 1 blocks all keep an upper patch
        leading += probability
    return 2 * leading / (side // 2)


def draw_plan(seed: int, epoch: int, ids: list[int]) -> MaskPlan:
    sampler = PlanSampler(GRID, MaskConfig("uniform", 0.75, 0.25))
    return sampler.stack([sampler(sample_seed(seed, epoch, str(i))) for i in ids])


def pretrain(data: Data, sizes: Pretraining, seed: int, legacy: bool, weights: Path) -> dict[str, Any]:
    """Nothing random here depends on ``legacy``: the weights, order and masks of both arms are the same.

    The loss with the positions of the *other* order tells how much the trained decoder goes by them.
    """
    torch.manual_seed(seed)
    model = UMMAE(IMAGE_SIZE, Config(encoder=ENCODER, decoder=DECODER, legacy_decoder_order=legacy))
    batch_at = batches(sizes.images, sizes.batch, seed)

    def loss_of(step: int) -> Tensor:
        epoch, ids = batch_at(step)
        return model(data.inputs(data.train_images[ids]), draw_plan(seed, epoch, ids.tolist())).loss

    losses = optimise(model, loss_of, sizes.steps, sizes.lr, (0.9, 0.95))
    save_file(model.encoder.state_dict(), weights)
    result = {
        "curve": curve_of(losses, sizes.curve_every),
        "held_out_loss": held_out_loss(model, data, sizes.held_out_images),
    }
    model.legacy_decoder_order = not legacy
    return {**result, "swapped_loss": held_out_loss(model, data, sizes.held_out_images)}


@torch.no_grad()
def held_out_loss(model: UMMAE, data: Data, count: int) -> float:
    """Mean loss of the first ``count`` test images, under masks that are the same for all runs."""
    total = 0.0
    for ids in torch.arange(count).split(100):
        total += model(data.inputs(data.test_images[ids]), draw_plan(-1, 0, ids.tolist())).loss.item() * len(ids)
    return total / count


def classifier(seed: int, weights: Path | None) -> Classifier:
    """A dense Swin with the weights at ``weights``, or fresh, and a fresh head on the mean of its tokens."""
    torch.manual_seed(seed)
    # A window spans as many pixels of the dense grid as it did of the compact one (UM-MAE doubles it too).
    encoder = Swin(IMAGE_SIZE, replace(ENCODER, window_size=2 * ENCODER.window_size), secondary=False)
    model = Classifier(encoder, lambda tokens: tokens.mean(dim=(1, 2)), encoder.embed_dim)
    if weights is not None:
        encoder.load_state_dict({k: v for k, v in load_file(weights).items() if k != "vis_mask_token"})
    return model


def run(arm: str, seed: int, data: Data, study: Study, folder: Path) -> dict[str, Any]:
    """One arm of one seed: pre-training (but not from scratch), then tuning."""
    settings: dict[str, Any] = {"encoder": asdict(ENCODER)}
    pretrained, weights = dict[str, Any](), None
    if arm != "scratch":
        weights = folder / f"{arm}-{seed}.safetensors"
        settings |= {"decoder": asdict(DECODER), "pretraining": asdict(study.pretraining)}
        pretrained = stored(
            folder / f"{arm}-{seed}-pretraining.json",
            settings,
            lambda: pretrain(data, study.pretraining, seed, arm == "legacy", weights),
        )
    settings |= {"tuning": asdict(study.tuning)}

    def tuning() -> dict[str, float]:
        return tune(classifier(seed, weights), data, study.tuning, seed)

    tuned = stored(folder / f"{arm}-{seed}-tuning.json", settings, tuning)
    return {"arm": arm, "seed": seed, **pretrained, **tuned, "seconds": pretrained.get("seconds", 0) + tuned["seconds"]}


def baselines(data: Data, count: int) -> dict[str, float]:
    """Held-out losses of predicting 0, and of predicting each patch by the mean of its position."""
    patches = normalise_patches(patchify(data.inputs(data.test_images[:count]), 16))[0]
    position = patches.mean(0)
    return {"zero": patches.square().mean().item(), "mean_of_position": (patches - position).square().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description="UM-MAE's decoder order: mended against official, on Fashion-MNIST")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="IDX files")
    parser.add_argument("--runs", type=Path, default=Path("runs/um_mae_decoder_order"), help="results part by part")
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    parser.add_argument("--plot", type=Path, help="draw the figure there (needs matplotlib)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything; the numbers mean nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study, data = SMOKE if args.smoke else Study(), Data(args.data)
    args.runs.mkdir(parents=True, exist_ok=True)
    runs = [run(arm, seed, data, study, args.runs) for seed in range(study.seeds) for arm in ARMS]
    results: dict[str, Any] = {
        **provenance(),
        "study": asdict(study),
        "encoder": asdict(ENCODER),
        "decoder": asdict(DECODER),
        "share_in_place": {"8x8": share_in_place(8), "16x16": share_in_place(16)},
        "baselines": baselines(data, study.pretraining.held_out_images),
        "summary": summarise(runs),
        "runs": runs,
    }
    print_table(results["summary"])
    if args.output:
        write_text(args.output, json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot(runs, study.pretraining.curve_every, results["baselines"]["mean_of_position"], args.plot)


if __name__ == "__main__":
    main()
