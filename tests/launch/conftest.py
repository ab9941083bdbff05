"""Hosts made of namespaces for the tests that need them, and something for them to train on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main as data_prep
from tests.conftest import TINY_MAE
from tests.launch import slurm
from tests.launch.hosts import Hosts, why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_hosts = [item for item in items if item.get_closest_marker("namespaces")]
    on_slurm = [item for item in on_hosts if "slurm" in getattr(item, "fixturenames", ())]
    for marked, why in ((on_hosts, why_not), (on_slurm, slurm.why_not)):
        if marked and (reason := why()):
            print(f"\ntests/launch: {len(marked)} tests skipped: {reason}")
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three hosts that share their files; a test leaves nothing running on them."""
    with Hosts(tmp_path_factory.mktemp("hosts"), 3) as made:
        yield made


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 small pictures in four shards."""
    return build_shards(tmp_path_factory.mktemp("data"), seed=0)


def build_shards(folder: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    (folder / "pictures").mkdir()
    for i in range(26):
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((48, 48), Image.Resampling.BICUBIC).save(folder / "pictures" / f"{i:02d}.jpg")
    arguments = ["build", str(folder / "pictures"), str(folder / "shards"), "--shard-count", "7", "--workers", "1"]
    assert data_prep(arguments) == 0
    return folder / "shards"


@pytest.fixture(scope="session")
def recipe(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty steps of six images, which two and three ranks divide; saved only at the end."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    values = {
        "epochs: 4": "epochs: 10",
        "_batch: 8": "_batch: 6",
        "_every: 4": "_every: 1000",
        "figure_every: 2": "figure_every: 0",
    }
    text = TINY_MAE.replace("SHARDS", str(shards))
    for old, new in values.items():
        text = text.replace(old, new)
    path.write_text(text)
    return path
