#!/usr/bin/env bash
# Compares memory per rank with 4 and with 40 silos on the same 2 ranks and the same data: it should be equal.
#   bash jobs/bench/memory.sh [--quick]      --quick: smoke test, one round on digits with 4 and 8 silos
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. jobs/setup.sh
config=configs/fashion.yaml rounds=2 most=40
[ "${1-}" != --quick ] || config=configs/digits.yaml rounds=1 most=8
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for silos in 4 $most; do
  timeout 600 mpirun -n 2 fedmpi train "$config" rounds=$rounds local.epochs=1 data.partition=iid \
    data.silos=$silos out="$out/$silos" >"$out/log" 2>&1 || { cat "$out/log" >&2; exit 1; }
  fedmpi inspect "$out/$silos" --json | python -c '
import json, sys
rss = json.load(sys.stdin)["metrics"]["peak_rss_bytes"]
print(sys.argv[1], "silos:", ", ".join(f"rank {r} {b / 2**20:.1f} MiB" for r, b in enumerate(rss)))' "$silos"
done
