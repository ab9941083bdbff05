"""Reading recipes: inheritance, overrides, and one clear message for each mistake."""

from pathlib import Path

import pytest

from tests.conftest import TINY_MAE, TINY_UM_MAE
from ummim.errors import RecipeError
from ummim.methods import mae, um_mae
from ummim.recipe_file import dump_recipe, load_recipe, packaged_recipes


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipe_loads_and_survives_its_own_dump(name: str, tmp_path: Path):
    recipe = load_recipe(name)
    assert recipe.description
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path)) == recipe


def test_every_contract_key_stands_in_every_resolved_recipe():
    import yaml

    for name in packaged_recipes():
        values = yaml.safe_load(dump_recipe(load_recipe(name)))
        keys = {"output", "seed", "max_steps", "log_every", "checkpoint_every", "global_batch", "zero_stage",
                "precision", "activation_checkpointing", "throw_ratio"}  # fmt: skip
        assert keys <= values.keys()
        assert {"shards", "workers"} <= values["data"].keys()


def test_child_inherits_and_overrides_its_base():
    base, child = load_recipe("mae_vit_base_800e"), load_recipe("mae_vit_large_800e")
    assert isinstance(child.method, mae.Config)
    assert isinstance(base.method, mae.Config)
    assert (child.method.encoder.embed_dim, child.method.encoder.depth) == (1024, 24)
    assert child.method.decoder == base.method.decoder
    assert (child.name, child.output) == ("mae_vit_large_800e", "runs/mae_vit_large_800e")


