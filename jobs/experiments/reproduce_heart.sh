#!/usr/bin/env bash
# Reproduces Fed-Heart-Disease from the published initial weights and batch orders: accuracy per hospital, published by
# FLamby's benchmark and ours, means over five seeds; and the largest distance of final weights from the published ones.
#   bash jobs/experiments/reproduce_heart.sh [--quick] [METHOD ...]     FedAvg100, FedProx100, ...; default: all six
#                                                           --quick: smoke test, one seed of FedAvg100
# Reads the data from FEDMPI_DATA (or ./data): heart_disease/ and flamby_heart/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
data=${FEDMPI_DATA:-data}
[ -f "$data/flamby_heart/heart_traces.npz" ] ||
  { echo "reproduce_heart: no flamby_heart/heart_traces.npz in $data; set FEDMPI_DATA" >&2; exit 1; }
seeds=all
if [ "${1-}" = --quick ]; then
  seeds=42
  set -- FedAvg100
fi
RANKS=2
. jobs/setup.sh

rows=$(mktemp)
trap 'rm -f "$rows"' EXIT
timeout --foreground -k 10 3600 mpirun -n 2 python tests/support/programs/heart.py "$data" replicated "$seeds" "$@" >"$rows"
python - "$rows" <<'END'
import json
import sys

rows = [json.loads(line) for line in open(sys.argv[1]) if line.startswith("{")]
if not rows:
    sys.exit("reproduce_heart: the program printed nothing")
print(f"{'':14}" + "".join(f"{silo:^17}" for silo in ("cleveland", "hungary", "switzerland", "longbeach")) + "  distance")
print(f"{'method':14}" + " publ.     ours  " * 4 + "  of weights")
worst = 0.0
for method in dict.fromkeys(row["method"] for row in rows):
    seeds = [row for row in rows if row["method"] == method]
    line = f"{method:14}"
    for silo in range(4):
        theirs, ours = (sum(row[who][silo] for row in seeds) / len(seeds) for who in ("published", "ours"))
        line += f" {theirs:.4f}  {ours:.4f}  "
        worst = max(worst, abs(theirs - ours))
    print(line + f" {max(row['distance'] for row in seeds):.1e}")
print(f"{len(rows)} runs; largest difference of a mean accuracy: {worst:.1e}")
END
