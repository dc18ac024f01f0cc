"""Print what training a router and serving it take.

python -m pipelines.capacity --model pixart-sigma --gpu H100 --gpu-price 2.5 --train.target-speedup 1.7
"""

import json
import sys

from harmonica.cli.common import fail, parse_settings, say

from .command import CapacityCommand, Estimates, estimate
from .tables import Section, limits_section, model_section, serving_section, training_section


def sections(command: CapacityCommand, found: Estimates) -> list[Section]:
    """Return the tables in the order in which they are printed."""
    rate, target_s, quantile = command.images_per_s, found.target_s, command.quantile
    made = {
        "model": model_section(found.model, found.num_steps, found.speedup, found.cur),
        "training": training_section(found.training, command.gpu, command.train.batch_size),
        "serving": serving_section(found.serving, command.gpu, rate, target_s, quantile),
        "limits": limits_section(found.limits, command.nodes),
    }
    return [section for name, section in made.items() if name in command.tables]


def main(arguments: list[str]) -> int:
    """Run the command; return 0, or 2 for settings that cannot be used."""
    try:
        command = parse_settings(CapacityCommand, arguments, f"python -m {__package__}")
        found = estimate(command)
    except ValueError as error:
        return fail(error, code=2)
    if command.json:
        say(json.dumps(found.to_json(command.nodes), indent=1))
        return 0
    for section in sections(command, found):
        if command.markdown:
            say(f"**{section.title}**\n")
        section.print(markdown=command.markdown)
        say("")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
