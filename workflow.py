"""Train a router, evaluate it, register it, serve it.

`pipelines.workflow` has the chain.

python workflow.py                                   # the `fashion` preset
python workflow.py fashion --train.trajectories 200  # a preset with overrides
python workflow.py fashion --run-id NAME             # again: finished stages are skipped
python workflow.py fashion --promote never           # register it, and leave the champion as it is
python workflow.py --help                            # presets; `fashion --help` lists every setting

ray job submit --working-dir . -- python workflow.py
"""

import sys

from pipelines.workflow import main

if __name__ == "__main__":
    sys.exit(main(prog="workflow.py"))
