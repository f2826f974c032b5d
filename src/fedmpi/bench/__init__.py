"""Benchmarks on this machine, next to baselines, interleaved in one run.

exchange     every plan, and codecs, from a delta to new parameters on all ranks
baselines    what they are compared with: gloo, raw TCP
codecs       encode, decode and bytes on one core
checkpoint   how long rounds wait for checkpoints
timing       interleaved timing, and tables
"""
