"""Ramble's application definition of fedmpi, for Ramble and Benchpark workspaces.

    ramble repo add jobs/bench/suite/ramble

`fedmpi` and the MPI's launcher must be in PATH: no package manager is asked. Each workload prints one line
`FOM name value unit` for a figure.
"""

from ramble.appkit import *  # noqa: F403  Ramble's directives


class Fedmpi(ExecutableApplication):  # noqa: F405
    """Federated training under MPI: exchange, codecs, checkpoints, scaling, time to quality."""

    name = "fedmpi"
    tags("ml-framework", "federated-learning", "benchmark-app")  # noqa: F405

    executable("exchange", "fedmpi bench exchange --params {params}", use_mpi=True)  # noqa: F405
    executable("codecs", "fedmpi bench codecs --params {params}", use_mpi=False)  # noqa: F405
    executable("checkpoint", "fedmpi bench checkpoint --params {params}", use_mpi=True)  # noqa: F405
    executable("scaling", "fedmpi bench scaling --params {params}", use_mpi=True)  # noqa: F405
    executable("quality", "fedmpi bench quality {config} --target {target} --runs {runs}", use_mpi=True)  # noqa: F405

    sizes = ("exchange", "codecs", "checkpoint", "scaling")
    for one in (*sizes, "quality"):
        workload(one, executables=[one])  # noqa: F405

    workload_variable("params", default="25e6", description="length of the vectors", workloads=list(sizes))  # noqa: F405
    workload_variable("config", default="digits.yaml", description="configuration to train", workloads=["quality"])  # noqa: F405
    workload_variable("target", default="0.95", description="value of the metric to reach", workloads=["quality"])  # noqa: F405
    workload_variable("runs", default="5", description="runs with different seeds", workloads=["quality"])  # noqa: F405

    pattern = r"^FOM (?P<name>\S+) (?P<value>\S+) (?P<unit>\S+)$"
    figure_of_merit("{name}", fom_regex=pattern, group_name="value", units="{unit}", log_file="{log_file}")  # noqa: F405

    success_criteria("figures", mode="string", match=r"^FOM \S+ \S+ \S+$", file="{log_file}")  # noqa: F405
