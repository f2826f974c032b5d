#!/usr/bin/env bash
# Kills the whole job (kill -9) at random moments of a run, resumes it each time, and compares with an undisturbed run.
#   bash jobs/experiments/kill_resume.sh [KILLS] [CONFIG] [KEY=VALUE ...]
#   bash jobs/experiments/kill_resume.sh --quick      smoke test: one kill of a short run on two ranks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
n=4 rounds=120
if [ "${1-}" = --quick ]; then
  n=2 rounds=30
  set -- 1 configs/digits.yaml local.epochs=4
fi
RANKS=$n
. jobs/setup.sh
kills=${1:-10} config=${2:-configs/digits.yaml}
shift $(($# < 2 ? $# : 2))
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
run() { exec setsid mpirun -n $n fedmpi train "$config" rounds=$rounds checkpoint.every=1 "$@"; }
(run "$@" out="$out/whole") >"$out/whole.log" 2>&1 || { cat "$out/whole.log" >&2; exit 1; }
sha() { fedmpi inspect "$1" --json | python -c 'import json, sys; print(json.load(sys.stdin)["params_sha256"])'; }
newest() { { find "$1/checkpoints" -name manifest.json 2>/dev/null || true; } | sed 's/.*round-0*\([0-9]\)/\1/; s/\/.*//' | sort -n | tail -1; }
done_kills=0
while [ "$done_kills" -lt "$kills" ]; do
  (run "$@" out="$out/killed") >"$out/killed.log" 2>&1 &
  pid=$!
  # Wait until the ranks train, then a random time.
  before=$(newest "$out/killed")
  for _ in $(seq 600); do [ "$(newest "$out/killed")" != "$before" ] && break; sleep 0.05; done
  sleep "0.$((RANDOM % 900 + 10))"
  if ! kill -0 $pid 2>/dev/null; then echo "the run ended before kill $((done_kills + 1))" >&2; break; fi
  pkill -9 -s $pid || true # the whole session: Open MPI gives each rank a process group of its own
  wait $pid 2>/dev/null || true
  done_kills=$((done_kills + 1))
  echo "kill $done_kills after round $(newest "$out/killed")"
done
(run "$@" out="$out/killed") >"$out/killed.log" 2>&1 || { cat "$out/killed.log" >&2; exit 1; }
a=$(sha "$out/whole") b=$(sha "$out/killed")
echo "undisturbed  $a"
echo "killed       $b ($done_kills times)"
[ "$a" = "$b" ] && [ "$done_kills" = "$kills" ]
