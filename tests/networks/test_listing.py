import json
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from visattn.attention import ATTENTION, FUSION
from visattn.backbones import FAMILIES
from visattn.cli import main
from visattn.errors import UserError
from visattn.networks import NETWORKS, create_model
from visattn.networks.listing import build_model, compositions
from visattn.summary import amount, summarise


def names(rows):
    return [row["name"] for row in rows]


def test_all_that_composes_is_listed():
    found = compositions("segmentation")
    assert names(found["networks"]) == list(NETWORKS)
    assert names(found["backbones"]) == list(FAMILIES)
    assert set(FUSION) < set(names(found["skips"]))
    assert set(ATTENTION) < set(names(found["decoders"]))
    assert names(found["attention"]) == list(ATTENTION)
    assert list(compositions("classification")) == ["backbones", "attention"]
    assert all(row["about"] and row["family"] for row in found["backbones"])
    assert list(compositions("segmentation", "va_nat*")) == ["backbones"]


def test_the_axes_that_are_listed_are_those_that_build():
    rows = {row["name"]: row for kind in ("skips", "attention") for row in compositions("segmentation")[kind]}
    assert rows["ela"]["input"] == "2-D, 3-D"
    assert rows["full"]["input"] == "1-D, 2-D, 3-D"
    network, channels = build_model("va_pyramid", 3, None, 4, {"depths": (1,), "widths": (8,), "strides": (2,)})
    assert channels == 1
    assert network(torch.randn(1, 1, 8, 8, 8)).shape == (1, 4)


