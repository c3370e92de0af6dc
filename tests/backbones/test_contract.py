"""What every registered backbone promises; the table is timm's registry, so a new name is tested at once.

The fast tier takes one name per family; `make test-all` takes all.
"""

import pytest
import timm
import torch
from torch import nn

import visattn
from visattn.backbones import FAMILIES

assert visattn.__version__
FAST = {next(name for name, module in FAMILIES.items() if module is each) for each in FAMILIES.values()}
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def example(model, size=None):
    """A batch of two random images of the size that the configuration of `model` names, or of `size`."""
    shape = model.default_cfg.get("input_size")
    if shape is None:  # volumes, which timm's records do not know
        return torch.randn(2, model.in_chans, *(size or (40, 33, 37)), generator=torch.Generator().manual_seed(0))
    return torch.randn(2, shape[0], *(size or shape[1:]), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_classifies(name):
    model = timm.create_model(name, num_classes=7).eval()
    x = example(model)
    with torch.no_grad():
        features = model.forward_features(x)
        logits = model(x)
        assert logits.shape == (2, 7)
        assert logits.isfinite().all()
        assert torch.equal(model.forward_head(features), logits)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        assert torch.equal(model.get_classifier()(pooled), logits)
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
