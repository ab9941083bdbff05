"""``ummim verify-export`` of what others made: it runs none of it, looks at all of it, and says in one line what is
damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.interop.exports import CHECKPOINT, tiny
from ummim.__main__ import main
from ummim.interop.certificate import certificate_path, hashes, verify
from ummim.interop.export import export

Change = Callable[[dict[str, Any]], Any]


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export in each format; to be copied."""
    folder = tmp_path_factory.mktemp("made")
    recipe, method = tiny("mae")
    export(recipe, method, CHECKPOINT, folder / "timm.safetensors", "timm")
    return folder


@pytest.fixture
def file(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "file")
    return tmp_path / "file" / "timm.safetensors"


@pytest.fixture(scope="module")
def made_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="pip install 'ummim[huggingface]'")
    recipe, method = tiny("mae")
    out = tmp_path_factory.mktemp("made") / "hub"
    return export(recipe, method, CHECKPOINT, out, "huggingface", encoder_only=True).path


@pytest.fixture
def folder(made_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_folder, tmp_path / "hub"))


def restate(exported: Path, change: Change) -> None:
    """Change the certificate, and bring sizes and hashes up to date unless it is about them."""
    path = certificate_path(exported)
    stated = json.loads(path.read_text())
    stated["exported"]["files"] = hashes(exported)
    change(stated)
    path.write_text(json.dumps(stated))


def refused(exported: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of exit code 2."""
    capsys.readouterr()
    assert main(["verify-export", str(exported)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("ummim: error: ") and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("arguments", [{"weights_only": False, "dtype": "auto"}, {}])
@pytest.mark.parametrize("kept", [True, False])
def test_a_pickle_in_a_folder_is_not_unpickled(
    arguments: dict[str, Any], kept: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ``weights_only`` off, and without a type in the config, transformers would."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype")
    (folder / "config.json").write_text(json.dumps(config))
    if not kept:
        (folder / "model.safetensors").unlink()
    torch.save({"x": Touch(tmp_path / "ran")}, folder / "pytorch_model.bin")
    restate(folder, lambda stated: stated["exported"]["arguments"].update(arguments))
    if arguments or not kept:
        message = refused(folder, capsys)
        assert "weights_only = False is none that ummim export writes" in message or "(files = [" in message
    else:
        assert main(["verify-export", str(folder)]) == 0  # certified, and not read
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "quantization_config", "transformers_weights", "auto_map"])
def test_a_config_that_names_other_code_or_weights_is_refused(
    key: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: "someone/something"}))
    restate(folder, lambda stated: None)
    assert f"config.json: {key} = 'someone/something' is none that ummim export writes" in refused(folder, capsys)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"kwargs": '{"checkpoint_path": "evil.pth"}'}, "keyword checkpoint_path = 'evil.pth' is none"),
        ({"architecture": "hf-hub:someone/something"}, "architecture 'hf-hub:someone/something' is none"),
        ({"kwargs": "[1]"}, "name no timm model"),
    ],
)
def test_timm_is_given_no_more_than_an_export_has(
    change: dict[str, str], part: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with safe_open(file, "pt") as held:
        metadata = held.metadata()
    save_file(load_file(file), file, {**metadata, **change})
    restate(file, lambda stated: None)
    assert part in refused(file, capsys)


def test_a_folder_as_it_is_downloaded_holds(folder: Path) -> None:
    for name in (".git", ".cache/huggingface", "notes"):
        (folder / name).mkdir(parents=True)
        (folder / name / "pytorch_model.bin").write_text("a loader does not look here")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    holds, lines = verify(folder)
    assert holds and ".gitattributes: not certified" in lines
    assert not any("notes" in line or "cache" in line for line in lines)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model-2.safetensors", "tf_model.h5", "a.msgpack", "a.CKPT", "adapter_config.json"]
)
def test_weights_that_were_added_do_not_hold(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).write_text("x")
    assert main(["verify-export", str(folder)]) == 1
    assert f"{name}: NOT certified, and a loader may take it" in capsys.readouterr().out


def kept(stated: dict[str, Any]) -> Any:
    return stated["check"]["outputs"]["features"]


DAMAGED: list[Change] = [
    lambda stated: stated.update(exported=None),
    lambda stated: stated.update(check=None),
    lambda stated: stated["check"].update(outputs={}),
    lambda stated: stated["check"].update(outputs=[1]),
    lambda stated: stated["check"].pop("outputs"),
    lambda stated: stated["check"]["outputs"].update(other=kept(stated)),
    lambda stated: stated["exported"].update(form="nonsense"),
    lambda stated: stated["exported"].update(form="huggingface"),
    lambda stated: stated["exported"].update(model=None),
    lambda stated: stated["exported"].update(image_size="24"),
    lambda stated: stated["exported"].update(arguments=[]),
    lambda stated: stated["exported"].update(arguments={"mask_ratio": "x"}),
    lambda stated: stated["exported"].update(norm_eps=[1]),
    lambda stated: stated["exported"].update(outputs=[["features"]]),
    lambda stated: stated["exported"].update(files={}),
    lambda stated: stated["exported"].update(files=[]),
    lambda stated: stated["exported"].update(files={"timm.safetensors": 3}),
    lambda stated: stated["exported"].update(files={"timm.safetensors": {"bytes": 1}}),
    lambda stated: stated["exported"].update(files={"timm.safetensors": {"bytes": 1, "sha256": "no hex"}}),
    lambda stated: stated["exported"]["files"].update({"../a": stated["exported"]["files"]["timm.safetensors"]}),
    lambda stated: kept(stated).pop("sample"),
    lambda stated: kept(stated).update(sample=[]),
    lambda stated: kept(stated)["sample"].pop(),
    lambda stated: kept(stated).update(sample=None),
    lambda stated: kept(stated).update(sample=["x"] * 64),
    lambda stated: kept(stated).update(shape=24),
    lambda stated: kept(stated).update(largest=float("inf")),
]


@pytest.mark.parametrize("change", DAMAGED)
def test_a_damaged_certificate_is_one_line(change: Change, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    restate(file, change)
    assert "timm.safetensors.certificate.json: " in refused(file, capsys)


def test_a_certificate_of_a_folder_lists_what_is_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    restate(folder, lambda stated: stated["exported"]["files"].pop("config.json"))
    assert "certificate.json: is damaged" in refused(folder, capsys)
    restate(folder, lambda stated: stated["exported"].update(form="timm"))
    assert "certifies the format timm, which is no folder" in refused(folder, capsys)


def test_a_statement_that_does_not_fit_the_weights_does_not_hold(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    restate(file, lambda stated: stated["exported"].update(image_size=40))
    assert main(["verify-export", str(file)]) == 1
    assert "cannot be loaded as its certificate says: " in capsys.readouterr().out


def test_the_largest_value_which_scales_the_tolerance_is_compared(file: Path) -> None:
    assert verify(file)[0]
    restate(file, lambda stated: kept(stated).update(largest=1e30))
    assert not verify(file)[0]


def test_tensors_that_transformers_does_not_take_do_not_hold(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["left.over"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    restate(folder, lambda stated: None)
    holds, lines = verify(folder)
    assert not holds and "does not take the tensors" in lines[-1]
