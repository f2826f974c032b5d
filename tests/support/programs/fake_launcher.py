"""Simulates mpirun for a supervisor: `fake_launcher.py OUT WORD,WORD,...`; the start with epoch E follows word E.

A word is N:END: commit N more rounds, then end as END says: an exit code, `kill` (by SIGKILL), `hang`, `deaf` (hang
and ignore signals), `child` (exit 0 and leave a process behind), `asked` (exit 3 at SIGUSR1), `finalize` (hang once the
model is written). N+M instead of N adds M rounds with a record but no checkpoint.
"""

import json
import os
import signal
import subprocess
import sys
import time


def main() -> None:
    out, words = sys.argv[1], sys.argv[2].split(",")
    epoch = int(os.environ["FEDMPI_EPOCH"])
    number, _, ending = words[epoch - 1].partition(":")
    commits, _, more = number.partition("+")
    if ending == "asked":
        signal.signal(signal.SIGUSR1, lambda *_: os._exit(3))
    if ending == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.makedirs(f"{out}/checkpoints", exist_ok=True)
    done = max((int(name[6:]) for name in os.listdir(f"{out}/checkpoints")), default=0)
    lines = [json.dumps({"round": r, "seconds": {"round": 0.01}}) for r in range(1, done + int(commits) + 1)]
    lines += [json.dumps({"round": len(lines) + 1 + r, "seconds": {"round": 0.01}}) for r in range(int(more or 0))]
    with open(f"{out}/metrics.new", "w") as file:
        file.writelines(f"{line}\n" for line in lines)
    os.rename(f"{out}/metrics.new", f"{out}/metrics.jsonl")
    for round in range(done + 1, done + int(commits) + 1):
        os.mkdir(f"{out}/checkpoints/round-{round:06d}")
        open(f"{out}/checkpoints/round-{round:06d}/manifest.json", "w").close()
    with open(f"{out}/pid-{epoch}", "w") as file:
        file.write(str(os.getpid()))
    if ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "child":
        child = subprocess.Popen(["sleep", "600"])
        with open(f"{out}/child", "w") as file:
            file.write(str(child.pid))
        os._exit(0)
    if ending == "finalize":
        open(f"{out}/model.safetensors", "w").close()
    if not ending.isdigit():
        time.sleep(600)
    sys.exit(int(ending))


main()
