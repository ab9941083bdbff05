"""How far the gradient of partial reconstruction lies from that of full reconstruction (PR-MIM, Figure 4, in small).

    nice -n 8 python benchmarks/gradient_deviation.py [--output FILE.json] [--plot FILE.png] [--smoke]

Four ways of throwing r = 25, 50 and 65% of all tokens out of MAE's decoder: *plain* (at random, thrown tokens are in
no loss), *furthest* (plain, thrown by furthest sampling), *progressive* (at random, thrown tokens filled in by the
depth-wise convolution and in the loss), *PR-MIM* (progressive, thrown by furthest sampling). On many batches of random
crops of the bundled photographs, each one's gradient is compared with full reconstruction's: the same weights, images
and visible tokens.

What is fair. All gradients are taken at one set of weights of encoder, decoder and head; the aggregations, one for each
ratio, are what progressive arms have besides, and are in no measure. To be compared at all, everything must have been
trained as long and for every purpose: a decoder that only ever saw whole sequences would make short ones look bad, an
untrained convolution would make progressive reconstruction look bad. So training steps have four losses by turns, full
reconstruction's and the progressive one's of each ratio, with tokens thrown at random and by furthest sampling in turn;
a progressive loss holds the plain one. The rate stays high to the end and training stops early: where a loss is at its
minimum its mean gradient vanishes, and a relative deviation of means says nothing any more. It is measured at several
stages of training, for the result depends on that.

What is measured, over the encoder's and over the decoder's and head's parameters:

    deviation   ||g - g_full|| / ||g_full||, for gradients of single images, of a batch, and of a fold of batches
    bias        deviation of expected gradients, what averaging never removes: from the dot products of different folds'
                averages, in which independent noise cancels (unbiased; 0 if that comes out negative)
    cosine      of g and g_full, likewise
    length      ||g|| / ||g_full|| of a batch

``other masks``, full reconstruction of the same images with other tokens masked, is the noise that a training on full
reconstruction has anyway. ``kept`` and ``thrown`` split PR-MIM's gradient by tokens. Folds are stored when they end,
training every hundred steps; a study that was cut off goes on from there.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from gradient_model import SMOKE, THROWING, Data, Model, Study, store, train
from gradient_report import ARMS, OTHER_MASKS, PARTS, SPLIT, plot, print_tables, summarise
from small_study import curve_of, provenance
from torch import Tensor

from ummim.atomic import write_text

MEASURED = 10**6  # steps from here on are batches of the measurement, never trained on


class Gradients:
    """Gradients of losses by the shared parameters, as one vector with encoder and decoder side by side."""

    def __init__(self, model: Model) -> None:
        parts = model.shared()
        self.parameters = [parameter for part in PARTS for parameter in parts[part]]
        self.sizes = [sum(parameter.numel() for parameter in parts[part]) for part in PARTS]

    def __call__(self, loss: Tensor, retain_graph: bool = False) -> Tensor:
        grads = torch.autograd.grad(loss, self.parameters, retain_graph=retain_graph)
        return torch.cat([grad.flatten() for grad in grads])

    def distance(self, own: Tensor, full: Tensor) -> list[list[float]]:
        """[deviation, cosine, ratio of lengths] of each part."""
        return [
            [((a - b).norm() / b.norm()).item(), torch.cosine_similarity(a, b, 0).item(), (a.norm() / b.norm()).item()]
            for a, b in zip(own.split(self.sizes), full.split(self.sizes), strict=True)
        ]


def compare(
    model: Model, gradients: Gradients, data: Data, step: int, count: int
) -> Iterator[tuple[str, float, Tensor, Tensor]]:
    """For ``count`` images and every arm: its name, its loss, its gradient, and the one that is compared with.

    For PR-MIM's plans also by tokens: ``kept`` ones, by a decoder that sees the short or the whole sequence, and
    ``thrown`` ones, by the aggregation or by the decoder.
    """
    images = data.images(step, count)
    whole = model.full(images, data.plan(step, count))
    full = gradients(whole.loss, retain_graph=True)
    yield "full", whole.loss.item(), full, full
    loss = model.full(images, data.plan(step, count, draw=1)).loss
    yield OTHER_MASKS, loss.item(), gradients(loss), full
    for ratio in data.study.ratios:
        for throwing in THROWING:
            plan = data.plan(step, count, ratio, throwing)
            plain, progressive = model.partial_losses(images, plan, ratio)
            own = {False: gradients(plain, retain_graph=True), True: gradients(progressive)}
            losses = {False: plain.item(), True: progressive.item()}
            for name, arm in ARMS.items():
                if arm.throwing == throwing:
                    yield f"{ratio:.0%} {name}", losses[arm.progressive], own[arm.progressive], full
            if throwing == "furthest":
                share = plan.kept.shape[1] / plan.masked.shape[1]
                kept = gradients(model.loss_at(whole, images, plan.kept), retain_graph=True)
                yield f"{ratio:.0%} kept", losses[False], own[False], kept
                loss_thrown = (losses[True] - share * losses[False]) / (1 - share)
                thrown, by_decoder = ((a - share * b) / (1 - share) for a, b in ((own[True], own[False]), (full, kept)))
                yield f"{ratio:.0%} thrown", loss_thrown, thrown, by_decoder


def measure_fold(model: Model, data: Data, study: Study, fold: int) -> dict[str, Any]:
    """By arm: the losses of its batches, the measures of batches and of single images, the fold's mean gradients."""
    gradients = Gradients(model)
    losses: dict[str, list[float]] = defaultdict(list)
    batches: dict[str, list[list[list[float]]]] = defaultdict(list)
    images: dict[str, list[list[list[float]]]] = defaultdict(list)
    means: dict[str, Tensor] = {}
    references: dict[str, Tensor] = {}  # what arms are compared with, where that is not all of full reconstruction
    for step in range(MEASURED + fold * study.batches, MEASURED + (fold + 1) * study.batches):
        for name, loss, own, reference in compare(model, gradients, data, step, study.batch):
            losses[name].append(loss)
            batches[name].append(gradients.distance(own, reference))
            means[name] = means.get(name, 0) + own / study.batches
            if name.endswith(SPLIT):
                references[name] = references.get(name, 0) + reference / study.batches
    for step in range(2 * MEASURED + fold * study.singles, 2 * MEASURED + (fold + 1) * study.singles):
        for name, _, own, reference in compare(model, gradients, data, step, 1):
            images[name].append(gradients.distance(own, reference))
    found = {"losses": dict(losses), "batches": dict(batches), "images": dict(images)}
    return {**found, "means": means, "references": references, "sizes": gradients.sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradients of partial against those of full reconstruction.")
    parser.add_argument("--runs", type=Path, default=Path("runs/gradient_deviation"), help="folder of unfinished work")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figure (matplotlib)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a tiny model and a few images, to check the script")
    options = parser.parse_args()
    study = replace(SMOKE if options.smoke else Study(), seed=options.seed)
    settings, path = json.dumps(asdict(study)), options.runs / "settings.json"
    options.runs.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text() != settings:
        raise SystemExit(f"{options.runs} holds a study of other sizes: remove it or give another --runs folder")
    write_text(path, settings)

    data, model = Data(study), Model(study)
    losses = train(study, data, options.runs)
    results: dict[str, Any] = {"settings": asdict(study), **provenance(), "after": {}}
    results["training_curve"] = curve_of(losses, max(1, len(losses) // 16))
    for step in study.measured:
        model.load_state_dict(torch.load(options.runs / f"model-{step}.pt", weights_only=True))
        folds = []
        for fold in range(study.folds):
            path = options.runs / f"fold-{step}-{fold}.pt"
            if not path.exists():
                store(measure_fold(model, data, study, fold), path)
                print(f"after {step} steps: fold {fold + 1} of {study.folds}", flush=True)
            folds.append(torch.load(path, weights_only=True))
        results["after"][str(step)] = summarise(folds)
    print_tables(results)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.output, json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