def test_the_commands_list_and_refuse(capsys):
    assert main(["models", "--task", "segmentation", "--json"]) == 0
    assert names(json.loads(capsys.readouterr().out)["networks"]) == list(NETWORKS)
    assert main(["models", "--task", "classification"]) == 0
    text = capsys.readouterr().out
    assert "va_biformer_tiny" in text
    assert "neighborhood" in text
    assert main(["models", "va_dinat_m*"]) == 0
    assert "va_dinat_mini" in capsys.readouterr().out
    for words, message in (
        (["va_zz*"], "no model matches"),
        (["--tsak", "segmentation"], "Did you mean '--task'"),
        (["unet", "--decoder", "halo"], "without --size"),
        (["--size", "64"], "name of one model"),
        (["unett", "--size", "64"], "Did you mean 'unet'"),
        (["unet", "--size", "64", "--decodr", "halo"], "Did you mean 'decoder'"),
        (["unet", "--size", "64y64"], "is no size such as"),
        (["pranet", "--size", "64x64x64"], "images, not volumes"),
        (["va_biformer_tiny", "--size", "32x32x32"], "takes 2-D images"),
        (["unet", "--size", "32x32", "--dims", "3"], "--size has 2 numbers, so dims is 2"),
        (["unet", "--size", "32x32", "--in_channels", "no"], "in_channels must be a whole number"),
    ):
        assert main(["models", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_summary_counts_what_a_hand_counts():
    """A convolution 3 x 3 from 2 to 4 channels on 8 x 6 pixels, and a linear layer of 4 to 5 on each of them."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Flatten(2), nn.Conv1d(4, 5, 1, bias=False))
    found = summarise(net, (2, 8, 6), batch=3)
    assert found.parameters == found.trainable == 2 * 4 * 9 + 4 * 5
    assert found.layers == 2
    assert found.flops == 2 * 48 * (2 * 4 * 9 + 4 * 5)
    assert found.output == ((5, 48),)
    weights = 4 * found.parameters
    assert found.weight_bytes == weights
    assert found.predict_bytes == 4 * 48 * (4 + 5)  # both maps live when the second one is made
    assert found.inference_memory == weights + found.predict_bytes
    # Kept for the backward pass: both maps. The last one's squares, doubles and gradient then come beside it.
    first, last = 3 * 4 * 48 * 4, 3 * 4 * 48 * 5
    assert 0 <= found.step_bytes - (first + 4 * last) < 2 * weights
    # In 16 bits: the image and the first map by halves, and a copy of each weight; the loss stays in float32.
    mixed = 3 * 2 * 48 * 2 + first // 2 + weights // 2 + 4 * last
    assert 0 <= found.mixed_step_bytes - mixed < 2 * weights
    assert found.training_memory() == 3 * weights + found.step_bytes
    assert found.training_memory(mixed=True) == 3 * weights + found.mixed_step_bytes


def test_where_weights_outweigh_maps_the_optimiser_counts():
    found = summarise(nn.Sequential(nn.Flatten(), nn.Linear(300, 200, bias=False)), (3, 10, 10), batch=1)
    weights = 4 * 300 * 200
    assert weights < found.step_bytes < 2 * weights
    assert found.training_memory() == 5 * weights, "weight, gradient, two moments, and what the step makes of them"


def test_memory_grows_with_batch_and_size_and_weights_stay():
    net = create_model("unet3d", filters=(4, 8, 8), dims=2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    small, larger, more = (summarise(net, (1, side, side), batch) for side, batch in ((32, 2), (64, 2), (32, 4)))
    assert larger.flops == 4 * small.flops
    assert more.predict_bytes == small.predict_bytes
    assert more.step_bytes > 1.7 * small.step_bytes
    assert larger.step_bytes > 3 * small.step_bytes
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_checkpointing_is_seen_in_the_memory():
    plain, saving = (create_model("unet3d", filters=(8, 8), dims=2, checkpointing=on) for on in (False, True))
    assert summarise(saving, (1, 64, 64)).step_bytes < 0.8 * summarise(plain, (1, 64, 64)).step_bytes


def test_what_cannot_be_is_told():
    with pytest.raises(UserError, match="cannot be summarised for images of 3 x 16 x 16"):
        summarise(nn.Linear(7, 2), (3, 16, 16))
    assert [amount(n, "B") for n in (12, 1234, 56_789, 1.5e9, 2.345e12)] == [
        "12 B", "1.23 kB", "56.8 kB", "1.50 GB", "2.35 TB"
    ]  # fmt: skip


def test_the_command_prints_layers_parameters_operations_and_memory(capsys):
    arguments = ["--backbone", "va_pyramid", "--backbone_args", "{widths: [8, 16], depths: [1, 1], strides: [2, 2]}"]
    assert main(["models", "unet", "--size", "16x16x16", "--classes", "3", "--in-channels", "2", *arguments]) == 0
    text = capsys.readouterr().out
    network = create_model(
        "unet", dims=3, in_channels=2, classes=3, backbone="va_pyramid",
        backbone_args={"widths": [8, 16], "depths": [1, 1], "strides": [2, 2]},
    )  # fmt: skip
    assert f"parameters  {sum(p.numel() for p in network.parameters()):,}" in text
    for words in ("backbone.stages.1", "head.levels.0", "3 x 16 x 16 x 16", "FLOPs", "training", "bf16-mixed"):
        assert words in text
    assert main(["models", "va_pyramid_tiny", "--size", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == [[1000]]
    assert found["training_memory"] > found["inference_memory"] > 4 * found["parameters"]


@pytest.mark.slow  # builds every network
@pytest.mark.parametrize("name", [*NETWORKS, *(name for name in FAMILIES if name.endswith(("tiny", "_t", "mini")))])
def test_everything_can_be_summarised(name):
    rank = 3 if "3d" in name or name in ("agunet", "daunet") else 2
    network, channels = build_model(name, rank, None, None, {})
    side = 32 if rank == 3 else 224
    assert summarise(network, (channels, *(side,) * rank)).flops > 1e6


def test_the_page_names_what_there_is():
    page = (Path(__file__).resolve().parents[2] / "docs" / "networks.md").read_text()
    stored = page.partition("```text\nnetworks: ")[2].partition("\n```")[0]
    found = [
        textwrap.fill(f"{kind}: {', '.join(names(rows))}", 120, subsequent_indent="  ", break_on_hyphens=False)
        for kind, rows in compositions("segmentation").items()
    ]
    assert "networks: " + stored == "\n".join(found), "run the first block of docs/networks.md and paste what it prints"
