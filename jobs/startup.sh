#!/usr/bin/env bash
# Start-up: from `mpirun -n 4` to the first batch, next to importing torch and mpi4py at the same n. In turns, medians.
#   bash jobs/startup.sh [REPEATS]
set -euo pipefail
cd "$(dirname "$0")/.."
RANKS=4 source jobs/setup.sh
n=4 repeats=${1:-5}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cat >"$out/first.py" <<'PY'
import sys, time
from fedmpi import Run
from fedmpi.local import Work
taken = Work.batches
def first(self, silo, seed):
    print("first batch", time.time(), flush=True)
    return taken(self, silo, seed)
Work.batches = first
with Run("configs/digits.yaml", "rounds=1", f"out={sys.argv[1]}") as run:
    list(run)
PY
ours=() imports=()
for i in $(seq "$repeats"); do
  start=$(date +%s.%N)
  timeout 120 mpirun -n $n python "$out/first.py" "$out/$i" >"$out/log" 2>&1 || { cat "$out/log"; exit 1; }
  ours+=("$(awk -v s="$start" '/first batch/ { t = $3 - s; if (t > m) m = t } END { print m }' "$out/log")")
  start=$(date +%s.%N)
  timeout 120 mpirun -n $n python -c 'import torch, mpi4py'
  imports+=("$(awk -v s="$start" -v e="$(date +%s.%N)" 'BEGIN { print e - s }')")
done
python - "${ours[*]}" "${imports[*]}" <<'PY'
import json, statistics, sys
ours, imports = ([float(v) for v in text.split()] for text in sys.argv[1:])
a, b = statistics.median(ours), statistics.median(imports)
print(json.dumps({"ratio": round(a / b, 3), "first_batch_s": round(a, 2), "imports_s": round(b, 2), "repeats": len(ours)}))
PY
