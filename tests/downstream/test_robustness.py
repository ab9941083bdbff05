"""ImageNet's robustness sets: what is counted, mean corruption error, layouts and mistakes; made sets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data_prep.__main__ import main as build
from tests.downstream.test_encoders import fine_tuned_run
from tests.interop.test_classifier import DECODER, pretrained, small
from ummim.__main__ import main
from ummim.backbones.vit import ViTConfig
from ummim.data.normalise import denormalise
from ummim.downstream.imagenet_variants import (
    ALEXNET_ERROR,
    EXTRA,
    find_corruptions,
    imagenet_classes,
    open_set,
    subset_classes,
)
from ummim.downstream.robustness import (
    ALONE,
    Counts,
    Reading,
    Subject,
    corruption_errors,
    count,
    count_set,
    measure,
    table,
    total,
)
from ummim.downstream.subject import load_subject
from ummim.engine.checkpoint import seal
from ummim.errors import DataError, UserError
from ummim.methods.mae import MAE, Config

A, R = subset_classes("imagenet-a"), subset_classes("imagenet-r")
BOTH = sorted(set(A) & set(R))[:2]
ONLY_A = sorted(set(A) - set(R))[0]
NEITHER = sorted(set(imagenet_classes()) - set(A) - set(R))[:2]
CLASSES = sorted([*BOTH, ONLY_A, *NEITHER])  # five
HERE = Reading(batch=4, workers=0)


class ByColour(nn.Module):
    """Logits of five classes: minus the distance of the picture's mean red to each class's, 20, 60, ..., 180."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.arange(20.0, 200, 40))

    def forward(self, images: Tensor) -> Tensor:
        red = 255 * denormalise(images)[:, 0].mean((1, 2))  # (B,)
        return -(red[:, None] - self.places).abs()


SUBJECT = Subject(ByColour(), CLASSES, image_size=8, eval_side=9)


def draw(path: Path, shown: str, size: tuple[int, int] = (12, 10)) -> None:
    """A picture that the model takes for the class ``shown``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[..., 0] = 20 + 40 * CLASSES.index(shown) + 3
    Image.fromarray(pixels).save(path)


def folder(root: Path, shown: dict[str, list[str]]) -> Path:
    """A set: {class: what the model takes each of its pictures for}."""
    for name, guesses in shown.items():
        for i, guess in enumerate(guesses):
            draw(root / name / f"{i}.png", guess)
    (root / "README.txt").write_text("about the set")
    return root


def corrupted(root: Path, wrong: dict[str, int], group: str = "") -> Path:
    """ImageNet-C of five pictures a severity, ``wrong[corruption]`` of which are taken for another class."""
    for name in (*ALEXNET_ERROR, *EXTRA):
        for severity in range(1, 6):
            for i, own in enumerate(CLASSES):
                guess = CLASSES[(i + (i < wrong.get(name, 0))) % 5]
                draw(root / group / name / str(severity) / own / "x.png", guess, (8, 8))
    return root


def test_the_lists_of_classes_are_the_published_ones() -> None:
    classes = imagenet_classes()
    assert (len(classes), classes[0], classes[-1]) == (1000, "n01440764", "n15075141")
    assert classes == sorted(set(classes))
    for names, first in ((A, "n01498041"), (R, "n01443537")):
        assert (len(set(names)), names[0]) == (200, first)
        assert set(names) <= set(classes)
    assert len(ALEXNET_ERROR) == 15
    published = (88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.7)
    assert [100 * error for error in ALEXNET_ERROR.values()] == pytest.approx(published, abs=0.051)


def test_counts_are_exact_and_ties_are_no_gift() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0], [float("nan")] * 6])
    labels = torch.tensor([0, 1, 5, 0])
    pixels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    batches = [(pixels[:3], labels[:3]), (pixels[3:], labels[3:])]
    given = iter([logits[:3], logits[3:]])
    found = total(count(lambda _: next(given), batches), ALONE)
    assert found[:3] == (4, 1, 2)
    assert found.error == 0.75
    assert Counts(8, 6, 8, 0.0).error == 0.25


def test_only_the_sets_own_classes_compete(tmp_path: Path) -> None:
    """The class that the model prefers is none of ImageNet-A's: the best of those that are counts."""
    order = sorted(range(5), key=lambda i: abs(i - CLASSES.index(NEITHER[0])))  # by distance from its colour
    nearest = next(CLASSES[i] for i in order if CLASSES[i] in A)
    root = folder(tmp_path / "a", {nearest: [NEITHER[0]], ONLY_A: [ONLY_A]})
    results = measure(SUBJECT, {"imagenet-a": root}, HERE)
    assert results["imagenet-a"] == {
        "classes": 3,
        "images": 2,
        "top1": 100.0,
        "top5": 100.0,
        "loss": pytest.approx(results["imagenet-a"]["loss"]),
    }
    whole = folder(tmp_path / "sketch", {nearest: [NEITHER[0]], ONLY_A: [ONLY_A]})
    assert measure(SUBJECT, {"imagenet-sketch": whole}, HERE)["imagenet-sketch"]["top1"] == 50.0


