"""The run that ``chaos.py`` disturbs, from its first start to its end, and what is checked on the way."""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_faults import DAMAGES, FILLER, LIVE, PASSED_OVER, Kind, damage, mend, refill
from chaos_job import Job, records, undisturbed, write_recipe

from tests.launch.hosts import Hosts
from ummim.engine.checkpoint import fault as fault_of
from ummim.engine.checkpoint import steps as step_folders

PROMISE = 60.0  # seconds from a fault until no process is left
PATIENCE = 180.0  # after which the rest is killed, and the fault counts as not survived
START = 300.0  # seconds for a start of the job to reach its first step
DISK = "64m"
RESUMED = re.compile(r"resuming \S+ after step (\d+) of")


@dataclass
class Fault:
    """One fault and what became of it; ``damage``: what is done to the newest checkpoint once the job has ended."""

    kind: Kind
    step: int
    delay: float  # seconds after that step has been recorded
    damage: str | None = None
    told: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    passed_over: bool = True  # the damaged checkpoint


def draw(options: argparse.Namespace, rng: random.Random) -> list[Fault]:
    """The faults in the order of their steps. Each kind comes once before any comes twice."""
    kinds = [kind for kind in LIVE if options.launcher in kind.launchers]
    names = [*(kind.name for kind in kinds), *DAMAGES]
    names = [name for name in names if not options.kinds or name in options.kinds]
    chosen: list[str] = []
    while len(chosen) < options.faults:
        chosen += rng.sample(names, min(len(names), options.faults - len(chosen)))
    damages = [name for name in chosen if name in DAMAGES]
    live = [kind for name in chosen for kind in kinds if kind.name == name]
    rng.shuffle(live)
    part = options.steps // (len(live) + 1)
    faults = [Fault(kind, i * part + rng.randint(2, part), rng.uniform(0, 0.3)) for i, kind in enumerate(live)]
    early = 3 * options.checkpoint_every  # until then there may be no second checkpoint to fall back on
    ending = [fault for fault in faults if fault.kind.ends and fault.step > early]
    if len(damages) > len(ending):
        raise SystemExit("each damaged checkpoint needs a fault that ends the job: more steps, or other kinds or seed")
    for fault, name in zip(rng.sample(ending, len(damages)), damages, strict=True):
        fault.damage = name
    return faults


