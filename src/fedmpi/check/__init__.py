"""`fedmpi check`: everything about a run that can be known before it waits in a queue.

findings   what is wrong, collected: nothing here stops at the first fault
reading    the configuration, with all its faults
samples    the silos' data
skew       how the silos differ: labels, sizes, features
trying     model, loss and metrics on a few samples, forwards and backwards
pace       seconds of a round from a few timed batches; memory
folder     the run directory: writable, free space, earlier checkpoints
checking   all of these on the ranks that are there
report     the result as text
"""

from fedmpi.check.checking import check
from fedmpi.check.report import lines

__all__ = ["check", "lines"]
