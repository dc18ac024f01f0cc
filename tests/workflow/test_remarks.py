"""What Ray remarks and nobody can act upon is dropped, and nothing else."""

import logging
import re

import pytest
from ray import cloudpickle as ray_cloudpickle
from ray._private import ray_logging
from ray._private.authentication import authentication_token_setup
from ray.train import RunConfig, ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as client

from pipelines.runtime.log_filters import drop_remarks
from pipelines.training.ray_trainer import QuietController

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


def test_the_process_of_the_controller_is_as_quiet(caplog):
    client.logger.filters.clear()
    sent = ray_cloudpickle.dumps(RunConfig(callbacks=[QuietController()]).callbacks)
    client.logger.filters.clear()

    class Busy(client.TrainAutoscalingCoordinatorClient):
        _autoscaling_coordinator = None  # which raises as an actor does that does not answer in time

    def said() -> int:
        caplog.clear()
        with caplog.at_level(logging.WARNING, client.logger.name):
            Busy("train").send_resource_request(ScalingConfig(num_workers=1), 1)
            client.logger.warning("something else")
        return len(caplog.records)

    assert said() == 2
    assert isinstance(ray_cloudpickle.loads(sent)[0], QuietController)
    assert said() == 1