def test_mean_corruption_error_of_known_numbers() -> None:
    found = corruption_errors({name: [error] * 5 for name, error in ALEXNET_ERROR.items()})
    assert found["mce"] == pytest.approx(100)  # AlexNet's own
    assert found["mean_error"] == pytest.approx(100 * sum(ALEXNET_ERROR.values()) / 15)
    errors = dict.fromkeys(ALEXNET_ERROR, [0.0] * 5) | {"snow": [0.1, 0.2, 0.3, 0.4, 0.5]}
    found = corruption_errors(errors)
    assert found["corruptions"]["snow"]["error"] == pytest.approx(30)
    assert found["corruptions"]["snow"]["ce"] == pytest.approx(30 / 0.866816)
    assert found["mce"] == pytest.approx(30 / 0.866816 / 15)
    assert found["mean_error"] == pytest.approx(2)


def test_crops_lose_no_border_and_other_images_do(tmp_path: Path) -> None:
    pixels = np.full((8, 8, 3), 23, dtype=np.uint8)
    pixels[2:6, 2:6, 0] = 183  # the middle is the last class's, the whole the second's
    (tmp_path / CLASSES[1]).mkdir()
    Image.fromarray(pixels).save(tmp_path / CLASSES[1] / "x.png")
    subject = Subject(ByColour(), CLASSES, image_size=8, eval_side=16)
    images = open_set(tmp_path, CLASSES)
    assert [count_set(subject, images, HERE, None, whole=whole).top1 for whole in (True, False)] == [1, 0]


@pytest.mark.parametrize("group", ["", "noise"])
def test_all_fifteen_corruptions_at_five_severities(group: str, tmp_path: Path) -> None:
    wrong = {"fog": 2, "pixelate": 5, "saturate": 5}
    root = corrupted(tmp_path, wrong, group)
    found = measure(SUBJECT, {"imagenet-c": root}, HERE)["imagenet-c"]
    assert found["images"] == 15 * 5 * 5
    assert found["corruptions"]["fog"]["error_by_severity"] == [40.0] * 5
    assert found["mean_error"] == pytest.approx((40 + 100) / 15)
    assert found["mce"] == pytest.approx((40 / 0.819324 + 100 / 0.717840) / 15)
    assert found["ignored"] == list(EXTRA)
    text = table({"imagenet-c": found})
    assert "no part of ImageNet-C's mean: gaussian_blur, saturate, spatter, speckle_noise" in text
    assert f"mCE {found['mce']:.2f}, mean error {found['mean_error']:.2f}" in text
    assert "pixelate              100.00  139.31   100.00 100.00 100.00 100.00 100.00" in text


def test_corruptions_that_are_missing_are_named(tmp_path: Path) -> None:
    for name in (*ALEXNET_ERROR, "saturate"):
        for severity in range(1, 6):
            (tmp_path / name / str(severity)).mkdir(parents=True)
    assert find_corruptions(tmp_path)[1] == ["saturate"]
    (tmp_path / "fog" / "3").rename(tmp_path / "fog" / "6")
    with pytest.raises(UserError, match="fog/3: no such folder; each corruption has the severities 1 to 5"):
        find_corruptions(tmp_path)
    (tmp_path / "snow").rename(tmp_path / "sleet")
    with pytest.raises(UserError, match="has 15 corruptions, here are missing: snow"):
        find_corruptions(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        find_corruptions(tmp_path / "nowhere")


def test_shards_give_the_same_as_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {ONLY_A: [ONLY_A, BOTH[0]], BOTH[0]: [BOTH[0], BOTH[0], BOTH[1]], BOTH[1]: [BOTH[1]]}
    root = folder(tmp_path / "a", shown)
    (root / "README.txt").unlink()
    assert build(["build", str(root), str(tmp_path / "shards"), "--workers", "1"]) == 0
    plain, packed = (measure(SUBJECT, {"imagenet-a": tmp_path / name}, HERE)["imagenet-a"] for name in ("a", "shards"))
    assert plain["top1"] == pytest.approx(100 * 4 / 6)
    assert {**packed, "loss": 0} == {**plain, "loss": 0}
    assert packed["loss"] == pytest.approx(plain["loss"])  # in another order


def test_layouts_that_are_not_the_sets(tmp_path: Path) -> None:
    inner = folder(tmp_path / "outer" / "imagenet-r", {BOTH[0]: [BOTH[0]]})
    for name in ("empty", "plain/cat", f"hollow/{BOTH[0]}", "strange/n99999999"):
        (tmp_path / name).mkdir(parents=True)
    for place, allowed, message in (
        ("nowhere", None, "nowhere: no such folder"),
        ("empty", None, "holds no class folders named by WordNet ids, such as n01440764; give the one"),
        ("plain", None, "holds no class folders"),
        ("outer", None, f"did you mean {inner}"),
        ("hollow", None, "its 1 class folders hold no images"),
        ("strange", None, "n99999999 is none of the model's classes; name these with --classes"),
        ("outer/imagenet-r", [ONLY_A], f"{BOTH[0]} is no class of this set; is it another set's folder"),
    ):
        with pytest.raises(UserError, match=message):
            open_set(tmp_path / place, CLASSES, allowed)


def test_an_image_that_cannot_be_read_is_never_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path / "r", {BOTH[0]: [BOTH[0]]})
    (root / BOTH[0] / "1.png").write_bytes(b"half a picture")
    for workers in (0, 1):
        with pytest.raises(DataError) as caught:
            measure(SUBJECT, {"imagenet-r": root}, Reading(batch=4, workers=workers))
        path = root / BOTH[0] / "1.png"
        assert str(caught.value) == f"{path}: cannot be read: not an image of a format that is read; restore it"


