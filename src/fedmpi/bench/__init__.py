"""Benchmarks on this machine, next to baselines, interleaved in one run.

exchange     every plan, and codecs, from a delta to new parameters on all ranks
baselines    what they are compared with: gloo, raw TCP
codecs       encode, decode and bytes on one core
arrivals     what an update costs the server of engine: buffered
checkpoint   how long rounds wait for checkpoints
quality      time until runs reach a target
scaling      exchanges and rounds over numbers of ranks
everything   all of them in a given time
forecast     seconds of exchanges over a link, from a rate and saved figures
noise        data and model of benchmarks that train
figures      figures of merit, and how results are printed
timing       interleaved timing, and tables
"""
