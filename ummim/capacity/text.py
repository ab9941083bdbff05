"""A report of ``ummim capacity`` as text."""

from __future__ import annotations

from typing import Any

from ummim.capacity.strategy import GIB


def text(values: dict[str, Any]) -> str:
    """The report for the eye."""
    sections = [_head, _memory, _micro_batches, _step, _scaling, _checkpoints, _run]
    return "\n\n".join("\n".join(section(values)) for section in sections)


def _table(rows: list[list[str]]) -> list[str]:
    """Columns in line: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _head(values: dict[str, Any]) -> list[str]:
    cluster, plan = values["cluster"], values["plan"]
    assumed = cluster["assumed"]
    return [
        f"{values['recipe']} on {cluster['nodes']} x {cluster['gpus_per_node']} {cluster['gpu']['name']}: "
        f"{values['precision']}, zero_stage={values['zero_stage']}, "
        f"activation_checkpointing={values['activation_checkpointing']}",
        f"{plan['global_batch']} images = {plan['micro_batch']} per rank x {plan['accumulation']} accumulated x "
        f"{plan['world_size']} ranks",
        f"A calculation; nothing was run. {cluster['efficiency'].capitalize()}: {assumed['efficiency']:.0%} of a peak "
        f"of {cluster['peak_flops'] / 1e12:g} TFLOP/s",
        "Assumed besides: " + ", ".join(f"{name} {value:g}" for name, value in assumed.items() if name != "efficiency"),
    ]


def _memory(values: dict[str, Any]) -> list[str]:
    memory = values["memory"]
    rows = [[name, f"{size / GIB:.2f}"] for name, size in memory["components"].items()]
    total, available = memory["total"] / GIB, memory["available"] / GIB
    fits = "fits" if memory["fits"] else "DOES NOT FIT"
    lines = ["Memory of a rank, GiB", *_table(rows), f"at its worst {total:.2f} of {available:.2f}: {fits}"]
    if memory["host"]:
        lines.append(f"and {memory['host'] / GIB:.2f} GiB of host memory for each rank")
    if memory["disk"]:
        lines.append(f"and {memory['disk'] / GIB:.2f} GiB of its host's local disk")
    return lines + [f"- {advice}" for advice in values["advice"]]


def _micro_batches(values: dict[str, Any]) -> list[str]:
    largest = values["largest_micro_batch"]
    rows = [["activation_checkpointing", *next(iter(largest.values()))]]
    rows += [[f"ZeRO-{stage}", *(str(images) for images in row.values())] for stage, row in largest.items()]
    return ["Largest micro-batch that fits (deepspeed: as fairscale)", *_table(rows)]


def _step(values: dict[str, Any]) -> list[str]:
    step, data, world = values["step"], values["data"], values["plan"]["world_size"]
    rows = [
        ["forward and backward passes", f"{step['compute'] * 1e3:.1f}"],
        [
            f"communication that they do not hide, of {step['communication'] * 1e3:.1f}",
            f"{step['exposed'] * 1e3:.1f}",
        ],
        ["offload", f"{step['offload'] * 1e3:.1f}"],
        ["waiting for the slowest rank", f"{step['straggling'] * 1e3:.1f}"],
        ["step", f"{step['total'] * 1e3:.1f}"],
    ]
    if not step["offload"]:
        del rows[2]
    sent = [
        f"a rank sends by {c['kind']}, {c['phase']}: {c['sent'] * c['passes'] / 2**20:.1f} MiB"
        for c in values["communication"]
    ]
    enough = "enough" if data["enough"] else "TOO FEW"
    return [
        "Time of an optimizer step, ms",
        *_table(rows),
        *sent,
        f"{step['images_per_second']:,.0f} images/s, {step['images_per_second'] / world:,.0f} a GPU; "
        f"its {data['workers']} data workers give {data['available_per_rank']:,.0f}: {enough}",
    ]


def _scaling(values: dict[str, Any]) -> list[str]:
    rows = [["nodes", "micro-batch", "accumulated", "images/s", "per GPU, of the first row's"]]
    errors = []
    for row in values["scaling"]:
        if "error" in row:
            errors.append(f"{row['nodes']} nodes: {row['error']}")
            continue
        rows.append([str(row["nodes"]), str(row["micro_batch"]), str(row["accumulation"]),
                     f"{row['images_per_second']:,.0f}", f"{row['efficiency']:.1%}"])  # fmt: skip
    return ["Scaling, with the same global batch", *_table(rows), *errors]


def _checkpoints(values: dict[str, Any]) -> list[str]:
    found = values["checkpoints"]
    how = "written beside training" if found["asynchronous"] else "training waits for it"
    return [
        f"Checkpoints of {found['bytes'] / GIB:.2f} GiB, {how}: {found['blocked']:.2g} s stand still, whole after "
        f"{found['delay']:.2g} s more",
        f"a failure every {found['mtbf'] / 3600:,.0f} hours of the cluster, {found['restart']:.0f} s to restart",
        f"best interval: Young {found['young_seconds']:.0f} s, Daly {found['daly_seconds']:.0f} s, simulated "
        f"{found['simulated_seconds']:.0f} s ({found['simulated_overhead']:.3%} of the time lost)",
        f"checkpoint_every={found['checkpoint_every']} loses {found['overhead']:.3%}; the recipe's interval "
        f"{found['recipe_overhead']:.3%}",
    ]


def _run(values: dict[str, Any]) -> list[str]:
    run = values["run"]
    price = f", price {run['price']:,.0f}" if run["price"] else ""
    return [
        f"{run['images']:,.0f} images: {run['days']:.2f} days, {run['gpu_hours']:,.0f} GPU hours{price}; "
        f"{run['expected_failures']:.2f} failures expected"
    ]
