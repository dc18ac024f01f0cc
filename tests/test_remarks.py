"""What Ray remarks and nobody can act upon is dropped, and nothing else."""

import logging
import re

import pytest
from ray._private import ray_logging
from ray._private.authentication import authentication_token_setup

from pipelines.remarks import drop_remarks

TOKEN = "ray._private.authentication.authentication_token_setup"
REMARKS = (
    "[2026-11-27 05:58:56,425 E 2905 2905] core_worker.cc:2465: Actor with class name: 'PreemptionWatcher' "
    "and ID: '2f7c1a' has constructor arguments in the object store and max_restarts > 0. If the arguments "
    "in the object store go out of scope or are lost, the actor restart will fail. See https://github.com/ray",
    "Task ServeController.graceful_shutdown failed. There are infinite retries remaining, so the task will "
    "be retried. Error: The actor is dead because it was killed by `ray.kill`.",
)
WARNINGS = (
    "Task Sampler.draw failed. There are infinite retries remaining, so the task will be retried. Error: ...",
    "[2026-11-27 05:58:56,425 E 2905 2905] core_worker.cc:17: The raylet may have died.",
    "constructor arguments are missing",
)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    for printer in (ray_logging.stdout_deduplicator, ray_logging.stderr_deduplicator):
        monkeypatch.setattr(printer, "skip_re", None)
        monkeypatch.setattr(printer, "recent", {})


@pytest.mark.parametrize("printer", ["stdout_deduplicator", "stderr_deduplicator"])
def test_of_what_workers_print_only_remarks_are_dropped(printer):
    def shown():
        batch = {"ip": "127.0.0.1", "pid": 1, "is_err": True, "lines": [*REMARKS, *WARNINGS]}
        return getattr(ray_logging, printer).deduplicate(batch)[0]["lines"]

    assert shown() == [*REMARKS, *WARNINGS]
    drop_remarks()
    drop_remarks()
    getattr(ray_logging, printer).recent.clear()
    assert shown() == list(WARNINGS)


def test_a_pattern_of_the_user_stays(monkeypatch):
    monkeypatch.setattr(ray_logging.stderr_deduplicator, "skip_re", re.compile("boring"))
    drop_remarks()
    drop_remarks()
    skipped = ray_logging.stderr_deduplicator.skip_re
    assert skipped.search("a boring line") and all(map(skipped.search, REMARKS))
    assert skipped.pattern.count("boring") == skipped.pattern.count("graceful_shutdown") == 1


def test_of_what_the_token_set_up_logs_only_that_it_is_on_is_dropped(caplog):
    drop_remarks()
    with caplog.at_level(logging.WARNING, TOKEN):
        authentication_token_setup._warn_token_auth_enabled()
        authentication_token_setup._warn_token_auth_disabled()
        logging.getLogger(TOKEN).warning("the token could not be read")
    assert [record.getMessage()[:32] for record in caplog.records] == [
        "Token authentication is disabled",
        "the token could not be read",
    ]
