"""`fedmpi doctor`: what this machine, or the ranks of a job, offer to a run, and what is wrong with it.

host       what a process sees of its host: cores, limits, devices, file systems, versions
library    the MPI library; alone it is asked in another process, so that MPI is not initialised here
network    clocks of the hosts, latency and bandwidth between them
advice     the problems, each with its remedy
report     the result as text
"""

from fedmpi.doctor.examine import examine
from fedmpi.doctor.report import lines

__all__ = ["examine", "lines"]