class Chaos:
    """A disturbed run; ``wrong`` lists what did not hold."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rng = random.Random(options.seed)
        self.faults = draw(options, self.rng)
        self.wrong: list[str] = []
        self.starts = self.lost = 0
        self._damaged: tuple[Fault, str] | None = None  # the newest checkpoint, by name
        self._reached = 0
        self._counted: Job | None = None

    def run(self) -> None:
        with tempfile.TemporaryDirectory(prefix="ummim-chaos-", dir="/var/tmp") as name:
            self.folder = Path(name)
            for part in ("disk", "hosts", "logs", "data", "tmp"):
                (self.folder / part).mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", self.folder / "disk"], check=True)
            try:
                with Hosts(self.folder / "hosts", self.options.hosts) as self.hosts:
                    self._run()
            finally:
                subprocess.run(["umount", "--lazy", self.folder / "disk"], check=True)

    def _run(self) -> None:
        options, self.output = self.options, self.folder / "disk" / "run"
        self.recipe = write_recipe(self.folder / "data", options.steps, options.checkpoint_every, options.hang_seconds)
        begun = time.monotonic()
        self.reference = undisturbed(self.hosts, self.recipe, self.folder / "undisturbed", options.hosts)
        say(f"undisturbed: {len(self.reference)} steps, {time.monotonic() - begun:.0f} s")
        job: Job | None = None
        for fault in self.faults:
            job = job or self._start()
            ended = self._disturb(fault, job)
            say(f"{fault.kind.name}: {fault.told}" + "".join(f"\n  WRONG: {text}" for text in fault.wrong))
            self.wrong += [f"{fault.kind.name} at step {fault.told.get('step')}: {text}" for text in fault.wrong]
            job = None if ended else job
        job = job or self._start()
        deadline = time.monotonic() + START + len(self.reference)
        while not job.ended and time.monotonic() < deadline:
            time.sleep(0.1)
        self._resumed(job)
        if job.codes != [0] * len(job.codes):
            self.wrong.append(f"the last start ended with {job.codes}: {tail(job)}")
        self.wrong += self._compare_end(job)
        job.close()

    def _start(self) -> Job:
        self.starts += 1
        words = [str(self.recipe), f"output={self.output}"]
        return Job(self.hosts, self.options.launcher, words, self.folder / "logs" / f"start-{self.starts}")

    def _disturb(self, fault: Fault, job: Job) -> bool:
        """Inject the fault when its step has come, and check what follows; says whether the job has ended."""
        deadline = time.monotonic() + START
        while self._last_step() < max(fault.step, self._reached + 1) and not job.ended and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(fault.delay)
        self._resumed(job)
        fault.told = {"kind": fault.kind.name, "step": self._last_step()}
        try:
            fault.told["to"] = fault.kind.inject(job, self.output, self.rng)
        except RuntimeError as error:
            fault.wrong.append(f"could not be injected: {error}: {job.codes}: {tail(job)}")
        fault.told["seconds"] = round(self._await(fault, job), 1)
        if fault.told["seconds"] > PROMISE:
            fault.wrong.append(f"took {fault.told['seconds']} s; still there: {job.left()}")
        ended = fault.kind.ends or job.ended
        if ended:
            self._after(fault, job)
        told = re.search(fault.kind.told, job.text())
        fault.told["message"] = line_of(job.text(), told)
        if not told:
            fault.wrong.append(f"nothing says {fault.kind.told!r}: {tail(job)}")
        fault.wrong += self._compare()
        self._reached = self._last_step()
        return ended

    def _after(self, fault: Fault, job: Job) -> None:
        """Look at a job that has ended, mend what was broken, and damage the newest checkpoint if that is due."""
        fault.told["codes"] = job.codes
        if 0 in job.codes or not fault.kind.ends:
            fault.wrong.append(f"ended with {job.codes}: {tail(job)}")
        job.close()
        mend(job, self.output)
        newest, *others = [*step_folders(self.output / "checkpoints"), None]
        if fault.damage and newest is not None and others:
            fault.told["damage"] = f"{fault.damage}: {damage(fault.damage, newest, self.rng)}"
            self._damaged = fault, newest.name

    def _await(self, fault: Fault, job: Job) -> float:
        """Seconds until nothing of the job is left on any host, or until it has told of the fault and goes on."""
        begun, step = time.monotonic(), self._last_step()
        filled = (self.output.parent / FILLER).exists()

        def over() -> bool:
            if fault.kind.ends or job.ended:
                return job.ended and not job.left()
            return re.search(fault.kind.told, job.text()) is not None and self._last_step() > step + 1

        while (passed := time.monotonic() - begun) < PATIENCE and not over():
            if filled and not job.ended:
                refill(self.output)  # what old checkpoints leave free
            time.sleep(0.1)
        return passed

    def _resumed(self, job: Job) -> None:
        """Count the steps that a start trains again, and see whether it has passed over a damaged checkpoint."""
        if job is self._counted:
            return
        self._counted = job
        found = RESUMED.search(job.text())
        self.lost += self._reached - (int(found[1]) if found else 0)
        if self._damaged:
            fault, name = self._damaged
            fault.passed_over = re.search(PASSED_OVER.format(step=name), job.text()) is not None
            if not fault.passed_over:
                self.wrong.append(f"{fault.told['damage']}: nothing says that it was passed over: {tail(job)}")
            self._damaged = None

    def _last_step(self) -> int:
        found = records(self.output)
        return int(found[-1]["step"]) if found else 0

    def _compare(self) -> list[str]:
        """What in the metrics so far differs from the undisturbed run's."""
        for now, then in zip(records(self.output), self.reference, strict=False):
            if now != then:
                return [f"metrics differ: {now}, undisturbed {then}"]
        return []

    def _compare_end(self, job: Job) -> list[str]:
        """What of the whole run is not as it must be."""
        wrong = self._compare()
        if len(records(self.output)) != len(self.reference):
            wrong.append(f"{len(records(self.output))} steps are recorded, not {len(self.reference)}")
        last = f"checkpoints/step-{len(self.reference)}"
        for run in (self.output, self.output.parents[1] / "undisturbed"):
            if reason := fault_of(run / last):
                wrong.append(f"{run / last}: {reason}")
        if not wrong and checksum(self.output / last) != checksum(self.output.parents[1] / "undisturbed" / last):
            wrong.append("the final weights differ")
        wrong += [f"{path} is left" for path in self.output.rglob(".tmp-*")]
        wrong += [f"{where} is left: {line}" for where, line in job.left().items()]
        return wrong + [f"{path} is left" for path in (self.folder / "tmp").glob("ummim-*")]

    def told(self) -> dict[str, Any]:
        """What happened, for JSON."""
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.options).items()}
        faults = [{**fault.told, "wrong": fault.wrong} for fault in self.faults]
        return {"options": options, "starts": self.starts, "lost": self.lost, "faults": faults, "wrong": self.wrong}

    def print(self) -> None:
        """The counts, as Markdown, and what did not hold."""
        rows: dict[str, list[Fault]] = {}
        for fault in self.faults:
            rows.setdefault(fault.kind.name, []).append(fault)
        print("| fault | injected | survived | longest until no process was left |\n|---|---|---|---|")
        for name, faults in rows.items():
            longest = max(fault.told.get("seconds", 0) for fault in faults)
            print(f"| {name} | {len(faults)} | {sum(not f.wrong for f in faults)} | {longest:.0f} s |")
        for name in DAMAGES:
            passed = [fault.passed_over for fault in self.faults if fault.damage == name]
            print(f"| {name} in the newest checkpoint | {len(passed)} | {sum(passed)} | |")
        total = sum(1 + (f.damage is not None) for f in self.faults)
        print(f"\n{total} faults, {self.starts} starts, {self.options.steps} steps, {self.lost} trained again")
        for text in self.wrong:
            print(f"WRONG (seed {self.options.seed}): {text}")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def tail(job: Job) -> str:
    return "... " + job.text()[-1500:]


def line_of(text: str, found: re.Match[str] | None) -> str:
    """The line of a log in which something was found."""
    if found is None:
        return ""
    return text[text.rfind("\n", 0, found.start()) + 1 :].partition("\n")[0]


def checksum(checkpoint: Path) -> str:
    """Of a step folder's weights."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
