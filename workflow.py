"""Train a router, judge it, register it, serve it: the whole chain, read top to bottom.

python workflow.py                                   # the `fashion` preset
python workflow.py fashion --train.trajectories 200  # a preset with overrides
python workflow.py fashion --run-id NAME             # again: finished stages are skipped
python workflow.py fashion --promote never           # register it, and leave the champion as it is
python workflow.py --help                            # presets; `fashion --help` lists every setting

ray job submit --working-dir . -- python workflow.py
"""

import sys

from harmonica.cli.common import fail, parse, say
from pipelines.presets import PRESETS
from pipelines.runtime.ray_runtime import Terminated
from pipelines.stages import Workflow


def main(arguments: list[str]) -> int:
    """Run the stages that are asked for, and return the exit code.

    It is 0 when every stage is done, 3 when it is and the gate kept the new router from being the champion,
    2 for unusable input, 1 when a stage fails, else 128 + signal.
    """
    try:
        config = parse(arguments, PRESETS, "workflow.py")
        workflow = Workflow(config)
        workflow.check()
        lease = workflow.claim()
    except ValueError as error:
        return fail(error, code=2)
    say(f"run {workflow.config.run_id}: {', '.join(config.stages)}")
    try:
        with lease, workflow.tracked():
            for stage in config.stages:
                workflow.run(stage)
    except KeyboardInterrupt as signal:
        if lease.lost:
            return fail(lease.lost, code=1)
        words = f"interrupted: the same command with --run-id {workflow.config.run_id} goes on from here"
        return fail(words, code=143 if isinstance(signal, Terminated) else 130)
    except Exception as error:  # whatever a stage raises ends here, once, with its name
        return fail(error, code=1)
    workflow.summarise()
    return fail(workflow.refusal, code=3) if workflow.refusal else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
