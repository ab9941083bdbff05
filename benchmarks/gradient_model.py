"""Model, data and training of gradient_deviation.py."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ummim.backbones.vit import ViTConfig
from ummim.data.augment import Augment
from ummim.data.config import DataConfig
from ummim.data.images import decode
from ummim.data.normalise import normalise
from ummim.engine.optim import parameter_groups
from ummim.masking import MaskConfig, MaskPlan, PlanSampler, sample_seed
from ummim.methods.api import MIMOutput
from ummim.methods.mae import MAE, Config
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig
from ummim.nn.layers import take
from ummim.nn.targets import mean_squared_error, pixel_targets

PHOTOGRAPHS = Path(__file__).resolve().parents[1] / "ummim" / "sample_images"
Throwing = Literal["random", "furthest"]
THROWING: tuple[Throwing, ...] = ("random", "furthest")


@dataclass(frozen=True)
class Study:
    """The sizes; 14x14 tokens with 75% masked, as MAE has them."""

    image_size: int = 112
    patch: int = 8
    width: int = 96
    depth: int = 4
    decoder_width: int = 64
    decoder_depth: int = 4
    kernel_size: int = 7
    ratios: tuple[float, ...] = (0.25, 0.5, 0.65)
    seed: int = 0
    training_batch: int = 16
    lr: float = 1.5e-3
    warmup: int = 50  # steps; the rate stays thereafter
    measured: tuple[int, ...] = (400, 2000, 4000)  # after so many steps
    folds: int = 6
    batches: int = 6  # of a fold
    batch: int = 32
    singles: int = 8  # images of a fold whose gradients are taken one by one


SMOKE = Study(
    width=24,
    depth=1,
    decoder_width=16,
    decoder_depth=1,
    training_batch=2,
    measured=(2, 5),
    folds=2,
    batches=2,
    batch=2,
    singles=1,
)


class Model(nn.Module):
    """MAE at every throwing ratio, 0 among them; all share everything but the aggregation."""

    def __init__(self, study: Study) -> None:
        super().__init__()
        config = Config(
            ViTConfig(patch_size=study.patch, embed_dim=study.width, depth=study.depth, num_heads=4),
            DecoderConfig(study.decoder_width, study.decoder_depth, num_heads=4),
        )
        self.full = MAE(study.image_size, config)
        self.partial = nn.ModuleDict()
        for ratio in study.ratios:
            method = MAE(study.image_size, config, PartialConfig(kernel_size=study.kernel_size), throwing=True)
            method.encoder, method.embed = self.full.encoder, self.full.embed
            method.decoder, method.head = self.full.decoder, self.full.head
            self.partial[f"{ratio:.0%}"] = method

    def at(self, ratio: float) -> MAE:
        """The method at a throwing ratio."""
        return self.partial[f"{ratio:.0%}"] if ratio else self.full  # type: ignore[return-value]

    def shared(self) -> dict[str, list[nn.Parameter]]:
        """The parameters whose gradients are compared, by part."""
        decoder = nn.ModuleList([self.full.embed, self.full.decoder, self.full.head])
        return {"encoder": list(self.full.encoder.parameters()), "decoder": list(decoder.parameters())}

    def loss_at(self, output: MIMOutput, images: Tensor, ids: Tensor) -> Tensor:
        """The loss over the tokens with the given ids (B, n) alone."""
        target = pixel_targets(images, ids, self.full.patch_size, self.full.norm_pix_loss)
        return mean_squared_error(take(output.prediction, ids), target)

    def partial_losses(self, images: Tensor, plan: MaskPlan, ratio: float) -> tuple[Tensor, Tensor]:
        """The plain loss, over kept tokens, and the progressive one, over all masked tokens; one forward pass."""
        output = self.at(ratio)(images, plan)
        return self.loss_at(output, images, plan.kept), output.loss  # the aggregation passes kept tokens unchanged


class Data:
    """Batches of random crops of photographs, and their mask plans; all follow from the step's number."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.photographs = [decode(path.read_bytes()) for path in sorted(PHOTOGRAPHS.glob("*/*.jpg"))]
        self.augment = Augment(DataConfig("", image_size=study.image_size))
        side = study.image_size // study.patch
        self.samplers = {
            (ratio, throwing): PlanSampler((side, side), MaskConfig(throwing=throwing), ratio)
            for ratio in (0.0, *study.ratios)
            for throwing in THROWING
        }

    def images(self, step: int, count: int) -> Tensor:
        """(count, 3, S, S), normalised."""
        rng = random.Random(f"{self.study.seed}/{step}")
        crops = [self.augment(rng.choice(self.photographs), rng.getrandbits(63)) for _ in range(count)]
        return normalise(torch.stack(crops))

    def plan(self, step: int, count: int, ratio: float = 0.0, throwing: Throwing = "random", draw: int = 0) -> MaskPlan:
        """Visible tokens depend on step and ``draw`` alone."""
        sampler = self.samplers[ratio, throwing]
        return sampler.stack([sampler(sample_seed(self.study.seed, step, f"{draw}/{i}")) for i in range(count)])


def train(study: Study, data: Data, folder: Path) -> list[float]:
    """Write ``model-STEP.pt`` for every step of ``study.measured``; all losses. Goes on where it was cut off."""
    torch.manual_seed(study.seed)
    model, count, losses = Model(study), study.training_batch, []
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), betas=(0.9, 0.95))
    latest = folder / "training.pt"
    if latest.exists():
        stored = torch.load(latest, weights_only=True)
        losses = stored["losses"]
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
    for step in range(len(losses), max(study.measured)):
        for group in optimizer.param_groups:
            group["lr"] = study.lr * min(1.0, (step + 1) / study.warmup)
        turn, which = divmod(step, 1 + len(study.ratios))
        ratio, throwing = (0.0, *study.ratios)[which], THROWING[turn % 2]
        images, plan = data.images(step, count), data.plan(step, count, ratio, throwing)
        optimizer.zero_grad()
        loss = model.at(ratio)(images, plan).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        done = step + 1
        if done in study.measured:
            store(model.state_dict(), folder / f"model-{done}.pt")
        if done % 100 == 0 or done in study.measured:
            store({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}, latest)
            print(f"step {done}: mean loss {sum(losses[-100:]) / len(losses[-100:]):.4f}", flush=True)
    return losses


def store(value: Any, path: Path) -> None:
    """Write it whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(value, unfinished)
    unfinished.rename(path)
