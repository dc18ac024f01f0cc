"""What tests of plans on pipelines share, unless a module has its own."""

import pytest
from tiny_attached import Case, make_case


@pytest.fixture(params=["dit", "sigma"])
def case(request, tmp_path) -> Case:
    return make_case(request.param, tmp_path)


@pytest.fixture
def dit(tmp_path) -> Case:
    return make_case("dit", tmp_path)


@pytest.fixture
def pixart(tmp_path) -> Case:
    return make_case("sigma", tmp_path)
