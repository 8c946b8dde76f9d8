import warnings

import hypothesis
import pytest
import torch

warnings.filterwarnings("ignore", category=FutureWarning, module="dgl")
hypothesis.settings.register_profile("here", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("here")


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
