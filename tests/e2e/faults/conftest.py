"""An undisturbed run to compare with."""

import pytest

from tests.e2e.faults.runs import SETTINGS, undisturbed


@pytest.fixture(scope="package")
def whole(tmp_path_factory, tiny_model):
    """A finished run, and when its events came."""
    with undisturbed(tmp_path_factory.mktemp("undisturbed"), tiny_model("qwen3"), **SETTINGS) as found:
        yield found
