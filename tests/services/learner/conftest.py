"""Settings of the learner's tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """As in the service: threads of several processes on one machine would spin against each other."""
    torch.set_num_threads(1)
