"""Keep the words of prompts out of what diffusers logs."""

import logging
import re
from typing import Any

_TRUNCATED = re.compile(r"(input was truncated .*?): .*", re.DOTALL)
"""diffusers' warning that a prompt was cut, which ends with what was cut off."""


def _without_words(record: logging.LogRecord) -> bool:
    record.msg, record.args = _TRUNCATED.sub(r"\1", record.getMessage()), ()
    return True


def keep_words_out(pipe: Any) -> None:
    """Cut the words of prompts off the warnings of a pipeline's own modules."""
    for kind in type(pipe).__mro__:
        logger = logging.getLogger(kind.__module__)
        if kind.__module__.startswith("diffusers.") and _without_words not in logger.filters:
            logger.addFilter(_without_words)
