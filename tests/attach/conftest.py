"""What the tests of attachments share."""

import pytest
import torch.distributed as dist


@pytest.fixture
def alone():
    """A world of one rank in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