def test_base_beside_the_file_comes_first(tmp_path: Path):
    (tmp_path / "quickstart.yaml").write_text(TINY_MAE + "seed: 7\n")
    (tmp_path / "mine.yaml").write_text("base: quickstart\nepochs: 9\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert (recipe.seed, recipe.epochs, recipe.name) == (7, 9, "mine")


def test_another_method_replaces_the_bases_method_section(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("base: mae_vit_base_800e\nmethod: {name: um_mae}\n"
                                     "mask: {kind: uniform}\ndata: {image_size: 256}\n")  # fmt: skip
    assert load_recipe(str(tmp_path / "a.yaml")).method == um_mae.Config()


def test_overrides_are_typed(tmp_path: Path):
    recipe = load_recipe(
        "mae_vit_base_800e",
        ["optim.base_lr=1e-3", "max_steps=5", "data.shards=2024", "output=17", "method.encoder.depth=3", "wandb=null"],
    )
    assert recipe.optim.base_lr == 1e-3
    assert isinstance(recipe.method, mae.Config)
    assert (recipe.max_steps, recipe.method.encoder.depth, recipe.wandb) == (5, 3, None)
    assert (recipe.data.shards, recipe.output) == ("2024", "17")


@pytest.mark.parametrize("off", ["off", "none", "null", "false"])
def test_activation_checkpointing_can_be_switched_off_in_any_spelling(off: str):
    assert load_recipe("um_mae_swin_large_800e", [f"activation_checkpointing={off}"]).activation_checkpointing == "none"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("zero_stag=2", ["command line", "zero_stag", "unknown key", "did you mean zero_stage"]),
        ("method.encoder.embed_dimm=4", ["method.encoder.embed_dimm = 4", "did you mean embed_dim"]),
        ("data.shrds=x", ["data.shrds", "did you mean shards"]),
        ("optim.base_lr=fast", ["optim.base_lr = 'fast'", "expected a float"]),
        ("epochs=0.5", ["epochs = 0.5", "expected an int"]),
        ("epochs=0", ["epochs = 0", "at least 1"]),
        ("zero_stage=4", ["zero_stage = 4", "0, 1, 2, 3"]),
        ("precision=fp8", ["precision = 'fp8'", "bf16"]),
        ("mask.ratio=0", ["mask.ratio", "between 0 and 1"]),
        ("mask.ratio=1", ["mask.ratio", "between 0 and 1"]),
        ("throw_ratio=0.75", ["throw_ratio = 0.75", "below mask.ratio"]),
        ("throw_ratio=-0.1", ["throw_ratio = -0.1", "from 0 to below"]),
        ("throw_ratio=0.001", ["throw_ratio = 0.001", "throws none of 256 tokens"]),
        ("partial.kernel_size=4", ["partial.kernel_size = 4", "odd"]),
        ("partial.kernel_size=1", ["partial.kernel_size = 1", "at least 3"]),
        ("partial={aggregation: convnext, fill: residual}", ["partial.fill = 'residual'", "a whole block"]),
        ("data.image_size=100", ["data.image_size = 100", "multiple of 64", "128"]),
        ("data.crop_scale=[1.0,0.2]", ["data.crop_scale", "smallest <= largest"]),
        ("data.workers=-1", ["data.workers = -1"]),
        ("mask.kind=random", ["mask.kind = 'random'", "um_mae", "uniform"]),
        ("mask.ratio=0.5", ["mask.ratio = 0.5", "0.75"]),
        ("method.encoder.window_size=5", ["method.encoder.window_size = 5", "does not divide", "stage 1"]),
        ("method.encoder.num_heads=[5,6,12,24]", ["method.encoder.num_heads", "5 heads", "96"]),
        ("method.decoder.embed_dim=30", ["method.decoder.embed_dim = 30", "multiple of 4"]),
        ("method.name=maee", ["method.name = 'maee'", "did you mean mae"]),
        ("method.name=os.path", ["method.name = 'os.path'", "no Config"]),
        ("method.name=no.such.module", ["no.such.module", "no such method"]),
        ("optim.warmup_epochs=201", ["optim.warmup_epochs = 201", "epochs = 200"]),
        ("optim.base_lr=0", ["optim.base_lr = 0", "above 0"]),
        ("seed=null", ["seed = None", "must have a value"]),
        ("output=null", ["output = None", "must have a value"]),
        ("seed=-1", ["seed = -1"]),
        ("seed=99999999999999999999", ["seed = 99999999999999999999"]),
        ("data=3", ["data = 3", "section"]),
        ("seed.x=1", ["seed"]),
        ("seed", ["'seed'", "key=value"]),
    ],
)
def test_bad_override_is_refused_with_key_value_and_remedy(override: str, parts: list[str]):
    with pytest.raises(RecipeError) as caught:
        load_recipe("um_mae_swin_tiny_200e", [override])
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("mae_vit_base_800e", "method.encoder.kind=swin", r"kind = 'swin': expected one of \['vit'\]"),
        ("simmim_vit_base_100e", "method.encoder.kind=vit", "no such encoder; use relative_vit or swin or um_"),
        ("simmim_vit_base_100e", "method.encoder.kind=[1]", r"kind = \[1\]: the method has no such encoder"),
        ("simmim_vit_base_100e", "method.encoder.kind=null", "kind = None: the method has no such encoder"),
        ("simmim_vit_base_100e", "method.encoder=pvt", "method.encoder = 'pvt': is a section"),
        ("simmim_swin_tiny_200e", "method.encoder.kind=pvt", "encoder.embed_dim = 96: unknown key of pvt"),
        ("mae_vit_base_800e", "method.encoder.patch_size=0", "patch_size = 0: must be at least 1"),
        ("mae_vit_base_800e", "data.image_size=225", "no multiple of the patch size 16; use 224, say"),
        ("mae_vit_base_800e", "method.encoder.depth=0", "method.encoder.depth = 0: must be at least 1"),
        ("mae_vit_base_800e", "method.decoder.depth=-1", "method.decoder.depth = -1: must be at least 1"),
        ("mae_vit_base_800e", "method.encoder.mlp_ratio=-4", "method.encoder.mlp_ratio = -4"),
        ("simmim_swin_tiny_200e", "method.encoder.depths=[2,2,0,2]", r"depths = \[2, 2, 0, 2\]: must be at least 1"),
        ("green_mim_swin_base_200e", "method.encoder.window_size=5", "of stage 1; choose a divisor of 56"),
        ("green_mim_swin_base_200e", "method.encoder.drop_path=1.5", "drop_path = 1.5: is a chance"),
        ("green_mim_swin_base_200e", "compile=true", "compile = True: .*set it to false"),
        ("local_mim_vit_base_100e", "method.taps=[0,1,2]", r"taps = \[0, 1, 2\]: expected a tuple with 4 elements$"),
        ("local_mim_vit_base_100e", "method.taps=[0,1,2,12]", "the encoder's 12 blocks: give others, from 0 to 11"),
        ("local_mim_vit_base_100e", "max_steps=fast", "command line: max_steps = 'fast': expected an int$"),
    ],
)
def test_sizes_and_kinds_that_a_method_cannot_have_are_refused(recipe: str, override: str, message: str):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, [override])


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("green_mim_swin_base_200e", ["mask.shared_by=300"], "= 300: must divide global_batch = 4096; use 256"),
        ("green_mim_swin_base_200e", ["mask.shared_by=8192"], "must divide global_batch = 4096; use 4096"),
        ("green_mim_swin_base_200e", ["mask.shared_by=0"], "shared_by = 0: must divide global_batch = 4096; use 1"),
        ("green_mim_swin_base_200e", ["mask.shared_by=1"], "shared_by = 1: green_mim computes one mask for a whole"),
        ("mae_vit_base_800e", ["mask.shared_by=3"], "mask.shared_by = 3: must divide"),
        ("simmim_vit_base_100e", ["mask.unit=3"], "unit = 3: units of 3 tokens .* grid 14x14; choose a smaller one"),
        ("simmim_vit_base_100e", ["mask.unit=0"], "mask.unit = 0: units of 0 tokens"),
        ("simmim_vit_base_100e", ["mask.unit=14"], "mask.unit = 14: ratio 0.6 leaves 0 of 196 tokens"),
        ("um_mae_swin_tiny_200e", ["mask.unit=2"], "mask.unit = 2: units of 2 tokens do not tile a uniform mask"),
        ("um_mae_swin_tiny_200e", ["mask.secondary_ratio=0.999"], "secondary_ratio = 0.999: .*choose a smaller one"),
        ("um_mae_vit_base_200e", ["data.image_size=240"], "mask.kind = 'uniform': .* even grid .*another data.im"),
        ("mae_vit_base_800e", ["data.image_size=16"], "mask.ratio = 0.75: .*a larger data.image_size"),
        ("amt_simmim_vit_base_200e", ["mask.kind=uniform", "mask.ratio=0.75"], "amt cannot train under a uniform mask"),
    ],
)
def test_masks_that_the_token_grid_cannot_hold_name_the_key_at_fault(recipe: str, overrides: list[str], message: str):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, overrides)


