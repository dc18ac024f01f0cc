"""Python imports this at its start, wherever this folder is on PYTHONPATH: it lets Ray's workers be forks."""

import os
import sys

import fork_client

if (_address := os.environ.get(fork_client.ADDRESS)) and fork_client.is_worker(sys.orig_argv):
    fork_client.hand_over(_address)
