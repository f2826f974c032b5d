#!/usr/bin/env bash
# Memory per rank with 4 and with 40 silos on the same 2 ranks and the same data: it should not differ.
#   bash jobs/memory.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/setup.sh
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for silos in 4 40; do
  timeout 600 mpirun -n 2 fedmpi train configs/fashion.yaml rounds=2 local.epochs=1 data.partition=iid \
    data.silos=$silos out="$out/$silos" >"$out/log" 2>&1 || { cat "$out/log"; exit 1; }
  fedmpi inspect "$out/$silos" --json | python -c '
import json, sys
rss = json.load(sys.stdin)["metrics"]["peak_rss_bytes"]
print(sys.argv[1], "silos:", ", ".join(f"rank {r} {b / 2**20:.1f} MiB" for r, b in enumerate(rss)))' "$silos"
done
