"""ReFrame checks of fedmpi: correctness by accuracy and SHA-256, and figures of merit with ratios as references.

    reframe -C jobs/bench/suite/site.py -c jobs/bench/suite/checks.py --system here:local -r

    -S num_ranks=8        ranks of each check (4)
    -S params=25e6        length of the vectors (1e6)
    -S target=0.95        accuracy that the training checks must reach

`fedmpi` and `mpirun` must be in PATH; ReFrame lives in an environment of its own. Absolute times depend on the system:
they have no reference here. Ratios compare two things in one run, so theirs hold everywhere.
"""

import re
from pathlib import Path

import reframe as rfm
import reframe.utility.sanity as sn
from reframe.core.builtins import run_before, sanity_function, variable

TOP = Path(__file__).resolve().parents[3]
FOM = re.compile(r"^FOM (\S+) (\S+) (\S+)$", re.MULTILINE)
RATIO = "ratio"


class FedmpiCheck(rfm.RunOnlyRegressionTest):
    """A command of fedmpi. Every FOM line that it prints becomes a performance variable."""

    num_ranks = variable(int, value=4)
    params = variable(str, value="1e6")
    target = variable(float, value=0.95)
    valid_systems = ["*"]  # noqa: RUF012
    valid_prog_environs = ["*"]  # noqa: RUF012
    executable = "fedmpi"
    time_limit = "10m"

    @run_before("run")
    def set_ranks(self):
        self.num_tasks = self.num_ranks
        self.env_vars = {"OMP_NUM_THREADS": "1"}

    @sanity_function
    def has_figures(self):
        return sn.assert_found(r"^FOM \S+ \S+ \S+$", self.stdout)

    @run_before("performance")
    def set_figures(self):
        text = (Path(self.stagedir) / sn.evaluate(self.stdout)).read_text()
        for name, value, unit in FOM.findall(text):
            self.perf_variables[name] = sn.make_performance_function(lambda value=value: float(value), unit)


@rfm.simple_test
class TrainCheck(FedmpiCheck):
    """Digits to the accuracy on all ranks, and once more on one rank: with a reproducible reduction the same bits."""

    descr = "train to accuracy, same SHA-256 on one rank"

    @run_before("run")
    def set_command(self):
        settings = ["exchange.reduction=reproducible", "rounds=30"]
        config = str(TOP / "configs/digits.yaml")
        self.executable_opts = ["train", config, *settings, "out=many"]
        one = " ".join(["fedmpi train", config, *settings, "out=one >one.txt"])
        self.postrun_cmds = [one, "fedmpi inspect many", "fedmpi inspect one"]

    @sanity_function
    def is_accurate_and_the_same(self):
        digests = sn.extractall(r"^params_sha256\s+(\w{64})", self.stdout, 1)
        accuracies = sn.extractall(r"^accuracy\s+([0-9.]+)", self.stdout, 1, float)
        return sn.all(
            [
                sn.assert_eq(sn.count(digests), 2),
                sn.assert_eq(digests[0], digests[1]),
                sn.assert_ge(accuracies[0], self.target),
            ]
        )


@rfm.simple_test
class QualityCheck(FedmpiCheck):
    """Time to quality on digits, and models per minute."""

    descr = "time to quality"

    @run_before("run")
    def set_command(self):
        config = str(TOP / "configs/digits.yaml")
        self.executable_opts = ["bench", "quality", config, "--target", str(self.target), "--runs", "3", "rounds=60"]
        self.reference = {"*": {"quality.reached": (1, 0, 0, "share")}}


@rfm.simple_test
class ExchangeCheck(FedmpiCheck):
    """Bandwidth of every plan and codec; the best plan is to need no longer than one MPI_Allreduce, which only sums."""

    descr = "exchange bandwidth"

    @run_before("run")
    def set_command(self):
        self.executable_opts = ["bench", "exchange", "--params", self.params, "--repeats", "7"]

    @run_before("performance")
    def set_best(self):
        text = (Path(self.stagedir) / sn.evaluate(self.stdout)).read_text()
        ratios = [float(value) for name, value, _ in FOM.findall(text) if name.endswith(".x_allreduce")]
        ratios.remove(1.0)  # MPI_Allreduce's own
        self.perf_variables["exchange.best.x_allreduce"] = sn.make_performance_function(lambda: min(ratios), RATIO)
        self.reference = {"*": {"exchange.best.x_allreduce": (1, None, 0.25, RATIO)}}


@rfm.simple_test
class CodecCheck(FedmpiCheck):
    """Throughput of the codecs on one core, and their bytes, which are the same on every system."""

    descr = "codec throughput"
    num_ranks = 1

    @run_before("run")
    def set_command(self):
        self.executable_opts = ["bench", "codecs", "--params", self.params]
        self.reference = {"*": {"codecs.int8.wire": (1.0156, -0.001, 0.001, "bytes/param")}}


@rfm.simple_test
class CheckpointCheck(FedmpiCheck):
    """How long rounds wait for checkpoints, write bandwidth, and the time to resume."""

    descr = "checkpoint bandwidth, time to recover"

    @run_before("run")
    def set_command(self):
        self.executable_opts = ["bench", "checkpoint", "--params", self.params]
        self.reference = {"*": {"checkpoint.waited": (0, None, 0.5, "share")}}


@rfm.simple_test
class ScalingCheck(FedmpiCheck):
    """Strong and weak scaling of rounds, and of the exchange."""

    descr = "strong and weak scaling"

    @run_before("run")
    def set_command(self):
        self.executable_opts = ["bench", "scaling", "--params", self.params, "--repeats", "3"]
