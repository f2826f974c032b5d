"""ReFrame's settings: the local machine, and a SLURM cluster. Copy this file and add your partitions and `access`."""

import socket

_ENVIRONMENTS = [{"name": "default", "target_systems": ["*"]}]
_OVERSUBSCRIBE = [["PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"]]  # more ranks than cores, for smoke tests


def _partition(name: str, scheduler: str, launcher: str) -> dict[str, object]:
    return {
        "name": name,
        "scheduler": scheduler,
        "launcher": launcher,
        "environs": ["default"],
        "env_vars": _OVERSUBSCRIBE,
        "max_jobs": 1,  # benchmarks disturb each other
    }


site_configuration = {
    "systems": [
        {
            "name": "here",
            "descr": "this machine, by mpirun, and as SLURM jobs that use mpirun",
            "hostnames": [socket.gethostname()],
            "partitions": [_partition("local", "local", "mpirun"), _partition("slurm", "squeue", "mpirun")],
        }
    ],
    "environments": _ENVIRONMENTS,
    "general": [{"check_search_path": ["checks.py"], "purge_environment": False}],
}
