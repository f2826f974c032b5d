"""Benches: what things cost on this machine, beside what else one could do, in one run and in turns.

exchange     every plan, and codecs, from a delta to new parameters on all ranks
rivals       what they are compared with: gloo, raw TCP
codecs       encode, decode and bytes on one core
checkpoint   how long rounds wait for checkpoints
turns        the clock, and tables for people
"""
