"""A run that nobody disturbs, and a release of a few random bytes with a hub to publish it to."""

import pytest

from tests.e2e.faults.runs import undisturbed
from tests.publishing.conftest import finished, hub  # noqa: F401

SETTINGS = {"method": "lora", "variants": ["int4"]}


@pytest.fixture(scope="package")
def whole(tmp_path_factory, tiny_model):
    """A finished run, and when its events came."""
    with undisturbed(tmp_path_factory.mktemp("undisturbed"), tiny_model("qwen3"), **SETTINGS) as found:
        yield found
