"""Secrets of a run under masks: in the memory of the ranks that share them, and nowhere else."""

import contextlib
import json
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from support.mpi import PYTHON, TESTS, Job, launcher, until

CHUNK = 32 << 20  # bytes of memory read at a time
LONGEST = 64  # bytes of a secret, at most


def found(memory: bytes, secrets: list[bytes]) -> set[bytes]:
    """Which of these secrets, of 16 bytes or more, are in the memory at any place."""
    by_head = {secret[:16]: secret for secret in secrets}
    heads = np.zeros(1 << 16, dtype=bool)
    for head in by_head:
        heads[int.from_bytes(head[:2], "little")] = True
    seen: set[bytes] = set()
    for shift in (0, 1) if memory else ():
        words = np.frombuffer(memory, "<u2", (len(memory) - shift) // 2, shift)
        for at in (2 * np.flatnonzero(heads[words]) + shift).tolist():
            secret = by_head.get(memory[at : at + 16])
            if secret is not None and memory[at : at + len(secret)] == secret:
                seen.add(secret)
    return seen


def in_process(pid: int, secrets: list[bytes]) -> set[bytes]:
    """Which secrets are in the process's writable memory: heap, stacks, segments shared with other processes."""
    seen: set[bytes] = set()
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            where, rights, *_ = line.split()
            start, stop = (int(number, 16) for number in where.split("-"))
            if not rights.startswith("rw"):
                continue
            for at in range(start, stop, CHUNK):
                with contextlib.suppress(OSError):  # memory of a device
                    memory.seek(at)
                    seen |= found(memory.read(min(CHUNK + LONGEST, stop - at)), secrets)
    return seen


class Capture:
    """All packets on the loopback device, while the `with` block lasts."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
        except PermissionError:
            pytest.skip("captures packets, which takes CAP_NET_RAW")
        self._socket.bind(("lo", 0))
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, 33, 1 << 28)  # SO_RCVBUFFORCE
        self._socket.settimeout(0.1)
        self._over, self.packets = threading.Event(), []
        self._thread = threading.Thread(target=self._listen)

    def _listen(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                self.packets.append(self._socket.recv(1 << 17))

    def __enter__(self) -> "Capture":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()


def forms(secrets: list[bytes]) -> list[bytes]:
    """The secrets, backwards, and as text."""
    return [*secrets, *(one[::-1] for one in secrets), *(one.hex().encode() for one in secrets)]


def test_secrets_are_in_their_ranks_memory_and_nowhere_else(tmp_path: Path) -> None:
    if "--oversubscribe" not in launcher():
        pytest.skip("tells Open MPI to use TCP")
    tcp = ("--mca", "pml", "ob1", "--mca", "btl", "self,tcp", "--mca", "btl_tcp_if_include", "lo")
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    command = (PYTHON, "-m", "support.programs.secret_keys", str(tmp_path))
    with Capture() as captured, Job(4, *tcp, *command, env={"PYTHONPATH": path}) as job:
        files = [tmp_path / f"rank-{rank}.json" for rank in range(4)]
        until(lambda: job.process.poll() is not None or all(file.exists() for file in files), 90, job.so_far)
        assert job.process.poll() is None, job.so_far().tails
        rows = [json.loads(file.read_text()) for file in files]
        owners = {bytes.fromhex(text): set(ranks) for row in rows for text, ranks in row["secrets"].items()}
        secrets = forms(list(owners))
        seen = [in_process(row["pid"], secrets) for row in rows]
        (tmp_path / "searched").touch()
        done = job.wait(60)
    assert done.rc == 0, done.tails
    # A key pair, three secrets agreed on, a key from each, and keys for every sum of two rounds.
    assert len(owners) == 4 + 6 + 6 + 6 * 2 * 3 and all(1 <= len(ranks) <= 2 for ranks in owners.values())
    for rank in range(4):
        own = [secret for secret, ranks in owners.items() if rank in ranks]
        assert not seen[rank] - {*forms(own)}, f"rank {rank} has secrets of others"
        assert len(seen[rank] & {*own}) >= 4, "the search finds its own key and what it shares with three others"
    wire = b"".join(captured.packets)
    publics = [bytes.fromhex(text) for row in rows for text in row["publics"]]
    assert found(wire, publics) == set(publics), "the capture holds what ranks send"
    assert not found(wire, secrets)
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(written) > 8, written
    for text in (done.out.encode(), done.err.encode(), *(file.read_bytes() for file in written)):
        assert not found(text, secrets)
    assert found(secrets[0] + b"." + secrets[-1] + bytes(40), secrets) >= {secrets[0], secrets[-1]}
