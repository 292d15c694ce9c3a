import pytest
import torch

from lightning_tdisent.diffusion.schedules import Linear
from lightning_tdisent.diffusion.states import LatentStates

INDEX = torch.tensor([0, 125, 250, 500, 750, 1000])


@pytest.fixture
def columns() -> list[LatentStates]:
    """Two tables of one column: the second has less signal everywhere."""
    table = Linear().log_snr()[INDEX][:, None]
    shift = torch.tensor([0.0, 2.0, 1.5, 1.0, 0.5, 0.25], dtype=torch.float64)[:, None]
    return [LatentStates.from_table(t, INDEX, Linear()) for t in (table, table - shift)]


@pytest.fixture
def both(columns) -> LatentStates:
    """The two tables side by side."""
    return LatentStates.from_table(torch.cat([c.log_snr for c in columns], 1), INDEX, Linear())
