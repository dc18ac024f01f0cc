"""Filter out Ray's remarks that no user can act upon; its warnings stay.

Each remark is matched by its own words. Where an option keeps a remark from arising, `ray_runtime` sets it.
"""

import logging
import re

from ray._private import ray_logging

_LOGGED = {
    # On a private cluster the token is wanted: it is what closes the cluster.
    "ray._private.authentication.authentication_token_setup": r"Token authentication is enabled for this Ray",
    # With a stack trace, where five seconds were too few on a busy machine: it is sent again.
    "ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client": (
        r"Failed to send resource request for .* it's safe to ignore this error"
    ),
}
_PRINTED = (
    # Of actors that Ray itself makes so, Ray Train's and Ray Data's.
    r"has constructor arguments in the object store and max_restarts > 0\. If the arguments",
    # What Serve's own way of shutting down looks like from outside.
    r"Task ServeController\.graceful_shutdown failed\. There are infinite retries remaining",
)


class _Drop(logging.Filter):
    """A filter that drops messages with a pattern."""

    def __init__(self, pattern: str) -> None:
        super().__init__(pattern)
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self._pattern.search(record.getMessage())


def drop_remarks() -> None:
    """Drop the remarks among this process's logs and its cluster's workers' output."""
    for name, pattern in _LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Drop) for one in logger.filters):
            logger.addFilter(_Drop(pattern))
    # What RAY_DEDUP_LOGS_SKIP_REGEX sets, which Ray reads when it is imported.
    for printer in (ray_logging.stdout_deduplicator, ray_logging.stderr_deduplicator):
        given = [printer.skip_re.pattern] if printer.skip_re else []
        wanted = [*given, *(pattern for pattern in _PRINTED if not any(pattern in one for one in given))]
        printer.skip_re = re.compile("|".join(wanted))
