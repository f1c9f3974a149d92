"""Options of small `resae train` commands."""

import socket
from contextlib import ExitStack

TRAIN = ["--layers", "0,1,3", "--k", "4", "--context-tokens", "24", "--held-out-rows", "8"]
SMALL = ["--train-tokens", "2048", "--batch-tokens", "64", "--buffer-tokens", "512"]
SMALL += ["--calibration-tokens", "2048", "--d-sae", "64"]


def free_ports(n):
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