def official_file(path: Path, classes: int) -> Path:
    """A fine-tuned MAE in the official format, one block of the smallest published width."""
    torch.manual_seed(0)
    tensors = small("mae_vit", MAE(32, Config(ViTConfig(embed_dim=192, depth=1, num_heads=3), DECODER)))
    head = {"head.weight": torch.randn(classes, 192), "head.bias": torch.zeros(classes)}
    torch.save({"model": tensors | head}, path)
    return path


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = official_file(tmp_path / "tuned.pth", 5)
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(CLASSES) + "\n")
    sketch = folder(tmp_path / "sketch", {name: [name, name] for name in CLASSES})
    command = ["robustness", str(model), "--family", "mae_vit", "--classes", str(classes), "--workers", "0"]
    out = tmp_path / "results" / "a.json"
    assert main([*command, "--imagenet-sketch", str(sketch), "--val", str(sketch), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:3]] == ["set", "validation", "ImageNet-Sketch"]
    assert "note: ImageNet-Sketch has 50,889 images as published, here 10" in printed
    held = json.loads(out.read_text())
    assert held["sets"]["val"]["top1"] == held["sets"]["imagenet-sketch"]["top1"]
    assert held["model"] | {"sha256": ""} == {
        "source": str(model), "format": "official", "recipe": "mae_vit", "sha256": "", "classes": 5, "image_size": 32,
    }  # fmt: skip


def test_a_fine_tunings_run_is_tested_on_its_own_classes(
    write_recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = folder(tmp_path / "train", {name: [name] for name in CLASSES})
    (train / "README.txt").unlink()
    shards = tmp_path / "shards"
    assert build(["build", str(train), str(shards), "--workers", "1"]) == 0
    run, _ = fine_tuned_run(write_recipe, tmp_path / "run")
    command = [
        "robustness",
        str(run),
        "--imagenet-a",
        str(folder(tmp_path / "a", {ONLY_A: [ONLY_A]})),
        "--workers",
        "0",
    ]
    assert main(command) == 2  # its shards are nowhere, and ImageNet-1K has not five classes
    assert "has 5 classes, ImageNet-1K 1000" in capsys.readouterr().err
    recipe = run / "checkpoints" / "step-7" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("shards: nowhere", f"shards: {shards}"))
    seal(recipe.parent)
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["ImageNet-A", "1", "3"]


def test_the_heads_of_an_official_file_are_not_guessed(tmp_path: Path) -> None:
    torch.save({"model": small("mae_vit", pretrained("mae_vit"))}, tmp_path / "a.pth")  # 36 wide, which none is
    with pytest.raises(UserError, match=r"a\.pth: nothing tells num_heads, and 1 would be a guess"):
        load_subject(tmp_path / "a.pth", "mae_vit", None)


def test_the_commands_mistakes_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(official_file(tmp_path / "tuned.pth", 5))
    (tmp_path / "twice.txt").write_text("n01440764\nn01440764\n")
    torch.save({"cls_token": torch.zeros(1, 1, 4)}, tmp_path / "headless.pth")
    mae: list[Any] = ["--family", "mae_vit"]
    sketch: list[Any] = ["--imagenet-sketch", str(tmp_path)]
    for arguments, message in (
        ([model, *mae], "name at least one set: --val DIR, --imagenet-a DIR"),
        ([model, *mae, *sketch, "--batch", "0"], "--batch 0: must be at least 1"),
        ([model, *sketch], "--family is missing; say of which the file is, one of mae_vit"),
        ([model, *sketch, "--family", "dino_vit"], "--family dino_vit has no classifier"),
        ([model, *mae, *sketch], "has 5 classes, ImageNet-1K 1000; name them with --classes"),
        ([model, *mae, *sketch, "--classes", "/nowhere"], "/nowhere: cannot be read"),
        ([model, *mae, *sketch, "--classes", str(tmp_path / "twice.txt")], "must name the classes, each once"),
        ([str(tmp_path / "headless.pth"), *mae, *sketch], "has no head"),
        (["/nowhere", *sketch], "/nowhere: no such file or folder"),
        ([str(tmp_path), *sketch], "give a run's folder"),
        ([str(tmp_path), *mae, *sketch], "--family mae_vit is for official files"),
    ):
        assert main(["robustness", *arguments]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
