"""Silos in jobs of their own, over a shared folder: `fedmpi serve` and `fedmpi silo` (docs/silos-in-jobs.md).

messages.py   what the jobs tell each other
serve.py      the server's job: a run whose silos are elsewhere
silo.py       the job of one silo
private.py    a silo's state, on its own side
"""
