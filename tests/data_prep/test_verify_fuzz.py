"""Random damage to a small folder of shards: all of it is found, and none of it ends in a traceback."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.index import sealed
from tests.data_prep.tars import labelled, members_of, run, write_tar

ROUNDS = 30  # of each kind of damage
Damage = Callable[[random.Random, Path], None]


def truncate(rng: random.Random, folder: Path) -> None:
    path = rng.choice(files(folder))
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip_a_byte_of_a_shard(rng: random.Random, folder: Path) -> None:
    flip(rng, rng.choice(sorted(folder.glob("*.tar"))))


def flip_a_byte_of_a_header(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.glob("*.tar")))
    content = path.read_bytes()
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    flip(rng, path, rng.choice(headers), 512)


def flip_a_byte_of_the_index(rng: random.Random, folder: Path) -> None:
    flip(rng, folder / "index.json")


def flip_a_byte_of_the_table(rng: random.Random, folder: Path) -> None:
    flip(rng, folder / "index.npy")


def flip_a_byte_of_the_table_s_header(rng: random.Random, folder: Path) -> None:
    flip(rng, folder / "index.npy", 0, 200)


def flip_a_byte_of_the_classes(rng: random.Random, folder: Path) -> None:
    flip(rng, folder / "classes.txt")


def swap_two_members(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.glob("*.tar")))
    members = members_of(path)
    a, b = rng.sample(range(len(members)), 2)
    members[a], members[b] = members[b], members[a]
    write_tar(path, members)


def swap_two_members_contents(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.glob("*.tar")))
    members = members_of(path)
    a, b = rng.choice([(a, b) for a, (_, x) in enumerate(members) for b, (_, y) in enumerate(members) if x != y])
    members[a], members[b] = (members[a][0], members[b][1]), (members[b][0], members[a][1])
    write_tar(path, members)


def delete_a_member(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.glob("*.tar")))
    members = members_of(path)
    del members[rng.randrange(len(members))]
    write_tar(path, members)


def cut_out_some_bytes(rng: random.Random, folder: Path) -> None:
    path = rng.choice(files(folder))
    content = path.read_bytes()
    start = rng.randrange(len(content) - 1)
    path.write_bytes(content[:start] + content[start + rng.randrange(1, 2000) :])


def delete_a_file(rng: random.Random, folder: Path) -> None:
    rng.choice(files(folder)).unlink()


def copy_a_shard_over_another(rng: random.Random, folder: Path) -> None:
    a, b = rng.sample(sorted(folder.glob("*.tar")), 2)
    shutil.copy(a, rng.choice([b, folder / "more.tar"]))


def edit_the_index(rng: random.Random, folder: Path) -> None:
    """Another value for a field, made with care: the index's own checksum is right again."""
    content = json.loads((folder / "index.json").read_text())
    del content["index_sha256"]
    place = rng.choice([content, content, rng.choice(content["shards"])])
    name = rng.choice([name for name in place if name not in ("source", "rules")])  # nothing depends on these two
    values = ["", "x", -1, 0, 7, 2**70, 1.5, True, None, [], {}, [{}], [None], "../x.tar", "a" * 64]
    place[name] = rng.choice(
        [value for value in values if value != place[name] or type(value) is not type(place[name])]
    )
    (folder / "index.json").write_bytes(sealed(content))


DAMAGES = [
    truncate,
    flip_a_byte_of_a_shard,
    flip_a_byte_of_a_header,
    flip_a_byte_of_the_index,
    flip_a_byte_of_the_table,
    flip_a_byte_of_the_table_s_header,
    flip_a_byte_of_the_classes,
    swap_two_members,
    swap_two_members_contents,
    delete_a_member,
    cut_out_some_bytes,
    delete_a_file,
    copy_a_shard_over_another,
    edit_the_index,
]


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def flip(rng: random.Random, path: Path, start: int = 0, length: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    at = start + rng.randrange(min(length or len(content), len(content) - start))
    content[at] ^= rng.randrange(1, 256)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage: Damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = labelled(tmp_path / "whole", each=2)
    assert run("verify", whole) == 0
    for seed in range(ROUNDS):
        broken = Path(shutil.copytree(whole, tmp_path / f"{seed}"))
        damage(random.Random(f"{damage.__name__} {seed}"), broken)
        capsys.readouterr()
        for options in ([], ["--fast"]):
            assert run("verify", broken, *options) == 2, seed
            output = capsys.readouterr()
            assert output.out.strip(), seed
            assert output.err.count("\n") == 1, seed
        assert run("index", broken) in (0, 2), seed
