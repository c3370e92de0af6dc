"""The recipes of U-shaped networks: each as written but for size; the polyp recipes train in test_fit.py too."""

import csv
from pathlib import Path

import pytest
import torch

from visattn.cli import main
from visattn.data import cases, volume_case
from visattn.fit import parse
from visattn.losses import build_loss
from visattn.networks import create_model
from visattn.recipe import resolve

SMALL = {  # recipe: input size, and what its data are called
    "hippocampus_unet3d_dina": ((16, 16, 16), "phantom:hippocampus"),
    "hippocampus_unet3d_maxvit": ((16, 16, 16), "phantom:hippocampus"),
    "nuclei_unet_ela": ((64, 64), "phantom:nuclei"),
    "polyp_pranet_dinat": ((64, 64), "phantom"),
    "polyp_unet_biformer": ((64, 64), "phantom"),
    "skin_attswinunet": ((64, 64), "phantom:skin"),
    "vessels_unet_halo": ((64, 64), "phantom:vessels"),
}


@pytest.fixture
def few(monkeypatch):
    """Phantoms of a few cases: hundreds take seconds to draw."""
    monkeypatch.setattr(cases, "PHANTOM_COUNT", 10)
    monkeypatch.setattr(volume_case, "PHANTOM_COUNT", 5)
    cases.embedded.cache_clear()
    yield
    cases.embedded.cache_clear()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("skin") else []) for name in SMALL]
)
def test_a_step_of_the_network_as_written(name):
    size, root = SMALL[name]
    _, tree = resolve([name], [])
    task, data = parse(tree).build()
    assert data.description == f"{root} (embedded, synthetic)"
    channels = 3 if len(size) == 2 else 1
    config = {**task.config["network"], "in_channels": channels, "classes": data.labels.channels}
    torch.manual_seed(0)
    network, loss = create_model(**config), build_loss(task.config["loss"], data.labels)
    target = torch.randint(len(data.labels.names), (2, *size))
    maps = network(torch.randn(2, channels, *size) + target[:, None])
    value = loss(maps, target)
    assert value.isfinite()
    value.backward()
    without = [key for key, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def fit(name: str, folder: Path, *more: str) -> Path:
    size, _ = SMALL[name]
    words = ["--data.size" if len(size) == 2 else "--data.patch", str(list(size)), "--data.num_workers", "0"]
    words += ["--data.batch_size", "2", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    words += ["--trainer.accelerator", "cpu"]
    if len(size) == 3:
        words += ["--data.cache_dir", str(folder / "cache"), "--data.iterations_per_epoch", "2"]
    assert main(["fit", "--config", name, "--run", str(folder / "run"), *words, *more]) == 0
    return folder / "run"


def test_a_recipe_trains_on_its_phantom(few, tmp_path, capsys):
    run = fit("nuclei_unet_ela", tmp_path)
    told = capsys.readouterr().err
    assert "network: unet over va_resnet18_ela_l" in told
    assert "FLOPs for 3 x 64 x 64\nmemory: about" in told
    assert "for a step of 2 in 16 bits" in told
    assert "phantom:nuclei (embedded, synthetic)" in (run / "report.html").read_text()
    assert "Synthetic images" in (run / "report.html").read_text()
    with (run / "cases.csv").open(newline="") as handle:
        assert {row["class"] for row in csv.DictReader(handle)} == {"nucleus"}
    assert list((run / "overlays").glob("*.png")), "drawn again by name"


@pytest.mark.slow  # trains every network at its full width
@pytest.mark.parametrize("name", [name for name in SMALL if name != "nuclei_unet_ela"])
def test_every_recipe_trains_as_written_but_for_size_and_epochs(few, name, tmp_path):
    run = fit(name, tmp_path)
    assert (run / "report.html").is_file()
    assert list((run / "overlays").glob("*.png"))
