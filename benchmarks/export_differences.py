"""How far exports to Hugging Face differ from our models: each class of transformers at full size, random weights.

    python benchmarks/export_differences.py [NAME...]

For each packaged recipe, its model with weights of the initialisation and noise of deviation 0.02 is exported, loaded
back by transformers and compared on two fixed images, as ``ummim export`` does it: the largest difference over the
largest value of each output, and where norms need another eps after loading, the same before they get it.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ummim.downstream.classify import build_classifier
from ummim.interop.check import Target, compare, loaded_outputs, our_outputs
from ummim.interop.huggingface import HuggingFaceModel, to_huggingface, write_folder
from ummim.interop.huggingface_classifier import classifier_to_huggingface
from ummim.recipe_file import load_recipe

# name -> recipe, what is exported of it: the whole model, its encoder, or a classifier on it by what it pools
ROWS = {
    "mae": ("mae_vit_base_800e", "whole"),
    "mae-encoder": ("mae_vit_base_800e", "encoder"),
    "mae-mean": ("mae_vit_base_800e", "mean"),
    "mae-class": ("mae_vit_base_800e", "class"),
    "simmim-vit": ("simmim_vit_base_800e", "encoder"),
    "simmim-vit-mean": ("simmim_vit_base_800e", "mean"),
    "simmim-swin": ("simmim_swin_base_800e", "whole"),
    "simmim-swin-encoder": ("simmim_swin_base_800e", "encoder"),
    "simmim-swin-mean": ("simmim_swin_base_800e", "mean"),
    "green-mim": ("green_mim_swin_base_200e", "encoder"),
    "local-mim-vit": ("local_mim_vit_base_1600e", "encoder"),
    "local-mim-swin": ("local_mim_swin_base_400e", "encoder"),
}


def main(names: list[str]) -> None:
    if unknown := set(names) - set(ROWS):
        sys.exit(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    print(f"{'row':20}{'class':28}{'output':10}{'largest difference / largest value':36}before eps is set")
    for name in names or list(ROWS):
        recipe_name, part = ROWS[name]
        recipe = load_recipe(recipe_name)
        torch.manual_seed(0)
        method = recipe.method.for_inference().build(recipe.data.image_size, recipe.partial, False).eval()
        for parameter in method.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        model: Any = method
        if part in ("mean", "class"):
            model = build_classifier(method.backbone(), 1000, part).eval()  # type: ignore[arg-type]
            torch.nn.init.normal_(model.head.weight, std=0.02)
            converted = classifier_to_huggingface(model)
        else:
            converted = to_huggingface(method, recipe.mask.ratio, part == "encoder")
        with tempfile.TemporaryDirectory() as folder:
            write_folder(converted, recipe.data.image_size, Path(folder))
            for line in differences(converted, model, recipe.data.image_size, Path(folder)):
                print(f"{name:20}{converted.architecture:28}{line}", flush=True)


def differences(converted: HuggingFaceModel, model: Any, size: int, folder: Path) -> list[str]:
    """A line for each output."""
    whole = converted.architecture in ("ViTMAEForPreTraining", "SwinForMaskedImageModeling")
    head = converted.architecture.endswith("ForImageClassification")
    outputs = ("loss", "masked") if whole else ("logits",) if head else ("features",)
    arguments = converted.arguments | (
        {"mask_ratio": converted.config["mask_ratio"]} if "mask_ratio" in converted.config else {}
    )
    found = []
    for eps in [converted.norm_eps, *([None] if converted.norm_eps else [])]:
        target = Target("huggingface", converted.architecture, size, arguments, eps, outputs)
        found.append(compare(loaded_outputs(target, folder), our_outputs(model, target))["outputs"])
    shares = [{name: each["max_abs_difference"] / each["largest"] for name, each in one.items()} for one in found]
    return [
        f"{name:10}{shares[0][name]:<36.1e}{'' if len(shares) == 1 else f'{shares[1][name]:.1e}'}" for name in outputs
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
