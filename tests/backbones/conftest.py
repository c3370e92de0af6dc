import pytest
import torch


@pytest.fixture(scope="session")
def randomised():
    """`randomised(model)`: in double precision, with weights and statistics all different from their beginning."""

    def randomise(model):
        generator = torch.Generator().manual_seed(1)
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.is_floating_point():
                value += 0.05 * torch.randn(value.shape, generator=generator)
        return model.double().eval()

    return randomise
