#!/usr/bin/env bash
# Submits a federation of silos in separate jobs (docs/silos-in-jobs.md): one job per silo, and one server job.
#
#   slurm/federation.sh CONFIG [key=value ...]
#
# Call it again at any time: it submits only jobs that are neither queued nor running, and none once all rounds are done.
# Two minutes before its time limit, or on `scancel --signal=USR1 --batch JOBID`, a job stops and is requeued. A plain
# `scancel JOBID` ends it; call the script again to bring it back. Environment variables:
#
#   FEDMPI_VENV            virtual environment; default: .venv in the current folder
#   FEDMPI_SILOS           ids of the silos to submit, separated by spaces; default: all of the configuration
#   FEDMPI_SBATCH          options of sbatch for all jobs, such as "--time=2:00:00 --partition=short"
#   FEDMPI_SBATCH_SERVER   further options for the server's job
#   FEDMPI_SBATCH_SILO     further options for the silos' jobs, such as "--gres=gpu:1"
#   FEDMPI_MAX_REQUEUES=10 maximum requeues of a job in a row without a newer checkpoint of the server
set -euo pipefail

say() { echo "federation.sh: $*" >&2; }

if [ "${1-}" = --job ]; then # inside a job: --job VENV RUN serve|silo ..., where RUN is the server's run directory
  export PATH="$2/bin:$PATH"
  run=$3
  shift 3
  pid="" usr1=0 term=0
  stop() { [ -z "$pid" ] || kill -USR1 "$pid" 2>/dev/null || true; }
  trap 'usr1=1; stop' USR1
  trap 'term=1; stop' TERM
  code=138 # as if a signal had killed it
  if [ $usr1$term = 00 ]; then
    fedmpi "$@" &
    pid=$!
    [ $usr1$term = 00 ] || stop # a signal arrived before there was a pid
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done # each signal interrupts one wait
    code=0
    wait "$pid" || code=$?
  fi
  # 138: the signal came before fedmpi listened.
  if [ $usr1$term = 10 ] && { [ $code = 3 ] || [ $code = 138 ]; } &&
    python -m fedmpi.requeues may "${FEDMPI_MAX_REQUEUES:-10}" "$run" "requeues-$SLURM_JOB_NAME" &&
    [ $term = 0 ]; then
    say "stopped on request, requeueing"
    if scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi
    say "SLURM does not requeue this job; call slurm/federation.sh again to bring it back"
  fi
  exit $code
fi

venv=${FEDMPI_VENV:-$PWD/.venv}
if [ $# = 0 ] || [ ! -x "$venv/bin/fedmpi" ]; then
  say "usage: slurm/federation.sh CONFIG [key=value ...]" \
    "where jobs/setup.sh has made .venv, or with FEDMPI_VENV (looked for $venv/bin/fedmpi)"
  exit 2
fi
script=$(readlink -f "$0")

# Lines: the run's name, its folder, the silos.
lines=$("$venv/bin/python" - "$@" <<'PYTHON'
import hashlib, sys
from pathlib import Path
from fedmpi.config import load
from fedmpi.errors import FedmpiError
from fedmpi.jobs.post import files_of

try:
    config = load(sys.argv[1], sys.argv[2:])[0]
    root = str(Path(files_of(config).root).resolve())
    silos = [silo.id for silo in config.data.source(config.seed).silos]
except FedmpiError as error:
    sys.exit(f"fedmpi: {error}")
Path(root).mkdir(parents=True, exist_ok=True)
print("fedmpi-" + hashlib.sha256(root.encode()).hexdigest()[:8], config.out, *silos, sep="\n")
PYTHON
) || exit 2
mapfile -t lines <<<"$lines"
name=${lines[0]} out=${lines[1]} silos=("${lines[@]:2}")
[ -z "${FEDMPI_SILOS-}" ] || read -ra silos <<<"$FEDMPI_SILOS"
for silo in "${silos[@]}"; do
  if [[ $silo == *[/%[:space:]]* ]]; then # in names of logs, sbatch's patterns, FEDMPI_SILOS
    say "silo '$silo': an id with '/', '%' or a blank is no name of a job; submit \`fedmpi silo\` for it yourself," \
      "and name the others in FEDMPI_SILOS"
    exit 2
  fi
done

if "$venv/bin/fedmpi" inspect "$out" --done >/dev/null 2>&1; then
  say "all rounds are done: fedmpi inspect $out"
  exit 0
fi

mkdir -p "$out/logs"
there=$(squeue --noheader --user="$(id -un)" --format="%t %j" | sed -n '/^CG /d; s/^[A-Z]* *//p') # CG: it ends
submit() { # NAME OPTIONS COMMAND...
  local job=$1 options=$2
  shift 2
  if grep -qxF -- "$job" <<<"$there"; then
    say "$job is there"
    return
  fi
  # shellcheck disable=SC2086 # words
  id=$(sbatch --parsable --job-name="$job" --ntasks=1 --signal=B:USR1@120 --requeue --open-mode=append \
    --output="$out/logs/$job.log" ${FEDMPI_SBATCH-} $options "$script" --job "$venv" "$out" "$@")
  say "$job submitted: $id"
}
for silo in "${silos[@]}"; do
  submit "$name-$silo" "${FEDMPI_SBATCH_SILO-}" silo "$1" --id "$silo" "${@:2}"
done
submit "$name-server" "${FEDMPI_SBATCH_SERVER-}" serve "$@"
