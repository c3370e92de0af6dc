import json

import pytest
import timm
import torch

import visattn
from visattn.errors import UserError


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("va_pyramid_tiny", num_classes=3, in_chans=2, attention="conv").eval()


def test_a_model_comes_back_whole(model, tmp_path):
    visattn.save_pretrained(model, tmp_path / "out", licence="cc-by-4.0", notes="Trained on drawings.")
    x = torch.randn(1, 2, 33, 47)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    again = visattn.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        maps = visattn.from_pretrained(tmp_path / "out", features_only=True)(x)
        assert torch.equal(maps[-1], model.forward_intermediates(x, intermediates_only=True)[-1])
        by_timm = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        assert torch.equal(by_timm(x), model(x))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert "Trained on drawings." in card
    assert visattn.NOTICE in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"] == "va_pyramid_tiny"


def test_nothing_is_overwritten_and_nothing_pickled_is_read(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        visattn.save_pretrained(model, tmp_path / "full", licence="other")
    with pytest.raises(UserError, match="whole model"):
        visattn.save_pretrained(torch.nn.Linear(1, 1), tmp_path / "new", licence="other")
    with pytest.raises(UserError, match=r"no config\.json"):
        visattn.from_pretrained(tmp_path / "full")
    (tmp_path / "full" / "config.json").write_text("{}")
    torch.save({}, tmp_path / "full" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        visattn.from_pretrained(tmp_path / "full")
