"""The far end of ``ummim preflight``: answers requests, a JSON line each, until its standard input closes.

``python -m ummim.cluster.probe``, started on every host through ssh, srun or torchrun's environment. It ends with the
connection, at the latest after ``LIFETIME`` seconds: nothing is left behind on a host that was cut off.
"""

import json
import os
import signal
import socket
import sys
import time
from dataclasses import asdict
from typing import IO, Any

from ummim.cluster.facts import Question, gather
from ummim.cluster.reduce import all_reduce
from ummim.engine.network import address_towards
from ummim.errors import describe

LIFETIME = 600  # seconds


def answer(request: dict[str, Any]) -> Any:
    """The answer to one request."""
    kind, values = request["ask"], request.get("with", {})
    if kind == "clock":
        return time.time()
    if kind == "address":
        return address_towards(values["place"])
    if kind == "resolve":
        return socket.gethostbyname(values["place"])
    if kind == "facts":
        return asdict(gather(Question(**values)))
    if kind == "reduce":
        return asdict(all_reduce(**values))
    raise ValueError(f"{kind!r} is no request")


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer line by line."""
    for line in requests:
        try:
            reply = {"answer": answer(json.loads(line))}
        except Exception as error:  # whatever it is, the launching host names it
            reply = {"error": describe(error) or f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


def main() -> int:
    signal.alarm(LIFETIME)
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        serve(sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
