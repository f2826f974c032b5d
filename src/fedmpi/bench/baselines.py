"""Baselines for the exchange, between the same processes: raw TCP sockets, and gloo's all_reduce.

All connections are made before timing starts. A baseline that is unavailable raises FedmpiError on every rank.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch

from fedmpi.comm import Comm
from fedmpi.errors import FedmpiError

T = TypeVar("T")

PATIENCE = timedelta(seconds=60)  # time limit of a connection, and of one all_reduce of gloo
SEND_BYTES = 256 << 10
SIOCGIFADDR = 0x8915
_ADDRESS_BYTES = 32


class Tcp:
    """Raw TCP in the pattern of plan sharded: what link and kernel can do without MPI.

    Every rank sends each other rank its 1/n of a float32 vector, all at once, then sends its own 1/n to each of them:
    the bytes that plan sharded sends with identity. Nothing is summed. A rank starts the second half when it has
    received all of the first.
    """

    def __init__(self, comm: Comm, num_params: int, peers: dict[int, socket.socket]) -> None:
        self._comm, self._peers = comm, peers
        cuts = [4 * (num_params * rank // comm.size) for rank in range(comm.size + 1)]
        self._part = [slice(start, stop) for start, stop in pairwise(cuts)]
        mine = self._part[comm.rank]
        self.delta, self.params = (memoryview(bytearray(4 * num_params)) for _ in range(2))
        self.came = {rank: memoryview(bytearray(mine.stop - mine.start)) for rank in peers}

    def __call__(self) -> None:
        """Runs one round and counts its bytes."""
        theirs = {rank: self._part[rank] for rank in self._peers}
        num_bytes = sum(part.stop - part.start for part in theirs.values())
        mine = self.params[self._part[self._comm.rank]]
        self._swap({rank: self.delta[part] for rank, part in theirs.items()}, self.came)
        self._comm.bytes_up += num_bytes
        self._swap(dict.fromkeys(theirs, mine), {rank: self.params[part] for rank, part in theirs.items()})
        self._comm.bytes_down += num_bytes

    def _swap(self, send: dict[int, memoryview], receive: dict[int, memoryview]) -> None:
        """Sends and receives until both are complete. Raises ConnectionError if a peer closes."""
        send, receive = dict(send), dict(receive)
        with selectors.DefaultSelector() as ready:
            for rank, peer in self._peers.items():
                if events := _left(send[rank], receive[rank]):
                    ready.register(peer, events, rank)
            while ready.get_map():
                for key, events in ready.select():
                    rank, peer = key.data, self._peers[key.data]
                    if events & selectors.EVENT_WRITE:
                        send[rank] = send[rank][peer.send(send[rank]) :]
                    if events & selectors.EVENT_READ:
                        num_bytes = peer.recv_into(receive[rank])
                        if not num_bytes:
                            raise ConnectionError(f"rank {rank} has closed its connection")
                        receive[rank] = receive[rank][num_bytes:]
                    left = _left(send[rank], receive[rank])
                    if not left:
                        ready.unregister(peer)
                    elif left != key.events:
                        ready.modify(peer, left, rank)


def _left(send: memoryview, receive: memoryview) -> int:
    return selectors.EVENT_WRITE * bool(send) | selectors.EVENT_READ * bool(receive)


@contextmanager
def connected(comm: Comm) -> Iterator[dict[int, socket.socket]]:
    """Yields non-blocking sockets to all other ranks, by rank; hosts are found by name. Collective.

    The send buffer is SEND_BYTES, which the kernel doubles. That saturates any link between neighbours. With kernel
    defaults, several senders fill the queue before one receiver, and dropped packets are sent again.
    """
    peers: dict[int, socket.socket] = {}
    with socket.create_server(("", 0), backlog=comm.size) as door:
        door.settimeout(PATIENCE.seconds)
        mine = f"{_own_address()} {door.getsockname()[1]}".encode()
        told = [row.rstrip(b"\0").decode().split() for row in comm.gather(mine.ljust(_ADDRESS_BYTES, b"\0"))]

        def connect() -> None:
            for rank in range(comm.rank):
                address, port = told[rank]
                if comm.machines[rank] == comm.machines[comm.rank]:
                    address = "127.0.0.1"
                elif address.startswith("127."):
                    address = comm.hosts[rank]  # a loopback address is valid only on its own host
                peers[rank] = socket.create_connection((address, int(port)), PATIENCE.seconds)
                peers[rank].sendall(comm.rank.to_bytes(4, "little"))
            for _ in range(comm.rank + 1, comm.size):
                peer, _ = door.accept()
                peer.settimeout(PATIENCE.seconds)
                peers[int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "little")] = peer
            for peer in peers.values():
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
                peer.setblocking(False)

        try:
            _together(comm, "no connection by host name", connect)
            yield peers
        finally:
            for peer in peers.values():
                peer.close()


def _own_address() -> str:
    """This host's address, by its name."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


@contextmanager
def gloo(comm: Comm, num_params: int, peers: dict[int, socket.socket]) -> Iterator[Callable[[], object]]:
    """Yields torch.distributed's all_reduce of a float32 vector over gloo. Collective.

    It uses the network interface of the sockets in `peers`; by default gloo takes the one of the host's name.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        raise FedmpiError("this torch has no gloo")
    away = [peer for rank, peer in peers.items() if comm.machines[rank] != comm.machines[comm.rank]]
    here = (away or list(peers.values()))[0].getsockname()[0]
    if (interface := _interface(here)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    make: Any = dist.TCPStore  # type: ignore[attr-defined,unused-ignore]
    root, what = comm.broadcast_text(here, 0), "torch.distributed"

    def store(port: int) -> Any:
        return make(root, port, comm.size, comm.rank == 0, PATIENCE, wait_for_workers=False)

    first = _together(comm, what, lambda: store(0) if comm.rank == 0 else None)  # 0: any free port
    port = int(comm.broadcast_text(str(first.port) if first else "", 0))
    met = _together(comm, what, lambda: first or store(port))
    about: dict[str, Any] = {"rank": comm.rank, "world_size": comm.size, "timeout": PATIENCE}
    work_P = torch.zeros(num_params)
    try:
        _together(comm, what, lambda: dist.init_process_group("gloo", store=met, **about))
        yield lambda: dist.all_reduce(work_P)
        comm.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # its threads would outlive the interpreter


def _interface(address: str) -> str | None:
    """The interface of this host with that address; None if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # one without an address
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(any_socket, SIOCGIFADDR, request)[20:24]) == address:
                    return name
    return None


def _together(comm: Comm, what: str, work: Callable[[], T]) -> T:
    """`comm.collectively`, with OSError and RuntimeError turned into a one-line FedmpiError."""

    def said() -> T:
        try:
            return work()
        except (OSError, RuntimeError) as error:
            raise FedmpiError(f"{what}: {' '.join(str(error).split())[:200]}") from None

    return comm.collectively(said)
