"""Fine-tuned classifiers and probes, exported: the logits of the libraries that load them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_prep.__main__ import main as data_prep
from tests.data.pictures import write_tree
from tests.interop.exports import CHECKPOINT, images_of, shaken, tiny
from ummim.__main__ import main
from ummim.data import ShardIndex
from ummim.data.config import LabelledDataConfig
from ummim.downstream.classify import build_classifier
from ummim.downstream.encoders import load_encoder
from ummim.downstream.probe import Probe
from ummim.downstream.recipe import ClassifyConfig, ClassifyRecipe
from ummim.engine.checkpoint import seal
from ummim.errors import UserError
from ummim.interop.certificate import verify
from ummim.interop.export import export
from ummim.interop.source import exported_encoder, exported_evaluation
from ummim.recipe_file import dump_recipe


def evaluation(name: str, pool: Any, protocol: Any = "full", norm_last: bool = False) -> tuple[ClassifyRecipe, Any]:
    """A recipe and its model, whose features are neither centred nor of variance 1."""
    recipe, method = tiny(name)
    classifier = build_classifier(method.backbone(), 5, pool, norm_last=norm_last)  # type: ignore[arg-type]
    config = ClassifyConfig(weights="w", classes=5, pool=pool, val_shards="v", protocol=protocol,
                            encoder=classifier.encoder.config)  # fmt: skip
    data = LabelledDataConfig(shards="nowhere", image_size=recipe.data.image_size)
    shaken(classifier).head.weight.data.mul_(20)  # logits of about 1 and more
    model: Any = classifier
    if protocol in ("linear", "attentive"):
        model = Probe(classifier, 5, protocol == "attentive").eval()
        torch.manual_seed(3)
        for value in model.head.state_dict().values():
            value.add_(0.5 * torch.rand_like(value))
    return ClassifyRecipe(classify=config, data=data, name="tuned"), model


def loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As the model card says."""
    card = path / "README.md" if path.is_dir() else path.with_name(f"{path.name}.md")
    (block,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    monkeypatch.chdir(path.parent)
    held: dict[str, Any] = {}
    exec(block, held)
    return held["model"]


def assert_equal(model: Any, path: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        found, expected = loaded(path, monkeypatch)(images), model(images)
    assert expected.abs().max() > 0.3
    torch.testing.assert_close(getattr(found, "logits", found), expected, rtol=1e-5, atol=5e-6)
    assert verify(path)[0]


@pytest.mark.parametrize(
    ("name", "pool"),
    [("mae", "mean"), ("mae", "class"), ("simmim", "mean"), ("amt_simmim", "class"), ("simmim_swin", "mean")],
)
def test_a_classifier_is_timms_and_ours(name: str, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, model = evaluation(name, pool)
    images = images_of(recipe)  # type: ignore[arg-type]
    for form in ("timm", "safetensors"):
        path = export(recipe, model, CHECKPOINT, tmp_path / f"{form}.safetensors", form).path
        assert_equal(model, path, images, monkeypatch)
        encoder, told = load_encoder(path)
        assert type(encoder) is type(model.encoder) and any(key.startswith("head.") for key in told["left"])
        with torch.no_grad():
            torch.testing.assert_close(encoder(images), model.encoder(images))


@pytest.mark.parametrize(
    ("name", "pool", "kind"),
    [("mae", "class", "ViTForImageClassification"), ("mae", "mean", "BeitForImageClassification"),
     ("simmim_swin", "mean", "SwinForImageClassification")],
)  # fmt: skip
def test_a_linear_probe_is_a_classifier_elsewhere(
    name: str, pool: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, model = evaluation(name, pool, "linear")
    forms = ["timm", "safetensors"]
    try:
        import transformers  # noqa: F401

        forms.append("huggingface")
    except ImportError:
        pass
    for form in forms:
        out = tmp_path / (form if form == "huggingface" else f"{form}.safetensors")
        path = export(recipe, model, CHECKPOINT, out, form).path
        assert_equal(model, path, images_of(recipe), monkeypatch)  # type: ignore[arg-type]
        certificate = json.loads((path / "certificate.json" if path.is_dir() else Path(f"{path}.certificate.json"))
                                 .read_text())  # fmt: skip
        assert any("is part of the head" in note for note in certificate["exported"]["notes"]) == (
            form != "safetensors"
        )
        assert certificate["exported"]["model"] == kind or form != "huggingface"


def test_an_attentive_probe_goes_in_our_own_format_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, model = evaluation("mae", "mean", "attentive")
    path = export(recipe, model, CHECKPOINT, tmp_path / "a.safetensors", "safetensors").path
    assert_equal(model, path, images_of(recipe), monkeypatch)  # type: ignore[arg-type]
    for out, form in ((tmp_path / "b.safetensors", "timm"), (tmp_path / "hub", "huggingface")):
        if form == "huggingface":
            pytest.importorskip("transformers")
        with pytest.raises(
            UserError, match=f"attentive probe .*no model behind --format {form} .*--format safetensors"
        ):
            export(recipe, model, CHECKPOINT, out, form)
        assert not out.exists()


def test_what_cannot_be_exported_or_read_is_one_message(tmp_path: Path) -> None:
    recipe, model = evaluation("mae", "mean")
    with pytest.raises(UserError, match="--format huggingface, timm or safetensors, not official"):
        export(recipe, model, CHECKPOINT, tmp_path / "a.pth", "official")
    pre_training, method = tiny("mae")
    path = export(pre_training, method, CHECKPOINT, tmp_path / "encoder.safetensors", "safetensors").path
    with pytest.raises(UserError, match="encoder.safetensors: holds no evaluation"):
        exported_evaluation(path)
    assert exported_encoder(path) is not None
    _, pyramid = evaluation("um_mae", "mean")
    with pytest.raises(UserError, match="timm has no model like this Swin"):
        export(recipe, pyramid, CHECKPOINT, tmp_path / "swin.safetensors", "timm")
    _, swin = evaluation("local_mim_swin", "mean", norm_last=True)
    for form in ("timm", "huggingface"):
        with pytest.raises(UserError, match="norm before the mean, and this one behind it"):
            export(recipe, swin, CHECKPOINT, tmp_path / "swin.safetensors", form)


def test_a_runs_folder_is_exported_and_one_of_neighbours_says_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, model = evaluation("mae", "mean", "linear")
    step = tmp_path / "run" / "checkpoints" / "step-7"
    step.mkdir(parents=True)
    save_file({f"model.{key}": value for key, value in model.state_dict().items()}, step / "model.safetensors")
    (step / "recipe.yaml").write_text(dump_recipe(recipe))
    seal(step)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "a.safetensors"), "--format", "timm"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "b.safetensors")]) == 0
    assert capsys.readouterr().out.count("equal (largest difference: logits") == 2
    neighbours, _ = evaluation("mae", "mean", "knn")
    (tmp_path / "knn").mkdir()
    (tmp_path / "knn" / "recipe.yaml").write_text(dump_recipe(neighbours))
    assert main(["reconstruct", str(tmp_path / "knn"), "a.png", "--out", str(tmp_path / "b.png")]) == 2
    message = capsys.readouterr().err
    assert "knn/recipe.yaml: is an evaluation" in message and "this needs a pre-training recipe" in message
    assert main(["export", str(tmp_path / "knn"), str(tmp_path / "c.safetensors")]) == 2
    assert "leave no checkpoint: give the weights that were evaluated, w" in capsys.readouterr().err


