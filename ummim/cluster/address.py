"""``python -m ummim.cluster.address HOST``: this host's own address in a job of several hosts that meets at HOST.

torchrun would give the others this host's full name instead, which they may not be able to resolve.
"""

import os
import socket
import sys
import time

from ummim.engine.network import choose_interface, own_address
from ummim.errors import run_main

WAIT_SECONDS = 300.0


def job_address(meeting: str) -> str:
    """The address by which the other hosts reach this one.

    Waits for the name to be known: a pod may start before the one that all meet at. Raises UserError.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while not _known(meeting) and time.monotonic() < deadline:
        time.sleep(1)
    os.environ.update(MASTER_ADDR=meeting, WORLD_SIZE="2", CROSS_SIZE="2")  # more than one, each on a host of its own
    choose_interface()
    return own_address()


def _known(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(run_main(lambda: print(job_address(sys.argv[1]))))
