"""One training step of UM-MAE against SimMIM on the same Swin: time per image, and bytes saved for the backward pass.

    python benchmarks/step.py [--ours um_mae_swin_tiny_200e] [--plain um_simmim_swin_tiny_200e] [--json]

Both recipes run forward and backward on the same images, in turn, so that whatever else the machine does falls on
both; the ratio of the medians is what counts. On a CPU in float32, on a GPU in bfloat16. Saved bytes are counted from
the tensors that autograd holds in that very run, weights and images left out.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ummim.masking import MaskPlan, sample_seed
from ummim.methods.api import Method
from ummim.recipe_file import load_recipe


class Subject:
    """A recipe's method on a device, and a micro-batch for it."""

    def __init__(self, name: str, batch: int, device: torch.device) -> None:
        recipe = load_recipe(name)
        size = recipe.data.image_size
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        method = recipe.method.build(size, recipe.partial, recipe.throw_ratio > 0)
        for parameter in method.parameters():
            parameter.data = parameter.data.to(device, dtype)
        for buffer in method.buffers():
            buffer.data = buffer.data.to(device)  # position tables stay float32, as under DeepSpeed
        sampler = recipe.sampler()
        self.name, self.batch, self.device = name, batch, device
        self.method: Method = method
        self.images: Tensor = torch.randn(batch, 3, size, size, device=device)
        self.plans: list[MaskPlan] = [
            sampler.stack([sampler(sample_seed(step, 0, str(i))) for i in range(batch)]).to(device) for step in range(4)
        ]
        self.steps = 0

    def step(self) -> None:
        """Forward and backward, each time under other masks."""
        self.method(self.images, self.plans[self.steps % 4]).loss.backward()
        self.steps += 1
        self.method.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        """Wall time of one step."""
        begun = time.perf_counter()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    def saved_bytes(self) -> int:
        """Bytes that autograd keeps between forward and backward, each storage once."""
        outside = {tensor.untyped_storage().data_ptr() for tensor in self.method.parameters()}
        outside |= {tensor.untyped_storage().data_ptr() for tensor in (*self.method.buffers(), self.images)}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in outside:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.method(self.images, self.plans[0]).loss
        loss.backward()
        self.method.zero_grad(set_to_none=True)
        return sum(saved.values())


def compare(ours: Subject, plain: Subject, rounds: int) -> dict[str, Any]:
    """Times of interleaved steps and saved bytes, per image, and their ratios."""
    for subject in (ours, plain):
        subject.seconds()
    times: dict[str, list[float]] = {ours.name: [], plain.name: []}
    for turn in range(rounds):
        for subject in (ours, plain) if turn % 2 else (plain, ours):
            times[subject.name].append(subject.seconds() / subject.batch)
    rows = {
        subject.name: {
            "seconds_per_image": statistics.median(times[subject.name]),
            "fastest_seconds_per_image": min(times[subject.name]),
            "saved_bytes_per_image": subject.saved_bytes() / subject.batch,
        }
        for subject in (ours, plain)
    }
    ratios = {key: rows[plain.name][key] / rows[ours.name][key] for key in rows[ours.name]}
    return {
        "device": torch.cuda.get_device_name()
        if ours.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "batch": ours.batch,
        "rounds": rounds,
        **rows,
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="UM-MAE against SimMIM, one training step.")
    parser.add_argument("--ours", default="um_mae_swin_tiny_200e", help="recipe of the faster method")
    parser.add_argument("--plain", default="um_simmim_swin_tiny_200e", help="recipe to compare it with")
    parser.add_argument("--batch", type=int, help="images in a step (default 8 on a CPU, 128 on a GPU)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    batch = options.batch or (128 if device.type == "cuda" else 8)
    result = compare(Subject(options.ours, batch, device), Subject(options.plain, batch, device), options.rounds)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['device']}, torch {result['torch']}, batch {batch}, {options.rounds} rounds in turn")
    for name in (options.ours, options.plain):
        row = result[name]
        print(
            f"{name:<28} {row['seconds_per_image'] * 1e3:8.1f} ms/image"
            f" (fastest {row['fastest_seconds_per_image'] * 1e3:.1f})"
            f" {row['saved_bytes_per_image'] / 2**20:8.1f} MiB saved/image"
        )
    ratios = result["ratios"]
    print(
        f"ratios: time {ratios['seconds_per_image']:.2f} (fastest {ratios['fastest_seconds_per_image']:.2f}), "
        f"saved bytes {ratios['saved_bytes_per_image']:.2f}"
    )


if __name__ == "__main__":
    main()
