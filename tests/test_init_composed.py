"""Recipes that init writes for a network, attention or backbone by name."""

from pathlib import Path

import pytest

from visattn.attention import ATTENTION
from visattn.cli import main
from visattn.data.phantom import write_phantom
from visattn.data.phantom_hippocampus import write_hippocampi
from visattn.errors import UserError
from visattn.init.budget import choose_network, plan_budget
from visattn.init.composed import Wanted, _cost, network_for, wanted_arguments
from visattn.init.machine import Machine
from visattn.init.volume_grid import plan_levels
from visattn.labels import Labels
from visattn.networks import NETWORKS, create_model
from visattn.recipe import read_yaml, resolve
from visattn.recipe_cli import parse

CPU = Machine(2, 8 * 2**30)
GPU = Machine(16, 128 * 2**30, "cuda", "H200", 140 * 2**30, 1, "bf16-mixed")
LABELS = Labels.from_config({"background": 0, "a": 1, "b": 2})
CUBES = plan_levels((64, 64, 64), (1, 1, 1))
SLABS = plan_levels((16, 64, 64), (4, 1, 1))


@pytest.fixture(scope="module")
def nuclei(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "nuclei"
    write_phantom(folder, 10, 3, (64, 64), "nuclei")
    return folder


@pytest.fixture(scope="module")
def hippocampi(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "hippocampi"
    write_hippocampi(folder, 6, 3)
    return folder


def written(folder: Path, output: Path, *words: str) -> dict:
    assert main(["init", str(folder), "--output", str(output), *words]) == 0
    _, tree = resolve([str(output)], [])
    parse(tree).build()
    return read_yaml(output.read_text(), "recipe")


def test_images_get_the_network_that_is_asked_for(nuclei, tmp_path, capsys):
    tree = written(nuclei, tmp_path / "r.yaml", "--network", "unet", "--attention", "neighborhood")
    network = tree["model"]["init_args"]["network"]
    assert (network["name"], network["backbone_args"]) == ("unet", {"attention": "neighborhood"})
    assert network["backbone"].startswith("va_pyramid_")
    assert "unet with neighborhood attention (va_pyramid_" in capsys.readouterr().out
    tree = written(nuclei, tmp_path / "b.yaml", "--backbone", "resnet10t")
    assert tree["model"]["init_args"]["network"] == {"name": "unet", "backbone": "resnet10t", "pretrained": False}
    assert "pretrained: true" in (tmp_path / "b.yaml").read_text()
    assert "pretrained: true" not in (tmp_path / "r.yaml").read_text(), "there are no weights of va_pyramid to download"


def test_volumes_get_the_network_that_is_asked_for(hippocampi, tmp_path):
    tree = written(hippocampi, tmp_path / "r.yaml", "--attention", "halo")
    network, optimizer = (tree["model"]["init_args"][key] for key in ("network", "optimizer"))
    assert (network["name"], network["dims"], network["backbone_args"]["attention"]) == ("unet", 3, "halo")
    assert optimizer["name"] == "adamw"
    tree = written(hippocampi, tmp_path / "u.yaml", "--network", "unet3d")
    assert "filters" in tree["model"]["init_args"]["network"], "the measured default keeps its own plan"


@pytest.mark.slow  # trains
def test_a_recipe_for_volumes_trains(hippocampi, tmp_path):
    written(hippocampi, tmp_path / "r.yaml", "--network", "fpn", "--attention", "window")
    small = ["--model.network.width", "8", "--model.network.branch_width", "8", "--data.patch", "[16, 16, 16]"]
    short = ["--data.batch_size", "2", "--trainer.max_epochs", "1", "--data.iterations_per_epoch", "2"]
    short += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--data.num_workers", "0"]
    short += ["--trainer.check_val_every_n_epoch", "1", "--data.cache_dir", str(tmp_path / "cache")]
    assert main(["fit", "--config", str(tmp_path / "r.yaml"), "--run", str(tmp_path / "run"), *small, *short]) == 0
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--network", "unt"], ["unknown network 'unt'", "Did you mean 'unet'"]),
        (["--attention", "neigborhood"], ["unknown attention", "Did you mean 'neighborhood'"]),
        (["--backbone", "va_biformr_tiny"], ["unknown backbone", "Did you mean 'va_biformer_tiny'"]),
        (["--backbone", "resnet18", "--attention", "halo"], ["blocks of 'resnet18' are its own", "network.decoder"]),
        (["--network", "att_swin_unet", "--attention", "halo"], ["built of its own blocks", "fpn, linear"]),
    ],
)
def test_what_cannot_be_is_told_and_nothing_written(nuclei, tmp_path, words, messages, capsys):
    assert main(["init", str(nuclei), "--output", str(tmp_path / "r.yaml"), *words]) == 2
    error = capsys.readouterr().err
    assert all(message in error for message in messages), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_either_takes_the_data_or_is_refused(name, rank):
    if rank == 3 and name in ("pranet", "att_swin_unet"):
        with pytest.raises(UserError, match="takes images, and these are volumes"):
            wanted_arguments(Wanted(name), rank, CPU)
    else:
        assert NETWORKS[name] is NETWORKS[wanted_arguments(Wanted(name), rank, CPU)["name"]]


