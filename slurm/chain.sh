#!/usr/bin/env bash
# Submits a run that takes longer than a job may, as a chain of jobs, each of which waits for the one before it:
#
#   slurm/chain.sh NUM CONFIG [key=value ...]
#
# Near its time limit a job stops with a checkpoint, and the next one resumes. Once all rounds are done, or the
# configuration is refused, the jobs that still wait are cancelled. Where a site allows requeueing, a single
# slurm/train.sbatch does the same. Environment variables: those of slurm/train.sbatch, and
#
#   FEDMPI_SBATCH    options of sbatch for all jobs, such as "-N2 --ntasks-per-node=2 --time=2:00:00"
set -euo pipefail

say() { echo "chain.sh: $*" >&2; }

if [[ ! ${1-} =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
  say "usage: slurm/chain.sh NUM CONFIG [key=value ...]"
  exit 2
fi
num=$1
shift
name=fedmpi-$(printf '%s\n' "$PWD" "$@" | sha256sum | cut -c-8)
queued=$(squeue --noheader --user="$(id -un)" --name="$name" --format=%i)
if [ -n "$queued" ]; then
  say "a chain of this run is queued or running: squeue --name=$name"
  exit 2
fi
before=""
for ((link = 1; link <= num; link++)); do
  # shellcheck disable=SC2086 # words
  before=$(FEDMPI_CHAIN=$name sbatch --parsable --no-requeue ${FEDMPI_SBATCH-} --job-name="$name" \
    ${before:+--dependency=afterany:${before%%;*}} "$(dirname "$0")/train.sbatch" "$@")
  echo "$before"
done
say "$num jobs submitted: squeue --name=$name"
