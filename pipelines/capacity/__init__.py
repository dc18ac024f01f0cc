"""Compute time, memory, network and cost before any hardware is bought.

`python -m pipelines.capacity` prints them. `models` has shapes and MACs, `gpus` peak rates; `latency` goes
from MACs to seconds; `training`, `queueing` and `serving` estimate; `limits` says what breaks first as nodes
are added, and `tables` prints.
"""
