"""The end of one rank is the end of all: at once, in one line, whatever the others wait for.

Every rank keeps a connection to rank 0 open. The operating system closes it when the process ends,
however that happens; of a machine that is gone, after 25 s. Rank 0 then tells the others; a rank
that fails reports it itself. Each machine prints one line, and its processes end without the
destructors of torch.distributed, which would print and abort. A collective that waits for the dead
would raise its own error, or wait for half an hour.
"""

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from selectors import EVENT_READ, DefaultSelector
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

EXPECTED = (ValueError, OSError, ModuleNotFoundError)
"""Errors of the input or the machine, whose message is complete: exit code 2."""
GRACE = 5.0
"""Seconds in which the death of another rank is heard of, which a RuntimeError may come from."""
LONGEST = 4_096
"""Bytes of a message."""
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


class Watch:
    """Inside, the process ends as soon as another rank has died or failed, and an error here ends
    all ranks.

    Args:
        rank, size: this process among all; entered by all of them.
        print_line: prints the line.
        with_traceback: on an error of this rank, print where it happened.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        print_line: Callable[[str], None],
        *,
        with_traceback: bool = False,
    ):
        self.rank = rank
        self.size = size
        self.print_line = print_line
        self.with_traceback = with_traceback
        self._code = 1
        self._peers: dict[int, socket.socket] = {}
        """Connections by the rank at the other end."""
        self._done: set[int] = set()
        """Ranks that have ended in order."""
        self._ending = threading.Lock()

    def __enter__(self) -> "Watch":
        if self.size == 1:
            return self
        self._terminate = signal.signal(signal.SIGTERM, self._on_terminate)
        door: list[Any] = [None, None]
        server = None
        if self.rank == 0:
            server, address = _listen()
            door = [address, secrets.token_hex(16)]
        dist.broadcast_object_list(door, 0, device=torch.device("cpu"))
        connection = _connect(door[0], door[1], self.rank) if server is None else None
        reached = [False] * self.size
        dist.all_gather_object(reached, connection is not None)
        if server is not None:
            # All of them before any work: whom the end of this rank could not be told, by a line,
            # would take it for a death.
            self._peers = _admit_all(server, door[1], sum(reached))
            hear = self._hear_all
        else:
            self._peers = {} if connection is None else {0: connection}
            hear = self._hear_first
        threading.Thread(target=hear, daemon=True).start()
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if self.size == 1:
            return
        if error is None:
            self._done.add(self.rank)
            self._tell(f"{self.rank} done ")
            signal.signal(signal.SIGTERM, self._terminate)
            return
        text = " ".join(str(error).split())
        if isinstance(error, EXPECTED):
            self._code = 2
        elif isinstance(error, KeyboardInterrupt):
            self._code, text = 130, "interrupted"
        else:
            text = f"{type(error).__name__}: {text or 'no message'} (--traceback shows where)"
        if isinstance(error, RuntimeError):
            time.sleep(GRACE)
        if self.with_traceback:
            traceback.print_exception(error)
        if self.rank > 0:
            self._tell(f"{self.rank} failed {text}")
            time.sleep(GRACE)  # in which rank 0 answers, and this process ends
        self._end(self.rank, "failed", text, unheard=self.rank > 0)

    # -- in a thread of its own --------------------------------------------------------------------

    def _hear_all(self) -> None:
        """Rank 0: until all others have ended in order, or one has not."""
        selector = DefaultSelector()
        for rank, connection in self._peers.items():
            selector.register(connection, EVENT_READ, rank)
        while selector.get_map():
            for key, _ in selector.select():
                if not self._hear(key.data):
                    selector.unregister(key.fileobj)

    def _hear_first(self) -> None:
        """Another rank: until rank 0 ends in order or not, or reports that a rank has not."""
        while self._peers and self._hear(0):
            pass

    def _hear(self, peer: int) -> bool:
        """Wait for the message of a rank and act on it; False when it has ended in order."""
        line = _receive(self._peers[peer])
        rank, _, rest = line.partition(" ")
        how, _, text = rest.partition(" ")
        if how == "done":
            self._done.add(peer)
        if peer in self._done or self.rank in self._done:
            self._peers[peer].close()
            return False
        if not line:
            self._end(peer, "died", "died (killed, or its machine or memory is gone)")
        self._end(int(rank), how, text)
        return False

    # -- the end -----------------------------------------------------------------------------------

    def _tell(self, line: str) -> None:
        for peer in list(self._peers.values()):
            with suppress(OSError):  # that one is gone
                _send(peer, line)

    def _end(self, rank: int, how: str, text: str, *, unheard: bool = False) -> None:
        """Tell the other ranks, print the line unless another rank of this machine does, exit."""
        self._ending.acquire()  # and never release: what is heard first is the cause of the rest
        if self.rank == 0:
            self._tell(f"{rank} {how} {text}")
        speaker = self.rank - dist.get_node_local_rank()  # pyright: ignore
        if (speaker, how) == (rank, "died"):
            speaker += 1
        if unheard or self.rank == speaker:
            what = f"rank {rank} of {self.size}{':' if how == 'failed' else ''} {text}"
            self.print_line(what)
        sys.stdout.flush()
        os._exit(self._code)

    def _on_terminate(self, *_: Any) -> None:
        """torchrun ends the other ranks when one has died; the line about that one comes first."""
        time.sleep(1)
        raise KeyboardInterrupt


def _listen() -> tuple[socket.socket, tuple[str, int]]:
    """A server at the address that this machine's name stands for, as gloo's."""
    for host in (socket.gethostname(), "localhost"):
        with suppress(OSError):
            family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
            server = socket.create_server(address[:2], family=family, backlog=1024)
            return server, server.getsockname()[:2]
    raise OSError(f"cannot listen at {socket.gethostname()}, nor at localhost; look at /etc/hosts")


def _connect(address: tuple[str, int], secret: str, rank: int) -> socket.socket | None:
    """A connection to rank 0; None, and a warning, where there is no way."""
    try:
        connection = _keep_alive(socket.create_connection(address, timeout=60))
    except OSError as error:
        log.warning(
            "rank %d cannot reach rank 0 at %s (%s): if another rank dies, it may wait for half an "
            "hour",
            rank,
            address,
            error,
        )
        return None
    connection.settimeout(None)
    _send(connection, f"{secret} {rank}")
    return connection


def _admit_all(server: socket.socket, secret: str, count: int) -> dict[int, socket.socket]:
    """`count` connections by their ranks, which have all been made; no others are heard later."""
    admitted: dict[int, socket.socket] = {}
    with server:
        while len(admitted) < count:
            rank, connection = _admit(server, secret)
            if connection is not None:
                admitted[rank] = connection
    return admitted


def _admit(server: socket.socket, secret: str) -> tuple[int, socket.socket | None]:
    """A new connection and its rank; none of strangers."""
    connection = _keep_alive(server.accept()[0])
    connection.settimeout(5)
    said = _receive(connection).partition(" ")
    if not secrets.compare_digest(said[0], secret):
        connection.close()
        return -1, None
    connection.settimeout(None)
    return int(said[2]), connection


def _keep_alive(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _send(connection: socket.socket, line: str) -> None:
    content = line.encode()[:LONGEST]
    connection.sendall(len(content).to_bytes(4, "big") + content)


def _receive(connection: socket.socket) -> str:
    """A line as it was sent; empty when the other end is gone."""
    try:
        length = connection.recv(4, socket.MSG_WAITALL)
        expected = min(int.from_bytes(length, "big"), LONGEST)
        return connection.recv(expected, socket.MSG_WAITALL).decode(errors="replace")
    except OSError:
        return ""