def test_slabs_get_strides_that_suit_them():
    thin, cubes = (network_for(LABELS, CPU, 1, levels, Wanted(attention="conv")) for levels in (SLABS, CUBES))
    assert "strides" not in cubes.arguments["backbone_args"]
    strides = thin.arguments["backbone_args"]["strides"]
    assert len(strides) == 4
    assert strides[0] == list(SLABS.strides[0]) == [1, 2, 2]
    create_model(**thin.arguments)


def test_patches_of_small_volumes_are_not_padded():
    levels = plan_levels((40, 56, 40), (1, 1, 1))
    assert levels.multiple == (8, 8, 8)
    network = create_model(**network_for(LABELS, CPU, 1, levels, Wanted(attention="grid")).arguments)
    assert network.padded_size((40, 56, 40)) == (40, 56, 40)


def test_computed_costs_agree_with_measured_ones():
    """The networks that init picks by itself were measured; the same ones, computed, come near."""
    for levels, name in ((None, "pranet"), (CUBES, "unet3d")):
        measured = choose_network(LABELS, CPU, levels)
        parameters, kept, (_, seconds) = _cost(
            repr(measured.arguments), 3 if levels is None else 1, LABELS.channels, 2 if levels is None else 3
        )
        assert parameters == pytest.approx(measured.parameters, rel=0.1), name
        assert kept == pytest.approx(measured.pixel_bytes, rel=0.6), name
        assert seconds == pytest.approx(measured.seconds[1], rel=0.5), name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--network", "att_swin_unet"], 224),  # it pads smaller images to 224, so that windows fill every map
        (["--backbone", "eva02_tiny_patch14_224"], 224),  # patches of 14 in multiples of 32
        (["--backbone", "coatnet_pico_rw_224"], 224),  # takes nothing else
    ],
)
def test_the_size_is_one_that_the_network_does_not_pad(nuclei, tmp_path, words, expected):
    tree = written(nuclei, tmp_path / "r.yaml", *words)
    size = tree["data"]["init_args"]["size"]
    assert size == expected
    network = create_model(**tree["model"]["init_args"]["network"])
    assert network.padded_size((size, size)) == (size, size)
    text = (tmp_path / "r.yaml").read_text()
    reason = "the network takes no other size" if "coatnet" in words[1] else "the least that the network does not pad"
    assert reason in text


def test_large_images_get_the_nearest_size_without_padding():
    windows = Wanted(backbone="maxvit_rmlp_pico_rw_256")  # of timm; ours masks what windows do not fill
    network = network_for(LABELS, GPU, 3, None, windows)
    assert (network.multiple, network.smallest, network.only) == (256, 256, None)
    sizes = {side: plan_budget(network, GPU, [(side, side)], 100, 10).size for side in (100, 300, 390, 2000)}
    assert sizes == {100: (256, 256), 300: (256, 256), 390: (512, 512), 2000: (512, 512)}
    assert all(side % 256 == 0 for side in plan_budget(network, GPU, [(300, 600)], 100, 10).size)


def test_nothing_wanted_is_the_default():
    for levels, channels in ((None, 3), (CUBES, 1)):
        assert network_for(LABELS, GPU, channels, levels, Wanted()) == choose_network(LABELS, GPU, levels)
    assert set(ATTENTION) >= {"halo", "window"}
