"""A run that is killed, cut off, damaged and starved of disk again and again, against one that is left alone.

    python benchmarks/chaos.py [--steps 1200] [--faults 18] [--seed 0] [--hosts 2] [--launcher torchrun] [--output FILE]

Needs root: the hosts are namespaces of this machine (``tests/launch/hosts.py``). A tiny MAE is trained once on one
host, undisturbed, and once over all hosts by ``launch/deepspeed.sh`` or ``launch/torchrun.sh``, at the same world
size. At random moments a fault is injected; when the job has ended, and perhaps a file of its newest checkpoint has
been damaged, the same command is given again, until the run has reached its end. Then must hold, else exit code 1:

- every recorded step is there once, with the undisturbed run's loss, gradient norm and learning rate, bit for bit,
  also each step that was trained again; the final weights have the same checksum;
- each fault ended the job within 60 seconds, with no process left on any host and not with exit code 0, and was
  named in a message; each damaged checkpoint was named and passed over;
- no temporary file is left in the output.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSIDE = "UMMIM_CHAOS"  # set where the mounts are our own


def main() -> int:
    parser = argparse.ArgumentParser(description="Disturb a run and compare it with an undisturbed one.")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps of the run, some ten a second")
    parser.add_argument("--faults", type=int, default=18, help="every kind comes once before any comes twice")
    parser.add_argument("--kinds", nargs="*", metavar="NAME", help="only these kinds of faults")
    parser.add_argument("--seed", type=int, default=0, help="of the faults, not of the run")
    parser.add_argument("--hosts", type=int, default=2, help="one rank each")
    parser.add_argument("--launcher", choices=("deepspeed", "torchrun"), default="deepspeed")
    parser.add_argument("--checkpoint-every", type=int, default=8, metavar="STEPS")
    parser.add_argument("--hang-seconds", type=float, default=40, help="the recipe's")
    parser.add_argument("--output", type=Path, help="write what happened as JSON")
    options = parser.parse_args()
    if INSIDE not in os.environ:  # a full disk is a small tmpfs, which shall not outlive this process
        os.environ |= {INSIDE: "1", "PYTHONPATH": str(ROOT)}
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])
    from chaos_run import Chaos

    chaos = Chaos(options)
    try:
        chaos.run()
    finally:
        if options.output:
            options.output.write_text(json.dumps(chaos.told(), indent=1) + "\n")
    chaos.print()
    return 1 if chaos.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
