"""The model card of an export, in Markdown: what it is, where it comes from, how to load it. The licence is the user's.

All of it is taken from the certificate, and results from the run's evaluation.json. The code blocks run as they are, in
the folder that holds the export.
"""

from typing import Any

FRONT = """---
library_name: transformers
tags: [masked-image-modelling, {method}]
# license: yours to choose; name it here
---
"""


def model_card(certificate: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """The card.

    Args:
        certificate: of the export.
        evaluation: the run's evaluation.json; empty: none.
    """
    exported, recipe = certificate["exported"], certificate["recipe"]
    method = recipe["method"]["name"] if "method" in recipe else "classifier"
    parts = [
        f"# {recipe['name']}",
        recipe["description"],
        _table(_facts(certificate, method)),
        "\n".join(f"- {note[0].upper()}{note[1:]}." for note in exported["notes"]),
        "## How to load",
        "```python\n" + snippet(exported) + "```",
        "Images are RGB, scaled to [0, 1] and normalised with ImageNet's mean (0.485, 0.456, 0.406) and deviation "
        "(0.229, 0.224, 0.225).",
        "## Training",
        _table(_training(recipe)),
        "The certificate holds the whole recipe, and versions and commit of the code.",
        "## Results",
        _results(recipe, evaluation, certificate["source"]["step"]),
        "## Licence",
        "Not stated. Whoever publishes these weights names it; the data's terms may bear on it.",
    ]
    front = FRONT.format(method=method) if exported["form"] == "huggingface" else ""
    return front + "\n\n".join(part for part in parts if part) + "\n"


def snippet(exported: dict[str, Any]) -> str:
    """Python that loads the export, from the folder that holds it, into ``model``."""
    name, arguments = exported["name"], exported["arguments"]
    if exported["form"] == "official":
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        return (
            "from ummim.interop import load_official\n\n"
            f"model = load_official({exported['model']!r}, {name!r}, {given}).eval()\n"
        )
    if exported["form"] == "timm":
        return _timm_snippet(name)
    if exported["form"] == "huggingface":
        given = "".join(f", {key}={value!r}" for key, value in arguments.items() if key != "mask_ratio")
        kind = exported["model"]
        lines = [f"from transformers import {kind}, ViTImageProcessor", ""]
        lines += [f"model = {kind}.from_pretrained({name!r}{given}).eval()"]
        lines += [f"processor = ViTImageProcessor.from_pretrained({name!r})"]
        if exported["norm_eps"] is not None:
            lines = ["import torch", *lines, "for module in model.modules():"]
            lines += [f"    if isinstance(module, torch.nn.LayerNorm):\n        module.eps = {exported['norm_eps']}"]
        return "\n".join(lines) + "\n"
    load = "exported_evaluation" if "logits" in exported["outputs"] else "exported_encoder"
    return f"from pathlib import Path\n\nfrom ummim.interop.source import {load}\n\nmodel = {load}(Path({name!r}))\n"


def _timm_snippet(name: str) -> str:
    return (
        "import json\n"
        "from functools import partial\n\n"
        "import timm\n"
        "import torch\n"
        "from safetensors import safe_open\n"
        "from safetensors.torch import load_file\n\n"
        f"with safe_open({name!r}, 'pt') as file:\n"
        "    metadata = file.metadata()\n"
        "kwargs = json.loads(metadata['kwargs'])\n"
        "if metadata['architecture'].startswith('swin') or float(metadata['norm_eps']) != 1e-6:\n"
        "    kwargs['norm_layer'] = partial(torch.nn.LayerNorm, eps=float(metadata['norm_eps']))\n"
        "model = timm.create_model(metadata['architecture'], **kwargs).eval()\n"
        f"model.load_state_dict(load_file({name!r}), strict=True)\n"
    )


def _facts(certificate: dict[str, Any], method: str) -> list[tuple[str, str]]:
    exported, source, encoder = certificate["exported"], certificate["source"], certificate["encoder"]
    sizes = ", ".join(f"{key} {value}" for key, value in encoder.items() if key not in ("class", "kind"))
    digest, images, seen = source["data_digest"], source["data_images"], source["images_seen"]
    count = "number of images not recorded" if images is None else f"{images:,} images"
    step = f"step {source['step']} of run {source['run']}"
    return [
        ("method", method),
        ("backbone", f"{encoder['class']}: {sizes}"),
        ("images", f"{exported['image_size']} x {exported['image_size']} pixels"),
        ("format", f"{exported['form']}: {exported['model']}"),
        ("checkpoint", step if seen is None else f"{step}, {seen:,} images seen"),
        ("training data", f"{count}, shards with index digest {digest[:12]}" if digest else "not recorded"),
        ("check at export", _verdict(certificate["check"])),
    ]


def _verdict(check: dict[str, Any]) -> str:
    return (
        f"loaded back by {check['library']}; largest difference {check['max_abs_difference']:.1e}, "
        f"tolerance {check['tolerance']:.0e}"
    )


def _training(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """Numbers of the recipe; those that are off (0, empty) are left out."""
    optim = recipe["optim"]
    idle = {"momentum"} if str(optim.get("optimizer", "")).startswith("adam") else set()
    idle |= {"decay_epochs", "decay_rate"} if optim.get("schedule") == "cosine" else set()
    rows = {key: recipe[key] for key in ("epochs", "global_batch", "precision")}
    rows |= {key: value for key, value in optim.items() if key not in idle}
    rows |= {f"mask_{key}": value for key, value in recipe.get("mask", {}).items()}
    rows |= {"PR-MIM throw_ratio": recipe.get("throw_ratio")}
    tuning = recipe.get("classify", {})
    idle = {"weights", "val_shards", "encoder", "neighbours", "temperature"}
    idle |= set() if tuning.get("mixup") or tuning.get("cutmix") else {"mixup_prob", "mixup_switch"}
    rows |= {key: value for key, value in tuning.items() if key not in idle}
    return [(key.replace("_", " "), str(value)) for key, value in rows.items() if value not in (0, None, False, "", [])]


def _results(recipe: dict[str, Any], evaluation: dict[str, Any], step: int | None) -> str:
    published = recipe.get("published") or {}
    rows = [
        (key, f"{value:.4g}" if isinstance(value, float) else str(value))
        for key, value in evaluation.items()
        if isinstance(value, (int, float, str)) and key != "val_shards"
    ]
    text = "Measured on these weights: nothing; the run holds no evaluation.json."
    if rows:
        on = "these weights" if evaluation.get("step", step) == step else "other weights of the run, at another step"
        text = f"Measured on {on} (evaluation.json of the run):\n\n{_table(rows)}"
    if published.get("top1") is None:
        return text
    return text + (
        f"\n\nPublished for this recipe, and not measured on these weights: {published['top1']} % top-1 on ImageNet-1K "
        f"after fine-tuning ({published['source']})."
    )


def _table(rows: list[tuple[str, str]]) -> str:
    head = "| | |\n|---|---|\n"
    return head + "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")
