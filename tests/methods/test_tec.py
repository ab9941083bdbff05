"""TEC's fast path against TEC written plainly, its teacher's stillness, and its sizes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.methods.plain_tec import plain_lesson, plain_tec
from ummim.backbones.teacher import TeacherConfig
from ummim.backbones.vit import ViT, ViTConfig
from ummim.engine.optim import OptimConfig, build_optimizer
from ummim.errors import RecipeError
from ummim.masking import MaskConfig, MaskPlan, PlanSampler
from ummim.methods.tec import TEC, Config, attention_loss, feature_loss
from ummim.nn.aggregation import PartialConfig
from ummim.nn.decoder import DecoderConfig
from ummim.recipe_file import dump_recipe, load_recipe

# timm's smallest plain ViT (64 wide, 2 heads, 6 blocks, patches of 16) teaches a student of other depth.
SMALL = Config(
    ViTConfig(patch_size=16, embed_dim=64, depth=3, num_heads=2),
    DecoderConfig(embed_dim=16, depth=2, num_heads=4),
    TeacherConfig("test_vit", "untrained", layers=2, top_k=3, temperature=1.8),
)
SIDE = 64  # a grid of 4 x 4


def job(
    config: Config = SMALL, throw: float = 0.0, mask: MaskConfig | None = None
) -> tuple[TEC, torch.Tensor, MaskPlan]:
    torch.manual_seed(0)
    model = config.build(SIDE, PartialConfig(kernel_size=3), throw > 0).double()
    for parameter in model.parameters():  # no zero biases: they would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    for name, weight in model.teacher.named_buffers():  # likewise, and nearly linear attention would too
        torch.nn.init.normal_(weight, mean=float("norm" in name and "weight" in name), std=0.1)
    sampler = PlanSampler(model.grid, mask or MaskConfig(), throw)
    plan = sampler.stack([sampler(seed) for seed in range(3)])
    return model, torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64), plan


def plain(model: TEC, images: torch.Tensor, plan: MaskPlan, config: Config = SMALL) -> tuple[torch.Tensor, ...]:
    masked = plan.mask()
    return plain_tec(model, images, masked, torch.zeros_like(masked).scatter(1, plan.thrown, True), config)


@pytest.mark.parametrize(("scale", "attention_pass"), [("width", "thrown"), ("head", "whole")])
@pytest.mark.parametrize(
    ("mask", "throw"),
    [
        (MaskConfig(), 0.0),
        (MaskConfig(), 0.5),
        (MaskConfig("random", 0.6), 0.3),
        (MaskConfig("uniform"), 0.25),  # visible tokens come in block order
    ],
)
def test_equals_the_plain_implementation(
    mask: MaskConfig, throw: float, scale: Literal["width", "head"], attention_pass: Literal["thrown", "whole"]
) -> None:
    config = replace(SMALL, attention_scale=scale, attention_pass=attention_pass)
    model, images, plan = job(config, throw, mask)
    feature, attention, features, logits = plain(model, images, plan, config)
    found: list[torch.Tensor] = []
    model.attention_head.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    output = model(images, plan)
    torch.testing.assert_close(output.loss, feature + attention, rtol=1e-11, atol=0)
    masked = plan.mask()
    torch.testing.assert_close(output.prediction[masked], features[masked], rtol=1e-9, atol=1e-9)
    assert output.prediction[~masked].eq(0).all()
    lesson = model.teacher(images, torch.float64)
    torch.testing.assert_close(feature_loss(output.predicted, lesson.features, output.ids), feature)
    torch.testing.assert_close(found[0], logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(attention_loss(found[0], lesson.attention, config.teacher.temperature), attention)


@pytest.mark.parametrize("throw", [0.0, 0.5])
def test_gradients_equal_the_plain_implementations(throw: float) -> None:
    model, images, plan = job(throw=throw)
    feature, attention, *_ = plain(model, images, plan)
    losses = (model(images, plan).loss, feature + attention)
    fast, slow = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("layers", "top_k"), [(1, 1), (2, 3), (6, 16)])
def test_the_teacher_equals_one_written_plainly(layers: int, top_k: int) -> None:
    model, images, _ = job(replace(SMALL, teacher=replace(SMALL.teacher, layers=layers, top_k=top_k)))
    lesson = model.teacher(images, torch.float64)
    expected = [
        torch.stack(each) for each in zip(*(plain_lesson(model.teacher, image) for image in images), strict=True)
    ]
    assert lesson.attention.shape == (3, 2, 1 + top_k, 16)
    for found, plain_one in zip(lesson, expected, strict=True):
        torch.testing.assert_close(found, plain_one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("attention_pass", "partial", "attended"),
    [
        ("thrown", PartialConfig(), 16 - 8),
        ("whole", PartialConfig(), 16),
        ("thrown", PartialConfig("none"), 16),  # nothing would fill the missing keys in
    ],
)
def test_thrown_tokens_leave_both_passes_or_the_feature_pass_only(
    attention_pass: Literal["thrown", "whole"], partial: PartialConfig, attended: int
) -> None:
    model = replace(SMALL, attention_pass=attention_pass).build(SIDE, partial, True)
    _, images, plan = job(throw=0.5)
    lengths: list[int] = []
    model.decoder.register_forward_hook(lambda _module, _inputs, output: lengths.extend(x.shape[1] for x in output))
    assert model(images.float(), plan).loss.isfinite()
    assert lengths == [1 + 16 - 8, 1 + attended]


def test_the_teacher_sees_whole_images_and_the_student_visible_patches() -> None:
    model, images, plan = job()
    hidden = plan.mask().view(3, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    torn = images.masked_fill(hidden, float("nan"))
    assert model(torn, plan).predicted.isfinite().all()
    assert model(torn, plan).loss.isnan()


def test_training_leaves_the_teacher_as_it_is() -> None:
    model, images, plan = job(throw=0.5)
    before = {name: weight.clone() for name, weight in model.teacher.named_buffers()}
    lesson = model.teacher(images, torch.float64)
    assert not list(model.teacher.parameters())
    optimizer = build_optimizer(model, OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    model.train()
    assert not any(module.training for module in model.teacher.modules())
    losses = []
    for _ in range(5):
        loss = model(images, plan).loss
        loss.backward()
        assert not any(weight.requires_grad for weight in model.teacher.buffers())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, weight in model.teacher.named_buffers():
        assert weight.equal(before[name]), name
    for first, again in zip(lesson, model.teacher(images, torch.float64), strict=True):
        assert first.equal(again)


def test_the_teacher_is_in_no_state_dict_and_moves_with_the_module() -> None:
    model = SMALL.build(SIDE, PartialConfig(), False)
    assert not any(key.startswith("teacher.") for key in model.state_dict())
    assert sum(weight.numel() for weight in model.teacher.buffers()) > 200_000
    assert {weight.dtype for weight in model.double().teacher.buffers()} == {torch.float64}
    assert all(weight.is_meta for weight in model.to("meta").teacher.buffers())
    other = SMALL.build(SIDE, PartialConfig(), False)  # of other random weights
    other.load_state_dict(SMALL.build(SIDE, PartialConfig(), False).state_dict())


def test_in_16_bits_the_teacher_keeps_its_weights_and_the_loss_is_float32() -> None:
    model = SMALL.build(SIDE, PartialConfig(), False)
    for parameter in model.parameters():  # as the engine does: buffers stay float32
        parameter.data = parameter.data.bfloat16()
    sampler = PlanSampler(model.grid, MaskConfig(), 0.0)
    images, plan = torch.randn(2, 3, SIDE, SIDE), sampler.stack([sampler(seed) for seed in range(2)])
    output = model(images, plan)
    output.loss.backward()
    assert (output.loss.dtype, output.predicted.dtype) == (torch.float32, torch.bfloat16)
    exact, low = (model.teacher(images, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert low.features.dtype == low.attention.dtype == torch.float32
    torch.testing.assert_close(low.features, exact.features, rtol=0.05, atol=0.05)
    assert not low.features.equal(exact.features)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_logits_and_losses_are_float32(dtype: torch.dtype) -> None:
    model, images, plan = job()
    model, images = model.float(), images.float()
    seen: list[torch.Tensor] = []
    model.attention_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model.teacher.register_forward_hook(lambda _module, _inputs, output: seen.extend((output[0], output[2])))
    with torch.autocast("cpu", dtype):
        output = model(images, plan)
        features, taught, logits = seen
        losses = feature_loss(output.predicted, features, output.ids), attention_loss(logits, taught, 1.8)
    assert {each.dtype for each in (*seen, *losses, output.loss)} == {torch.float32}
    exact = model(images, plan).loss
    torch.testing.assert_close(output.loss, exact, rtol=2e-4, atol=0)  # 2e-3 off with logits in bfloat16


def test_the_target_is_standardised_per_sample_and_channel_over_all_patches() -> None:
    """By the mean and the unbiased variance, plus 1e-6, of visible and masked patches alike (TEC, official code)."""
    torch.manual_seed(0)
    features = 1e-3 * torch.randn(2, 5, 3, dtype=torch.float64) + torch.arange(3)  # small: 1e-6 counts
    features[1] *= 7  # a sample's own scale
    ids = torch.tensor([[0, 3], [4, 1]])
    predicted = torch.randn(2, 2, 3, dtype=torch.float64)
    total = 0.0
    for b in range(2):
        for channel in range(3):
            values = features[b, :, channel].tolist()
            mean = sum(values) / 5
            deviation = (sum((value - mean) ** 2 for value in values) / 4 + 1e-6) ** 0.5
            for n, patch in enumerate(ids[b].tolist()):
                total += (predicted[b, n, channel].item() - (values[patch] - mean) / deviation) ** 2
    assert feature_loss(predicted, features, ids).item() == pytest.approx(total / 12, rel=1e-12)


def test_attention_is_taught_by_softened_logits_over_all_keys() -> None:
    logits, taught = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    q = torch.tensor([[1 / (1 + math.e), math.e / (1 + math.e)], [0.5, 0.5]])  # at temperature 2
    expected = -(q * (logits.exp() / logits.exp().sum(1, keepdim=True)).log()).sum(1).mean()
    torch.testing.assert_close(attention_loss(logits, taught, 2.0), expected)


def test_the_backbone_is_a_plain_vit_that_computes_the_same() -> None:
    model, images, _ = job()
    plain_vit = model.backbone()
    assert type(plain_vit) is ViT
    assert not any("cls_token_mlp" in key for key in plain_vit.state_dict())
    torch.testing.assert_close(plain_vit(images), model.encoder(images))
    assert not plain_vit.cls_token.equal(model.encoder.cls_token)


def test_fresh_weights_are_maes() -> None:
    model = SMALL.build(SIDE, PartialConfig(), False)
    for token in (model.encoder.cls_token, model.feature_embed.mask_token, model.attention_embed.mask_token):
        assert 0 < token.abs().max() < 0.1
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith("teacher."):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
            assert module.bias.eq(0).all(), name


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"encoder": replace(SMALL.encoder, depth=4)}, "method.encoder.depth", "multiple of 3"),
        ({"encoder": replace(SMALL.encoder, num_heads=3)}, "method.encoder.num_heads", "3 heads"),
        ({"encoder": replace(SMALL.encoder, patch_size=15)}, "data.image_size", "patch size 15"),
        ({"decoder": DecoderConfig(18, 1, 2)}, "method.decoder.embed_dim", "multiple of 4"),
        ({"teacher": replace(SMALL.teacher, top_k=17)}, "method.teacher.top_k", "1 and the 16 patches"),
        ({"teacher": replace(SMALL.teacher, layers=0)}, "method.teacher.layers", "at least 1"),
        ({"teacher": replace(SMALL.teacher, temperature=0.0)}, "method.teacher.temperature", "above 0"),
        ({"teacher": replace(SMALL.teacher, checkpoint="")}, "method.teacher.checkpoint", "name the file .* untrained"),
    ],
)
def test_sizes_that_do_not_fit_name_the_key(change: dict, key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        replace(SMALL, **change).check(SIDE, MaskConfig(), 0.0)
    assert error.value.key == key


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"checkpoint": "/nowhere/a.pth"}, "checkpoint", "'/nowhere/a.pth': cannot be read: No such file .*; name the"),
        ({"name": "vit_basic"}, "name", "'vit_basic': timm has no such model"),
        ({"name": "resnet18"}, "name", "cannot build|no plain ViT"),
        ({"name": "test_vit3"}, "name", "no plain ViT with one class token|cannot build"),
        ({"name": "vit_tiny_patch16_224"}, "name", "has width 192, 3 heads"),
        ({"layers": 7}, "layers", "= 7: test_vit has only 6 blocks"),
    ],
)
def test_a_teacher_that_cannot_teach_is_one_message(change: dict, key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        replace(SMALL, teacher=replace(SMALL.teacher, **change)).build(SIDE, PartialConfig(), False)
    assert error.value.key == f"method.teacher.{key}"
    assert str(error.value).startswith(f"method.teacher.{key} = ")


def test_without_memory_no_file_is_read() -> None:
    config = replace(SMALL, teacher=replace(SMALL.teacher, checkpoint="/nowhere/ibot.pth"))
    with torch.device("meta"):
        model = config.build(SIDE, PartialConfig(), True)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.teacher.buffers()))
    assert not any(tensor.is_meta for tensor in config.for_inference().build(SIDE, PartialConfig(), True).parameters())


def test_the_recipes_are_the_official_ones(tmp_path: Path) -> None:
    teachers = {}
    for name in ("tec_vit_base_300e", "tec_vit_base_mae_teacher_300e", "pr_tec_vit_base_300e"):
        recipe = load_recipe(name)
        assert isinstance(recipe.method, Config)
        assert (recipe.seed, recipe.epochs, recipe.method.attention_scale) == (5, 300, "width")
        teachers[name] = recipe.method.teacher
        (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
        assert load_recipe(str(tmp_path / "again.yaml")) == recipe
    ibot, mae, partial = teachers.values()
    assert (ibot.top_k, ibot.temperature, ibot.layers) == (9, 1.0, 2)
    assert (mae.top_k, mae.temperature, mae.layers) == (15, 1.8, 2)
    assert partial == ibot
    assert load_recipe("pr_tec_vit_base_300e").throw_ratio == 0.5
