"""A callback: a line in OUT/slow.txt for each round that took longer than `limit_s` seconds.

It is called as `slow_rounds(record, run, limit_s=...)` on rank 0, once a round is committed and its line is in
metrics.jsonl, before its checkpoint. `record` is a copy; `run` is `RunInfo` in fedmpi/records/sink.py. If it raises, a
warning names it, it is called no more, and training goes on. What has to be opened and closed is a sink (sink.py).

    callbacks: [{name: "examples.extending.callback:slow_rounds", limit_s: 0.0}]
"""


def slow_rounds(record, run, limit_s=60.0):
    seconds = record["seconds"]["round"]
    if seconds > limit_s:
        with open(run.root / "slow.txt", "a") as file:
            print(f"round {record['round']} of {run.rounds} took {seconds:.1f} s", file=file)