def test_secondary_masking_is_refused_where_no_token_exists_for_it():
    with pytest.raises(RecipeError, match=r"mask.secondary_ratio = 0.25: mae has no token"):
        load_recipe("mae_vit_base_800e", ["mask.secondary_ratio=0.25"])


def test_partial_reconstruction_is_refused_by_a_method_without_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mae.Config, "partial_reconstruction", False)
    with pytest.raises(RecipeError, match=r"throw_ratio = 0.5: mae has no partial reconstruction"):
        load_recipe("pr_mae_vit_base_800e")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: [", ["mine.yaml", "not valid YAML"]),
        ("- 1", ["mine.yaml", "mapping"]),
        ("", ["mine.yaml", "mapping"]),
        ("base: mine", ["mine.yaml", "inherits from itself"]),
        ("base: no_such_recipe", ["no_such_recipe", "no packaged recipe"]),
        ("seed: 1\nseed: 2", ["mine.yaml", "line 2", "seed is given twice"]),
        ("base: quickstart\nseed: x", ["mine.yaml: seed = 'x'"]),
        ("data: {shards: x}", ["mine.yaml", "method.name is missing"]),
        ("method: {name: mae}", ["mine.yaml", "data"]),
        ("!!python/object/apply:os.system ['true']", ["mine.yaml", "not valid YAML"]),
    ],
)
def test_bad_file_is_refused_by_name(text: str, parts: list[str], tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    for part in parts:
        assert part in str(caught.value)


def test_mistyped_recipe_name_gets_the_nearest_one():
    with pytest.raises(RecipeError, match="did you mean quickstart"):
        load_recipe("quikstart")
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe("missing.yaml")


def test_key_that_went_with_the_bases_method_is_not_blamed_on_the_base(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: local_mim_vit_base_1600e\nmethod: {name: local_mim, encoder: {depth: 4}}\n")
    with pytest.raises(RecipeError, match=f"^{path}: method.taps: .* the default, are not four ascending indices"):
        load_recipe(str(path))


def test_error_names_the_file_that_set_the_key(tmp_path: Path):
    (tmp_path / "parent.yaml").write_text(TINY_UM_MAE.replace("[1, 2, 4, 8]", "[3, 2, 4, 8]"))
    (tmp_path / "child.yaml").write_text("base: parent\nseed: 3\n")
    with pytest.raises(RecipeError, match=r"parent.yaml: method.encoder.num_heads"):
        load_recipe(str(tmp_path / "child.yaml"))
