"""Schemathesis against the endpoint's own document, over a real server: whatever it thinks of, good or bad,
the answer is one that the document has, and never a 5xx.
"""

from collections import Counter
from copy import deepcopy

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from live_app import running
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tiny_dit import make_artifact, write_model
from tiny_engine import make_engine

from harmonica.models.loading import load_model
from pipelines.serving.images_api import create_app

PATH, EDITS = "/v1/images/generations", "/v1/images/edits"
ASSETS = {"prompt": "Bag", "size": "auto", "model": "tiny"}
# Which classes, sizes and models there are is not the document's to say: good data may be a 400.
EXCLUDED = [positive_data_acceptance]


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    with running(create_app(make_engine(load_model(model), make_artifact(model)))) as url:
        yield schemathesis.openapi.from_url(f"{url}openapi.json")


def meant_well(case):
    """What the document cannot say set right, so that more is drawn than refused."""
    if isinstance(case.body, dict):
        case.body |= {name: value for name, value in ASSETS.items() if name in case.body}
        if case.body.get("quality") not in ("high", "hd", "xhigh", "max"):
            case.body.pop("num_inference_steps", None)
            case.body.pop("guidance_scale", None)
        for name in ("n", "num_inference_steps"):
            if case.body.get(name):
                case.body[name] = 2 + int(case.body[name]) % 3
    return case


def try_out(operation, mode, count, change=lambda case: case):
    """Statuses of so many cases, each checked."""
    statuses = Counter()

    @seed(7)
    @settings(max_examples=count, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode).map(change))
    def check(case):
        answer = case.call()
        statuses[answer.status_code] += 1
        case.validate_response(answer, excluded_checks=EXCLUDED)
        assert answer.status_code < 500

    check()
    return statuses


def try_all(schema, count):
    """About so many cases."""
    draw = schema[PATH]["POST"]
    good, bad = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
    statuses = try_out(draw, good, count * 3 // 10, meant_well)
    assert statuses[200] > count // 20, "most of these are drawn"
    statuses += try_out(draw, good, count * 3 // 10) + try_out(draw, bad, count * 3 // 10)
    edit = schema[EDITS]["POST"]  # forms; this model takes no picture, and refuses them all
    statuses += try_out(edit, good, count // 20) + try_out(edit, bad, count // 20)
    for operation in (result.ok() for result in schema.get_all_operations()):
        if operation.method == "get":
            statuses += try_out(operation, good, count // 10)
    return statuses


def test_no_case_of_some_hundred_breaks_it(schema):
    assert sum(try_all(schema, 250).values()) >= 240


@pytest.mark.slow
def test_no_case_of_two_thousand_breaks_it(schema):
    assert sum(try_all(schema, 2_100).values()) >= 2_000


def test_what_is_not_as_documented_is_found(schema):
    raw = deepcopy(schema.raw_schema)
    content = raw["paths"]["/v1/models"]["get"]["responses"]["200"]["content"]["application/json"]
    content["schema"] = {"type": "array"}
    wrong = schemathesis.openapi.from_dict(raw)
    wrong.config.update(base_url=schema.get_base_url())
    with pytest.raises(BaseException, match="Response violates schema"):
        try_out(wrong["/v1/models"]["GET"], GenerationMode.POSITIVE, 1)
