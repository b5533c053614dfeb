"""What the heavy tests share."""
import pytest
import torch

from support.toy import build_toy


@pytest.fixture(autouse=True)
def one_thread():
    """One CPU thread for each test. (The tensors are tiny: a second thread would only wait, and on
    a busy machine wait long.)"""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy's files, as settings: model, data and eval_data. No test may change them."""
    return build_toy(str(tmp_path_factory.mktemp("toy") / "toy"), seed=0)
