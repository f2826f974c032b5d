#!/usr/bin/env bash
# Trains on hosts of your own, by ssh, without a batch system:
#
#   jobs/multihost.sh HOSTFILE CONFIG [key=value ...]
#
# HOSTFILE has a line per host: a name that ssh reaches without a password, and how many ranks: `node1 slots=4`; one rank
# if it does not say. The checkout and its .venv are at the same path on every host; they need not be on a shared file
# system. All hosts are asked first: each that does not answer, or has another version, is a line. `fedmpi run` supervises
# the ranks, so hosts that fail later are left out and tried again. Environment variables:
#
#   FEDMPI_VENV    virtual environment; default: .venv of this checkout
#   FEDMPI_SSH     command that reaches a host, as `COMMAND HOST WORDS...`; default: ssh -o BatchMode=yes. MPICH and Intel MPI
#                  take one word
#   FEDMPI_PASS    names of variables to pass to the ranks, separated by spaces, such as "SCRATCH OMP_NUM_THREADS"
set -euo pipefail

say() { echo "multihost: $*" >&2; }

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${FEDMPI_VENV:-$top/.venv}
ssh=${FEDMPI_SSH:-ssh -o BatchMode=yes -o ConnectTimeout=5}
if [ $# -lt 2 ] || [ ! -r "$1" ]; then
  say "usage: jobs/multihost.sh HOSTFILE CONFIG [key=value ...]"
  exit 2
fi
if [ ! -x "$venv/bin/fedmpi" ]; then
  say "no fedmpi in $venv: run jobs/setup.sh there, or set FEDMPI_VENV"
  exit 2
fi
hostfile=$1
shift
export PATH="$venv/bin:$PATH"

# The launcher line knows hosts and slots.
lines=$(python - "$hostfile" <<'PYTHON'
import sys
from fedmpi.errors import ConfigError
from fedmpi.launchline import LaunchLine

try:
    slots = LaunchLine.of(["mpirun", "--hostfile", sys.argv[1]]).slots
except ConfigError as error:
    sys.exit(f"multihost: {error}")
if not slots:
    sys.exit(f"multihost: {sys.argv[1]} names no hosts")
print(sum(slots.values()), ",".join(f"{host}:{num}" for host, num in slots.items()), *slots, sep="\n")
PYTHON
) || exit 2
mapfile -t lines <<<"$lines"
ranks=${lines[0]} list=${lines[1]} hosts=("${lines[@]:2}")

printf -v ask 'cd %q && %q' "$PWD" "$venv/bin/python" # also paths with blanks and quotes
ask+=" -c 'import sys; from importlib.metadata import version as v; print(*sys.version_info[:2], *map(v, (\"fedmpi\", \"torch\", \"numpy\", \"mpi4py\")))'"
answers=$(mktemp -d) machines=""
trap 'rm -rf "$answers" ${machines:+"$machines"}' EXIT
for host in "${hosts[@]}"; do
  # shellcheck disable=SC2086 # words
  timeout 60 $ssh "$host" "$ask" >"$answers/$host" 2>"$answers/$host.error" </dev/null &
done
wait
mine=$(eval "$ask")
wrong=""
for host in "${hosts[@]}"; do
  said=$(tail -n1 "$answers/$host")
  if [ -z "$said" ]; then
    wrong=1
    say "$host: no answer by '$ssh', or no $venv there: $(tail -n1 "$answers/$host.error")"
  elif [ "$said" != "$mine" ]; then
    wrong=1
    say "$host: Python, fedmpi, torch, numpy, mpi4py are $said, here $mine"
  fi
done
[ -z "$wrong" ] || exit 2

pass=(PATH ${FEDMPI_PASS-})
for name in MPI4PY_LIBMPI MPI4PY_MPIABI LD_LIBRARY_PATH I_MPI_ROOT; do # ranks of all hosts load the same library
  [ -z "${!name-}" ] || pass+=("$name")
done
# The one of the MPI library, which need not be the first on PATH.
lines=$(python -m fedmpi.starters "$ranks" no-srun) || exit 2
read -r starter _ <<<"$lines"
case $("$starter" --version 2>&1) in
  *"Open MPI"*)
    # Not --hostfile: a line without `slots=` would be as many ranks as the host has cores.
    launcher=("$starter" --host "$list" -n "$ranks" --map-by slot:oversubscribe)
    launcher+=(--prtemca plm ssh --prtemca plm_ssh_agent "$ssh")
    for name in "${pass[@]}"; do launcher+=(-x "$name"); done
    ;;
  *) # Hydra: MPICH, Intel MPI. rsh differs from ssh only in that no -x comes before the host.
    names=$(IFS=, && echo "${pass[*]}")
    if [[ ${FEDMPI_SSH-} == *[[:space:]]* ]]; then
      say "'$starter' takes FEDMPI_SSH as one word, not '$FEDMPI_SSH': write a script, or take Open MPI"
      exit 2
    fi
    # Hydra's own hostfiles have no `slots=`. With -hosts and -f Intel MPI ignores numbers and fills the cores of each host.
    machines=$(mktemp)
    tr , '\n' <<<"$list" >"$machines"
    launcher=("$starter" -machinefile "$machines" -n "$ranks" -genvlist "$names")
    if [ -z "${FEDMPI_SSH-}" ]; then launcher+=(-launcher ssh); else launcher+=(-launcher rsh -launcher-exec "$FEDMPI_SSH"); fi
    ;;
esac
say "$ranks ranks on ${hosts[*]} by: ${launcher[*]}"
fedmpi run "$@" -- "${launcher[@]}" &
pid=$!
for name in INT TERM USR1; do
  # shellcheck disable=SC2064 # now
  trap "kill -$name $pid 2>/dev/null || true" $name
done
code=0
while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done # each signal interrupts one wait
wait "$pid" || code=$?
exit $code
