#!/usr/bin/env bash
# Compares everything that runs on a GPU with the CPU: prints a table, writes runs/gpu.json. At most 8 minutes.
#   bash jobs/gpu.sh [--quick] [ARGUMENT ...]      arguments of jobs/bench/gpu.py; --quick: smoke test
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
  echo "gpu: no GPU"
  exit 0
fi
RANKS=2
. jobs/setup.sh
mkdir -p runs
status=0
timeout --foreground -k 10 460 mpirun -n 2 python jobs/bench/gpu.py --required --seconds 420 --json runs/gpu.json "$@" || status=$?
exit $status
