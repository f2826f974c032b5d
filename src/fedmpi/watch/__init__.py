"""`fedmpi watch DIR`: a run's progress in a terminal, from the files of its directory. Changes nothing there.

follow   the files of a run, read again where they have grown
jobs     server and silos in jobs of their own
frame    what is shown, as lines that fit a terminal
live     the loop
"""

from fedmpi.watch.live import watch

__all__ = ["watch"]
