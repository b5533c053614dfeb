"""What all heavy tests share."""
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: a second thread would only wait, and on a busy machine wait long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
