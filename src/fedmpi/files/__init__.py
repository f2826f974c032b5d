"""The protocol of silos in separate jobs: a server and silos that share nothing but a folder.

folder.py    every file operation of the transport, on a real disk; publishing, first wins
envelope.py  what is in a file: a head, a payload, their lengths and digest
names.py     what files are called
root.py      the folder of a run: opened, checked, probed
claims.py    who writes: epochs of the server, incarnations of a silo; fencing
beats.py     who is alive: heart beats and leases
line.py      the commits: one line of versions
reading.py   files of the server and of silos that may not be whole yet
sums.py      secure sums: what the server decides about them
tidy.py      removing what is not needed any more
server.py    what the server job does with the folder
silo.py      what a silo's job does with the folder
"""
