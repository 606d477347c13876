"""The commit protocol and the store proved by faults: each is made for real, many times, and what it cost is counted.

python -m benchmarks.faults                all of it: results.json here and docs/faults.md, minutes
python -m benchmarks.faults --quick        a few times each, under a minute; writes nothing unless --json says where

scene.py       small stores: what an extraction is asked, and what must come of it
process.py     child processes that die or stop at a chosen change of the file system
outcome.py     after a fault: what is read, whether the status is true, whether the same command finishes
kills.py writers.py disks.py power.py leftovers.py     the faults
skips.py       the protections, each to be left out alone: the control arms
catalogue.py   every fault with its control arm
damages.py     random damages to finished stores
table.py       docs/faults.md from results.json
"""
