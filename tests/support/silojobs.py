"""Server and silo jobs of one federation as threads of this process, over a folder."""

import contextlib
import signal
import sys
import threading
import traceback
from dataclasses import replace
from unittest import mock

from fedmpi import assembly, rng
from fedmpi.errors import ConfigError, ServerEnded, Stopped, Superseded
from fedmpi.jobs import serve
from fedmpi.jobs.serve import Serving
from fedmpi.jobs.silo import SiloJob
from support.runs import config

IDS = ("s0", "s1", "s2")


def apart(tmp_path, rounds=3, name="run", transport=None, **other):
    """A configuration of jobs with a folder of their own."""
    root = tmp_path / f"{name}-share"
    root.mkdir(exist_ok=True)
    files = {"name": "files", "root": str(root), "poll_s": 0.01, "lease_s": 20} | (transport or {})
    return config(tmp_path / name, rounds, transport=files, **other)


ALONE = threading.RLock()  # jobs share the process's random generators
_borrowed = rng.borrowed


@contextlib.contextmanager
def borrowed():
    """Save and restore the generators while no other job draws: a job that ends would change what another one, which
    opens its data, starts from."""
    with ALONE:
        saved = _borrowed()
        saved.__enter__()
    try:
        yield
    finally:
        with ALONE:
            saved.__exit__(None, None, None)


rng.borrowed = borrowed


class OneSilo(SiloJob):
    """A silo's job that draws random numbers while no other job does."""

    def _open(self):
        with ALONE:
            super()._open()

    def _train(self, commit, call):
        with ALONE:
            super()._train(commit, call)

    def _train_at_once(self, commit):
        with ALONE:
            super()._train_at_once(commit)

    def _score(self, commit):
        with ALONE:
            super()._score(commit)


class Job(threading.Thread):
    """The job of one silo."""

    def __init__(self, how, silo, job=OneSilo):
        super().__init__(daemon=True)
        self.job, self.error = job(how, silo), None
        self.start()

    def run(self):
        try:
            self.job.run()
        except BaseException as error:
            self.error = error
            print(f"silo '{self.job.silo}': {type(error).__name__}: {error}", file=sys.stderr)
            if not isinstance(error, (KeyboardInterrupt, Superseded, ConfigError, ServerEnded, Stopped)):
                traceback.print_exc()
                if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # a server runs in this process
                    signal.raise_signal(signal.SIGTERM)  # else it waits for ever

    def ended(self, timeout_s=60):
        """Wait for its end, and raise its error."""
        self.join(timeout_s)
        assert not self.is_alive(), "the silo's job does not end"
        if self.error is not None:
            raise self.error


def alone(function):
    """The function, while no silo draws random numbers."""

    def called(*arguments):
        with ALONE:
            return function(*arguments)

    return called


def served(how, rounds=None):
    """The records of the server's job, which is left after `rounds` more rounds."""
    with mock.patch.object(serve, "specify", alone(assembly.specify)), Serving(how) as run:
        records = []
        for record in run:
            records.append(record)
            if len(records) == rounds:
                break
    return records, run


def trained_apart(how, ids=IDS):
    """The records and the run of a server with one job for each silo, all of which end."""
    jobs = [Job(how, silo) for silo in ids]
    records, run = served(how)
    for job in jobs:
        job.ended()
    return records, run, jobs


def with_a_second_job(how, kind):
    """The run of a server whose silo s1 has a job of this kind, and once that has died, another one."""
    first, jobs = Job(how, "s1", kind), [Job(how, silo) for silo in IDS if silo != "s1"]

    def again():
        first.join(60)
        jobs.append(Job(how, "s1"))

    starter = threading.Thread(target=again)
    starter.start()
    _, run = served(how)
    starter.join()
    for job in jobs:
        job.ended()
    assert isinstance(first.error, KeyboardInterrupt)
    return run


def in_one_process(how, tmp_path):
    """The same configuration without the transport."""
    from fedmpi.transports import ByMpi

    return replace(how, transport=ByMpi(), out=str(tmp_path / "plain"))
