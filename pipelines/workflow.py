"""Command of the whole chain: train a router, evaluate it, register it, serve it.

It is `harmonica-workflow` where the package is installed, and `python workflow.py` in a clone.
"""

import sys

from harmonica.cli.common import fail, parse, say
from harmonica.validation.settings import SettingError

from .presets import PRESETS
from .run_state.interruption import Terminated, sigterm_raises
from .stages import Workflow


def main(arguments: list[str] | None = None, prog: str = "harmonica-workflow") -> int:
    """Run the stages of a preset and return the exit code.

    It is 0 when every stage is done, 3 when it is and the gate kept the new router from being the champion,
    2 for unusable input, 1 when a stage fails, else 128 + signal.

    Args:
        arguments: a preset's name and its overrides; those of the process if None.
        prog: what the help calls the command.
    """
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments, PRESETS, prog)
        workflow = Workflow(config)
        workflow.check()
        lease = workflow.claim()
    except ValueError as error:
        return fail(error, code=2)
    say(f"run {workflow.config.run_id}: {', '.join(config.stages)}")
    try:
        with sigterm_raises(), lease, workflow.tracked():
            for stage in config.stages:
                workflow.run(stage)
    except KeyboardInterrupt as signal:
        if lease.lost:
            return fail(lease.lost, code=1)
        words = f"interrupted: the same command with --run-id {workflow.config.run_id} goes on from here"
        return fail(words, code=143 if isinstance(signal, Terminated) else 130)
    except SettingError as error:  # what no check before the work can know
        return fail(error, code=2)
    except Exception as error:  # whatever a stage raises ends here, once, with its name
        return fail(error, code=1)
    workflow.summarise()
    return fail(workflow.refusal, code=3) if workflow.refusal else 0


if __name__ == "__main__":
    sys.exit(main())
