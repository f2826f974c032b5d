"""What the server's job of silos in separate jobs refuses, survives and cleans up."""

from support.runs import put_back, run
from support.silojobs import IDS, Job, apart, in_one_process

from fedmpi import requests, roster
from fedmpi.flat import sha256
from fedmpi.jobs.serve import Serving

__all__ = ["put_back"]


def test_silos_neither_leave_nor_join_by_request(tmp_path):
    how = apart(tmp_path, 3)
    jobs = [Job(how, silo) for silo in IDS]
    with Serving(how) as there:
        for record in there:
            if record["round"] == 1:
                requests.put(there.out, "retire", "s2")
                requests.put(there.out, "admit", "s9")
    for job in jobs:
        job.ended()
    whys = [one["refused"] for one in roster.read(there.out)["answers"]]
    assert len(whys) == 2 and all("transport: files: silos neither join nor leave" in why for why in whys)
    _, here = run(in_one_process(how, tmp_path))
    assert sha256(there.parameters) == sha256(here.parameters)
