"""Messages that several processes write to one place."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_processes_that_share_stderr_leave_each_others_lines_whole(unbuffered: str) -> None:
    script = (
        "import os\nfrom ummim.errors import say\nos.fork()\nwho = str(os.getpid()).zfill(9)\n"
        "for _ in range(2000): say(who)"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    shared = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True).stderr
    assert {len(line) for line in shared.splitlines()} == {9}
