#!/usr/bin/env bash
# Times start-up: from `mpirun -n 4` to the first batch, over importing torch and mpi4py on as many ranks. Medians.
#   bash jobs/bench/startup.sh [REPEATS | --quick]      --quick: smoke test, once, on two ranks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
n=4 repeats=${1:-5}
[ "$repeats" != --quick ] || n=2 repeats=1
RANKS=$n
. jobs/setup.sh
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
ours=() imports=()
for i in $(seq "$repeats"); do
  start=$(date +%s.%N)
  timeout 120 mpirun -n $n python jobs/bench/first_batch.py "$out/$i" >"$out/log" 2>&1 || { cat "$out/log" >&2; exit 1; }
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