CLASSES = ("ant", "bee", "cat", "dog", "elk")


def build(folder: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    """Shards of one picture of each class."""
    tree = write_tree(folder / "-".join(classes), classes, each=1)
    assert data_prep(["build", str(tree), str(folder / f"{tree.name}-shards"), "--workers", "1"]) == 0
    return folder / f"{tree.name}-shards"


def export_trained(shards: Path, digest: str | None, folder: Path) -> tuple[Any, str, str]:
    """The names, the printed lines and the card of a classifier whose run read shards with this index digest."""
    pytest.importorskip("transformers")
    recipe, model = evaluation("mae", "mean")
    recipe = replace(recipe, data=replace(recipe.data, shards=str(shards)))
    step = folder / "run" / "checkpoints" / "step-3"
    step.mkdir(parents=True, exist_ok=True)
    (step / "state.json").write_text(json.dumps({"step": 3, "index_digest": digest}))
    path, lines = export(recipe, model, step, folder / "out", "huggingface")
    assert verify(path)[0]
    config = json.loads((path / "config.json").read_text())
    return list(config["id2label"].values()), lines, (path / "README.md").read_text()


def test_classes_have_the_names_of_the_runs_shards(tmp_path: Path) -> None:
    shards = build(tmp_path)
    names, lines, card = export_trained(shards, ShardIndex.open(shards).digest, tmp_path)
    assert names == list(CLASSES) and "note" not in lines and "numbers, not names" not in card


@pytest.mark.parametrize(
    ("kind", "digest", "why"),
    [
        ("rebuilt", "ab" * 32, "the shards now have index digest .*, and the run's had abababababab"),
        ("untold", None, "does not tell which shards it was trained on"),
        ("gone", "ab" * 32, "the training shards, which name them, are not at hand"),
        ("fewer", None, "name 2 classes, and the head has 5"),
    ],
)
def test_names_of_other_shards_are_not_taken(kind: str, digest: str | None, why: str, tmp_path: Path) -> None:
    folder = tmp_path / "nowhere" if kind == "gone" else build(tmp_path, CLASSES[:2] if kind == "fewer" else CLASSES)
    if kind == "fewer":
        digest = ShardIndex.open(folder).digest
    names, lines, card = export_trained(folder, digest, tmp_path)
    assert names == [str(label) for label in range(5)]
    assert re.search(f"\nnote: classes are numbers, not names: .*{why}", lines)
    assert re.search(f"- Classes are numbers, not names: .*{why}", card) and str(tmp_path) not in card
