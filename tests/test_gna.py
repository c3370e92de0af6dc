"""`visattn gna`: what it prints are the simulator's counts, and mistakes are told in a few lines."""

import json

import numpy as np
import pytest
from PIL import Image

from visattn.attention import simulate
from visattn.cli import main


def counted(capsys, *arguments):
    assert main(["gna", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_counts_are_those_of_the_definition(capsys):
    found = counted(capsys, "--size", "10x12", "--kernel", "3x4", "--stride", "2", "--causal", "1", "--tile_q", "2x4",
                    "--tile_kv", "2x2", "--head_dim", "16")  # fmt: skip
    wanted = simulate((10, 12), (3, 4), 2, 1, (False, True), (2, 4), (2, 2))
    needed = int(wanted.mask().sum())
    assert found["causal"] == [False, True]
    assert found["products"]["needed"] == needed
    assert found["products"]["computed"] == wanted.computed
    assert found["products"]["full_attention"] == 120**2
    assert found["flops"] == 4 * 16 * needed
    assert found["bytes"] == 4 * 120 * 16 * 2
    assert found["speedup_on_tiles"] == wanted.speedup
    assert found["speedup_bound"] == 120**2 / needed
    assert (found["tile_q"], found["tile_kv"]) == ([2, 4], [2, 2])
    assert found["best_tile"]["computed"] == wanted.best_tile().computed <= wanted.computed


def test_tiles_are_the_best_where_none_are_given(capsys):
    free = counted(capsys, "--size", "56x56", "--kernel", "7")
    for shape in ("8x8", "4x16", "64x1"):
        fixed = counted(capsys, "--size", "56x56", "--kernel", "7", "--tile_q", shape)
        assert fixed["tile_q"] == [int(side) for side in shape.split("x")]
        assert np.prod(fixed["tile_kv"]) == 64
        assert free["products"]["computed"] <= fixed["products"]["computed"]


def test_nearby_settings_waste_nothing(capsys):
    near = counted(capsys, "--size", "24x40", "--kernel", "7")["nearby_block_sparse"]
    assert near[0]["kernel"] == near[0]["stride"] == [8, 8]
    for each in near:
        again = simulate((24, 40), each["kernel"], each["stride"], tile_q=each["tile_q"], tile_kv=each["tile_kv"])
        assert again.computed == again.pairs == each["needed"]
    blocked = ("--size", "16", "--kernel", "8", "--stride", "8", "--tile_q", "8", "--tile_kv", "8")
    itself = counted(capsys, *blocked)
    assert itself["block_sparse"]
    assert all((each["kernel"], each["stride"]) != ([8], [8]) for each in itself["nearby_block_sparse"])


def test_the_table_says_it_in_words(capsys):
    assert main(["gna", "--size", "56x56", "--kernel", "7x7", "--dilation", "1x2", "--causal", "0,1"]) == 0
    out = capsys.readouterr().out
    for words in ("56x56", "kernel 7x7", "dilation 1x2", "causal on axis 0, 1", "full attention: 1,258,815,488"):
        assert words in " ".join(out.split())
    assert main(["gna", "--size", "20", "--kernel", "7", "--tile_q", "3", "--tile_kv", "5"]) == 0
    assert "No setting" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["17", "9x12", "4x6x5"])
def test_the_picture_shows_which_tiles_are_computed(capsys, tmp_path, size):
    picture = tmp_path / "mask.png"
    assert main(["gna", "--size", size, "--kernel", "3", "--picture", str(picture)]) == 0
    assert str(picture) in capsys.readouterr().out.replace("\n", "")
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape[1] > pixels.shape[0] > 500
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--size": "56y56"}, "--size 56y56"),
        ({"--size": "0x5"}, "--size 0x5"),
        ({"--size": "4x4x4x4"}, "one to three axes"),
        ({"--size": "1000000"}, "at most 65536"),
        ({"--kernel": "3x3x3"}, "each of the 2 axes"),
        ({"--kernel": "seven"}, "--kernel seven"),
        ({"--kernel": "1"}, "kernel_size"),
        ({"--kernel": "13"}, "at most 12"),
        ({"--stride": "4"}, "stride must not exceed"),
        ({"--causal": "2"}, "from 0 to 1"),
        ({"--causal": "0;1"}, "--causal 0;1"),
        ({"--tile_q": "8x"}, "--tile_q 8x"),
        ({"--tile_kv": "1000x1000"}, "at most 65536 positions"),
        ({"--head_dim": "8x8"}, "--head_dim 8x8"),
        ({"--picture": "mask.jpg"}, "mask.jpg"),
        ({"--size": "700x700", "--tile_q": "4x4", "--picture": "mask.png"}, "too many to draw"),
    ],
)
def test_mistakes_are_told_in_a_line(capsys, tmp_path, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    settings = {"--size": "12x12", "--kernel": "3"} | changed
    assert main(["gna", *(part for pair in settings.items() for part in pair)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("visattn: error: ")
    assert message in error
    assert len(error.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []
