"""``ummim capacity`` as a user meets it, and what must hold of its numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_MAE
from ummim.__main__ import main
from ummim.capacity.activations import Activations
from ummim.capacity.communication import Collective, collectives, seconds
from ummim.capacity.gpus import GPUS, Assumptions
from ummim.capacity.memory import rank_memory
from ummim.capacity.states import StateBytes, state_bytes
from ummim.capacity.strategy import Shapes, Strategy
from ummim.capacity.throughput import step_time
from ummim.run_plan import RunPlan

MODEL = Shapes(((1_000,) * 10, (100_000,) * 10), (), 0)
CONFIG: dict[str, Any] = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 50_000_000}
ZERO_2 = Strategy.of({"zero_optimization": CONFIG, "data_types": {"grad_accum_dtype": "fp32"}}, "bf16")
IMAGE = Activations(saved=50e6, working=10e6, host=0, forward_flops=40e9, flops=120e9, operators=1_000)
PLAN = RunPlan(8, 512, 64, 1, 2_500, 2_000_000, 2_000_000, 0, 1e-3)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["capacity", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY_MAE.replace("SHARDS", "nowhere"))
    return str(path)


def test_report_is_consistent(tiny: str, capsys: pytest.CaptureFixture[str]):
    options = ["--nodes", "2", "--gpus-per-node", "2", "--gpu", "a100-40", "--price-per-gpu-hour", "2", "--json"]
    code, out, _ = run(capsys, tiny, "epochs=100", "expected_samples=1000", *options)
    values = json.loads(out)
    memory, step, duration = values["memory"], values["step"], values["run"]
    assert code == 0 and memory["fits"] and memory["available"] == 40e9
    assert memory["total"] <= sum(memory["components"].values()) + memory["update"]
    parts = ("compute", "exposed", "offload", "straggling")
    assert step["total"] == pytest.approx(sum(step[part] for part in parts))
    assert step["images_per_second"] == pytest.approx(8 / step["total"])
    assert [row["nodes"] for row in values["scaling"]] == [1, 2]
    assert values["scaling"][-1]["images_per_second"] == pytest.approx(step["images_per_second"])
    assert duration["images"] == 100 * 1000 and duration["price"] == pytest.approx(2 * duration["gpu_hours"])
    assert duration["gpu_hours"] == pytest.approx(duration["days"] * 24 * 4)
    assert duration["days"] * 86400 > 100 * 125 * step["total"]
    assert set(values["largest_micro_batch"]) == {"0", "1", "2", "3"}


def test_text_says_that_it_is_a_calculation_and_what_it_assumes(tiny: str, capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, tiny, "--gpus-per-node", "1", "--gpu", "H100")
    assert code == 0
    for part in ("nothing was run", "Assumed: 20%", "CUDA context (assumed)", "mtbf_hours", "Young", "data workers"):
        assert part in out, part


def test_a_measured_rate_takes_the_place_of_the_assumed_efficiency(tiny: str, capsys: pytest.CaptureFixture[str]):
    options = ["--gpus-per-node", "1", "--gpu", "H100", "--step-noise", "0", "--measured-images-per-second", "300"]
    code, out, _ = run(capsys, tiny, *options, "--json")
    assert code == 0
    values = json.loads(out)
    assert values["cluster"]["efficiency"] == "measured"
    assert values["step"]["images_per_second"] == pytest.approx(300)


def test_a_model_that_does_not_fit_gets_advice(tiny: str, capsys: pytest.CaptureFixture[str]):
    options = ["global_batch=64", "micro_batch=64", "--gpus-per-node", "1", "--context-gib", "0", "--gpu", "H100"]
    _, out, _ = run(capsys, tiny, *options, "--json")
    needed = json.loads(out)["memory"]["total"]
    code, out, _ = run(capsys, tiny, *options, "--gpu-memory", str(needed * 0.999 / 1e9))
    assert code == 0
    assert "DOES NOT FIT" in out and "- micro_batch=6" in out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--gpu", "H1000"], "known are V100"),
        ([], "--gpu: name one of"),
        (["--gpu", "H100", "--nodes", "0"], "give at least 1"),
        (["--gpu", "H100", "--efficiency", "35"], "--efficiency 35: is a share"),
        (["--gpu", "H100", "--step-noise", "1e+15"], "--step-noise 1e+15: is a share"),
        (["--gpu", "H100", "--efficiency", "1e-300"], "--efficiency 1e-300: choose a number of at least 1e-09"),
        (
            ["--gpu", "H100", "--gpus-per-node", "1", "--gpu-tflops", "1e-9", "--efficiency", "1e-6"],
            "a step of the global batch takes",
        ),
        (["--gpu", "H100", "--gpus-per-node", "2", "--link-microseconds", "1e15"], "a step of the global batch takes"),
        (["--gpu", "H100", "--mtbf-hours", "0"], "--mtbf-hours 0: choose a positive number"),
        (["--gpu", "H100", "--gpu-memory", "-1"], "--gpu-memory -1"),
        *(
            (["--gpu", "H100", option, value], f"{option} {value}: choose a number of at most 1e+15")
            for option in (
                "--mtbf-hours",
                "--loader-images",
                "--network-gbits",
                "--storage-gbytes",
                "--price-per-gpu-hour",
                "--gpu-tflops",
            )
            for value in ("inf", "nan", "1e+300")
        ),
        (["--gpu", "H100", "--gpus-per-node", "1", "--mtbf-hours", "0.001"], "nothing would be trained"),
        (["--gpu", "H100", "--gpus-per-node", "3"], "global_batch = 8: 3 ranks do not divide it"),
        (["precision=bf16", "--gpu", "V100", "--gpus-per-node", "1"], "a V100 cannot; use fp16"),
        (["--gpu", "H100", "--gpus-per-node", "1", "--measured-images-per-second", "1e12"], "of the GPU's peak"),
    ],
)
def test_users_mistake_is_one_line(tiny: str, arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]):
    code, out, err = run(capsys, tiny, *arguments)
    assert code == 2 and not out
    assert part in err and len(err.strip().splitlines()) == 1


def test_an_interval_beyond_all_failures_loses_everything(tiny: str, capsys: pytest.CaptureFixture[str]):
    words = ["checkpoint_every=1000000000", "--gpus-per-node", "1", "--gpu", "H100", "--json", "--mtbf-hours", "0.5"]
    code, out, _ = run(capsys, tiny, *words)
    assert code == 0 and json.loads(out)["checkpoints"]["recipe_overhead"] == 1


def test_the_greatest_numbers_are_calculated_with(tiny: str, capsys: pytest.CaptureFixture[str]):
    words = ["--gpus-per-node", "1", "--gpu", "H100", "--json", "--mtbf-hours", "1e15", "--network-gbits", "1e15"]
    code, out, _ = run(capsys, tiny, *words)
    assert code == 0 and "Infinity" not in out and "NaN" not in out


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    def memory(images: int):
        return rank_memory(MODEL, 100_000, ZERO_2, IMAGE, images, 224, 8, 16e9, Assumptions())

    most = memory(1).largest_micro_batch
    assert memory(most).fits and not memory(most + 1).fits
    assert rank_memory(MODEL, 100_000, ZERO_2, IMAGE, 1, 224, 8, 2e9, Assumptions()).largest_micro_batch == 0


def test_offload_leaves_the_gpu_to_weights():
    zero = {**CONFIG, "offload_optimizer": {"device": "cpu"}}
    moved = Strategy.of({"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}, "bf16")
    state = state_bytes(MODEL, moved, 8)
    assert state == StateBytes(MODEL.trainable * 2, 0, 0, 0, host=MODEL.trainable * 16 // 8)


def test_a_disk_takes_the_state_and_time_and_leaves_buffers_on_the_host():
    zero = {**CONFIG, "stage": 3, "sub_group_size": 10**6, "offload_optimizer": {"device": "nvme"}}
    config = {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}
    model = Shapes(((1_000,) * 10, (4_000_000,) * 10), (), 0)
    state = state_bytes(model, Strategy.of(config, "bf16"), 8)
    assert (state.gradients, state.optimizer) == (0, 0)
    assert state.disk == 5 * (12 * 3907 * 256 + 2 * 4 * 1953 * 256)  # five sub-groups of two parameters, 500,000 each
    kept, locked = 16 * 1250 + 5 * 2 * 4 * (500_000 - 1953 * 256), 4 * 4 * 3907 * 256
    assert state.host == model.trainable * 4 // 8 + kept + locked
    gpu, assumed = GPUS["H100"], Assumptions(step_noise=0)
    there, here = (step_time(IMAGE, PLAN, [], 1e9, 1, gpu, gpu.half_flops, assumed, on_disk=b) for b in (3e9, 0))
    assert there.offload - here.offload == pytest.approx(2 * 3e9 * PLAN.world_size / 3e9)


def test_slower_networks_and_more_nodes_cost_time():
    reduced = Collective("all-reduce", "step", 10**9, 1)
    gpu, assumed = GPUS["H100"], Assumptions()
    inside = seconds(reduced, 1, 8, gpu, assumed)
    assert inside == pytest.approx(2 * 7 / 8 * 1e9 / (450e9 * 0.8) + 2 * 3 * 3e-6)
    between = seconds(reduced, 4, 8, gpu, assumed)
    assert between == pytest.approx(2 * 31 / 32 * 1e9 / (400e9 * 0.8) + 2 * (3 * 3e-6 + 2 * 10e-6))
    assert seconds(reduced, 4, 8, replace(gpu, network=10e9), assumed) > 30 * between


def test_overlap_hides_communication_but_for_the_last_bucket():
    gpu, assumed = GPUS["H100"], Assumptions(step_noise=0)
    found = [Collective("all-reduce", "backward", 10**9, 10, overlaps=True)]
    took = seconds(found[0], 1, 8, gpu, assumed)
    hidden = step_time(IMAGE, PLAN, found, 0, 1, gpu, gpu.half_flops, assumed)
    waited = step_time(IMAGE, PLAN, [replace(found[0], overlaps=False)], 0, 1, gpu, gpu.half_flops, assumed)
    assert hidden.exposed == pytest.approx(took / 10) and waited.exposed == pytest.approx(took)
    assert hidden.compute == pytest.approx(120e9 * 64 / (989e12 * assumed.efficiency))
    tiny = step_time(IMAGE, replace(PLAN, micro_batch=1), [], 0, 1, gpu, gpu.half_flops, assumed)
    assert tiny.compute == pytest.approx(1_000 * 5e-6)  # bound by launching its operators


def test_stage_2_reduces_at_every_micro_batch():
    once, four = (collectives(MODEL, ZERO_2, 8, accumulation) for accumulation in (1, 4))
    assert sum(c.size * c.passes for c in four if c.kind == "all-reduce") == 4 * MODEL.trainable * 2
    assert sum(c.size * c.passes for c in once if c.kind == "all-gather") == MODEL.trainable * 2
    assert collectives(MODEL, ZERO_2, 1, 4) == []


def test_documented_keys_are_those_of_the_report(tiny: str, capsys: pytest.CaptureFixture[str]):
    _, out, _ = run(capsys, tiny, "--gpus-per-node", "1", "--gpu", "H100", "--json")
    page = (Path(__file__).parents[2] / "docs/scaling.md").read_text()
    for key in json.loads(out):
        assert f"`{key}`" in page, key
    for name in GPUS:
        assert name in page, name
