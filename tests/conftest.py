"""What every test starts with."""

import pytest
from accelerate.state import GradientState


@pytest.fixture(autouse=True)
def synced_gradients():
    """accelerate's state outlives a trainer that broke off between two optimizer steps, as some tests make it do."""
    GradientState._reset_state()
