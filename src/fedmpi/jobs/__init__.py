"""Silos in jobs of their own, over a shared folder: `fedmpi serve` and `fedmpi silo` (docs/silos-in-jobs.md).

messages.py   what the jobs tell each other
serve.py      the server's job: a run whose silos are elsewhere
remote.py     those silos, behind the folder
masked.py     the same under `secure`, where only sums are seen
sums.py       the server's part in secure sums
masking.py    a silo's part in them
silo.py       the job of one silo
private.py    a silo's state, on its own side
"""
