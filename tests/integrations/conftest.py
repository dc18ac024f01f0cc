"""What tests of plans on pipelines share, unless a module has its own."""

import pytest
import tiny_recorded_pipelines as recorded
from tiny_attached import Case, make_case

ONE = ("flux", "sd3", "wan 2.1", "z-image truncated")


@pytest.fixture(params=["dit", "sigma"])
def case(request, tmp_path) -> Case:
    return make_case(request.param, tmp_path)


@pytest.fixture
def dit(tmp_path) -> Case:
    return make_case("dit", tmp_path)


@pytest.fixture
def pixart(tmp_path) -> Case:
    return make_case("sigma", tmp_path)


@pytest.fixture(params=ONE)
def some(request) -> recorded.Case:
    return recorded.make_case(request.param)


@pytest.fixture
def flux() -> recorded.Case:
    return recorded.make_case("flux")
