import csv
import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from visattn.cli import main
from visattn.data.image_mask_folder import ImageMaskFolder
from visattn.data.phantom import write_phantom
from visattn.errors import UserError
from visattn.init import write_recipe
from visattn.init.budget import CPU_SECONDS, MULTIPLE, choose_network, plan_budget
from visattn.init.machine import Machine, this_machine
from visattn.init.text import Line, one_line, render, scalar
from visattn.labels import Labels
from visattn.recipe import read_yaml, resolve
from visattn.recipe_cli import parse

CPU = Machine(2, 8 * 2**30)
GPU = Machine(16, 64 * 2**30, "cuda", "A100", 40 * 2**30, 2, "bf16-mixed")
SMALL_GPU = Machine(4, 16 * 2**30, "cuda", "T4", 4 * 2**30, 1, "16-mixed")


def draw(folder, stem, values=(0, 255), shape=(48, 64), deep=False, colour=True, layout=("images", "masks")):
    """One image of bright rectangles on noise, a rectangle for each class, and its mask."""
    rng = np.random.default_rng(list(f"{folder.name}/{stem}".encode()))
    mask = np.full(shape, values[0], np.uint8)
    image = rng.integers(0, 60, (*shape, 3) if colour else shape).astype(np.uint8)
    for number, value in enumerate(values[1:]):
        top, left = rng.integers(2, shape[0] - 20), 4 + 20 * number
        mask[top : top + 12, left : left + 12] = value
        image[top : top + 12, left : left + 12] = 150 + 40 * number
    for name, array in zip(layout, (image.astype(np.uint16) * 257 if deep else image, mask), strict=True):
        path = folder / name / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def phantom(folder):
    write_phantom(folder, 12, seed=5, size=(48, 64))


def three_classes(folder):
    for number in range(10):
        draw(folder, f"scan{number}", (0, 1, 2))


def deep_grey(folder):
    for number in range(10):
        draw(folder, f"x{number}", deep=True, colour=False)


def zero_and_one(folder):
    for number in range(10):
        draw(folder, f"x{number}", (0, 1))


def patients(folder):
    for number in range(16):
        draw(folder, f"patient{number // 4:02d}_slice{number % 4}")


def parts(folder):
    for part, stems in {"train": "abcdef", "val": "gh", "test": "ij"}.items():
        for stem in stems:
            draw(folder / part, stem)


def two_folders(folder):
    for name in ("one", "two"):
        for number in range(6):
            draw(folder / name, str(number), layout=("image", "mask"))


def with_ignore(folder):
    for number in range(10):
        draw(folder, f"x{number}", (0, 1, 255))


def videos(folder):
    """Three videos of ten frames whose file names only count on, as in CVC-ClinicDB."""
    for video in range(3):
        rng = np.random.default_rng(video)
        scene = cv2.GaussianBlur(rng.random((96, 160, 3)), (0, 0), 4)
        scene = ((scene - scene.min()) / np.ptp(scene) * 255).astype(np.uint8)
        for frame in range(10):
            number = 10 * video + frame
            draw(folder, f"{number:03d}")
            image = scene[16 : 16 + 48, frame : frame + 64]
            Image.fromarray(np.ascontiguousarray(image)).save(folder / "images" / f"{number:03d}.png")


DATA = [phantom, three_classes, deep_grey, zero_and_one, patients, parts, two_folders, with_ignore, videos]


def init(folder, output, machine=CPU, **keywords):
    return write_recipe(folder, output, machine=machine, **keywords)


def values_of(path):
    name, tree = resolve([str(path)], [])
    assert name == path.stem
    return tree["model"]["init_args"], tree["data"]["init_args"], tree["trainer"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Recipes are written where the reader stands, with relative paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("prepare", "machine"),
    [*((prepare, CPU) for prepare in DATA), (three_classes, GPU), (deep_grey, SMALL_GPU), (parts, GPU)],
)
def test_the_recipe_is_valid_and_its_data_loads(prepare, machine, here, capsys):
    prepare(here / "data")
    assert init(here / "data", here / "recipe.yaml", machine) == 0
    _, tree = resolve([str(here / "recipe.yaml")], [])
    parse(tree)
    data = ImageMaskFolder(**tree["data"]["init_args"])
    data.setup("fit")
    train, val = data.cases["train"], data.cases["val"]
    assert train
    assert val
    assert not {case.group for case in train} & {case.group for case in val}
    batch = next(iter(data.train_dataloader()))
    assert tuple(batch["image"].shape[-2:]) == data.preprocessing.size
    assert len(batch["case"]) == tree["data"]["init_args"]["batch_size"]
    said = capsys.readouterr().out
    assert f"visattn fit --config {shlex.quote(str(here / 'recipe.yaml'))}" in said
    assert "visattn doctor" in said
    assert "visattn predict" in said


def test_what_the_data_decides(here):
    for prepare in DATA:
        prepare(here / prepare.__name__)
        assert init(here / prepare.__name__, here / f"{prepare.__name__}.yaml") == 0
    read = {prepare.__name__: values_of(here / f"{prepare.__name__}.yaml") for prepare in DATA}
    model, data, _ = read["phantom"]
    assert data["labels"] == {"background": 0, "foreground": 255}
    assert (data["channels"], data["mean"], data["size"]) == (3, None, 64)
    assert model["loss"]["name"] == "structure"
    assert "flip_vertical" in [entry["name"] for entry in data["augment"]]
    model, data, _ = read["three_classes"]
    assert data["labels"] == {"background": 0, "label_1": 1, "label_2": 2}
    assert model["loss"]["name"] == "dice_ce"
    _, data, _ = read["deep_grey"]
    assert data["channels"] == len(data["mean"]) == len(data["std"]) == 1
    assert 0.1 < data["mean"][0] < 0.25
    assert "flip_vertical" not in [entry["name"] for entry in data["augment"]]
    assert read["zero_and_one"][1]["labels"] == {"background": 0, "foreground": 1}
    assert re.search(read["patients"][1]["split"]["group_by"], "patient07_slice3")[1] == "patient07"
    assert read["with_ignore"][1]["labels"] == {"background": 0, "foreground": 1}
    assert read["with_ignore"][1]["ignore"] == 255


def test_parts_of_the_folders_are_kept(here):
    parts(here / "data")
    assert init(here / "data", here / "recipe.yaml") == 0
    _, arguments, _ = values_of(here / "recipe.yaml")
    data = ImageMaskFolder(**arguments)
    data.setup("fit")
    data.setup("test")
    assert {part: [case.image.stem for case in cases] for part, cases in data.cases.items()} == {
        "train": list("abcdef"),
        "val": list("gh"),
        "test": list("ij"),
    }


def test_frames_of_a_video_stay_together(here):
    videos(here / "data")
    assert init(here / "data", here / "recipe.yaml") == 0
    with (here / "recipe.groups.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    groups = [row["group"] for row in sorted(rows, key=lambda row: row["file"])]
    assert len(groups) == 30
    assert [index for index, (a, b) in enumerate(pairwise(groups)) if a != b] == [9, 19]


def test_equal_names_in_two_folders_with_twins(here):
    two_folders(here / "data")
    for part, layout in (("image", "image"), ("mask", "mask")):
        twin = here / "data" / "two" / layout / "9.png"
        twin.write_bytes((here / "data" / "one" / part / "3.png").read_bytes())
    assert init(here / "data", here / "recipe.yaml") == 0
    data = ImageMaskFolder(**values_of(here / "recipe.yaml")[1])
    data.setup("fit")
    group = {case.name: case.group for cases in data.cases.values() for case in cases}
    assert group["two/9"] == group["one/3"] == group["two/3"] != group["one/4"]


def test_the_same_data_and_machine_give_the_same_file(here):
    videos(here / "data")
    texts = []
    for _ in range(2):
        init(here / "data", here / "recipe.yaml", overwrite=True)
        texts.append([(here / f"recipe.{ending}").read_bytes() for ending in ("yaml", "groups.csv")])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("prepare", [three_classes, deep_grey, parts, with_ignore, videos])
def test_every_value_says_why(prepare, here):
    prepare(here / "data")
    init(here / "data", here / "recipe.yaml", GPU)
    lines = (here / "recipe.yaml").read_text().splitlines()
    for before, line in pairwise(lines):
        bare, _, comment = line.partition(" # ")
        if bare.startswith("#") or bare.lstrip().startswith("#") or bare.endswith(":"):
            continue
        above = before.strip().startswith("#") and re.match(r" *", before)[0] == re.match(r" *", line)[0]
        assert comment or above, line
    assert all(len(line) <= 120 for line in lines[9:] if " # " in line or line.lstrip().startswith("#"))


def test_refuses_to_overwrite(here, capsys):
    parts(here / "data")
    arguments = ["init", str(here / "data"), "--output", str(here / "recipe.yaml")]
    assert main(arguments) == 0
    before = (here / "recipe.yaml").read_bytes()
    capsys.readouterr()
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    (here / "recipe.yaml").unlink()
    assert main(arguments) == 2  # the file of the split is in the way
    assert "recipe.splits.json" in capsys.readouterr().err
    assert not (here / "recipe.yaml").exists()
    assert main([*arguments, "--overwrite"]) == 0
    assert (here / "recipe.yaml").read_bytes() == before
    assert json.loads((here / "recipe.splits.json").read_text())["val"] == ["val/g", "val/h"]


def blank(folder):
    for number in range(4):
        draw(folder, f"x{number}", (0,))


def one(folder):
    draw(folder, "x")


def not_masks(folder):
    for number in range(4):
        draw(folder, f"x{number}")
        ramp = np.tile(np.arange(256, dtype=np.uint8), (48, 1))[:, 32:-32][:, ::3]
        Image.fromarray(ramp).save(folder / "masks" / f"x{number}.png")


def nothing(folder):
    folder.mkdir()


@pytest.mark.parametrize("prepare", [blank, one, not_masks, nothing, lambda folder: None])
def test_unusable_data_writes_nothing(prepare, here, capsys):
    prepare(here / "data")
    before = sorted(here.rglob("*"))
    assert main(["init", str(here / "data"), "--output", str(here / "new" / "recipe.yaml")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("visattn: error: ")
    assert len(message.splitlines()) <= 6
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("output", ["recipe.txt", "recipe", "data"])
def test_output_must_be_a_recipe(output, here):
    phantom(here / "data")
    with pytest.raises(UserError, match="--output"):
        init(here / "data", here / output)


def test_problems_are_listed_with_where_to_learn_more(here, capsys):
    phantom(here / "data")
    (here / "data" / "masks" / "phantom_0003.png").unlink()
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(here / "data" / "masks" / "phantom_0004.png")
    image = here / "data" / "images" / "phantom_0005.png"
    image.write_bytes(image.read_bytes()[:100])
    assert init(here / "data", here / "recipe.yaml") == 1
    said = capsys.readouterr()
    assert "3 problems" in said.err
    assert all(f"phantom_000{number}.png" in said.err for number in (3, 4, 5))
    assert f"visattn doctor {shlex.quote(str(here / 'data'))}" in said.err
    assert values_of(here / "recipe.yaml")[1]["labels"] == {"background": 0, "foreground": 255}


@pytest.mark.parametrize(
    "name", ["a b", "it's", 'say "x"', "a\nmodel: {}", "5e-4", "null", "#x", "\x1b[31m", "ü", "- a"]
)
def test_hostile_names_stay_names(name, here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    phantom(here / name)
    assert init(Path(name), here / "recipe.yaml") == 0
    assert values_of(here / "recipe.yaml")[1]["root"] == name
    text = (here / "recipe.yaml").read_text() + capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in text)


def test_16_bit_images_that_are_nearly_black(here, capsys):
    for number in range(8):
        draw(here / "data", f"x{number}", colour=False)
        image = np.random.default_rng(number).integers(0, 4096, (48, 64)).astype(np.uint16)
        Image.fromarray(image).save(here / "data" / "images" / f"x{number}.png")
    assert init(here / "data", here / "recipe.yaml") == 0
    assert "grey levels are left" in capsys.readouterr().out


LABELS = {"two": Labels.from_config({"a": 0, "b": 1}), "five": Labels.from_config({str(i): i for i in range(5)})}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(LABELS)),
    st.lists(st.tuples(st.integers(8, 4000), st.integers(8, 4000)), min_size=1, max_size=5),
    st.integers(1, 50_000),
    st.integers(1, 5000),
    st.integers(1, 128),
    st.sampled_from([0, 2, 4, 8, 24, 80, 141]),
)
def test_every_budget_can_be_paid(labels, sizes, training, validation, cores, gigabytes):
    machine = Machine(cores, 2**35, "cuda", "x", gigabytes * 2**30, 1) if gigabytes else Machine(cores, 2**35)
    network = choose_network(LABELS[labels], machine)
    budget = plan_budget(network, machine, sizes, training, validation)
    height, width = budget.size
    assert height % MULTIPLE == width % MULTIPLE == 0
    assert min(height, width) >= 64
    assert 1 <= budget.epochs <= 300
    assert budget.batch >= 2
    assert budget.batch <= max(2, training // 2)
    assert budget.seconds > 0
    if not gigabytes:
        small = height * width <= 128 * 128
        assert budget.seconds <= CPU_SECONDS or (small and budget.epochs == 1) or budget.epochs == 1
        assert budget.accumulate == 1
    elif gigabytes >= 4 and max(height, width) < 4 * min(height, width):
        assert budget.batch * network.pixel_bytes * height * width <= 0.8 * gigabytes * 2**30


def test_more_memory_buys_more(here):
    network = choose_network(LABELS["two"], GPU)
    sizes, pixels = [(1000, 1000)], []
    for gigabytes in (4, 8, 16, 24, 80):
        machine = Machine(8, 2**36, "cuda", "x", gigabytes * 2**30, 1)
        budget = plan_budget(network, machine, sizes, 1000, 100)
        pixels.append(budget.batch * budget.size[0] * budget.size[1])
        assert budget.batch * budget.accumulate == 16
    assert pixels == sorted(pixels)
    assert pixels[0] < pixels[-1]


def test_more_cores_buy_more():
    network = choose_network(LABELS["two"], CPU)
    budgets = [plan_budget(network, Machine(cores, 2**36), [(1000, 1000)], 300, 30) for cores in (1, 2, 4, 8)]
    areas = [budget.size[0] * budget.size[1] for budget in budgets]
    assert areas == sorted(areas)
    assert areas[0] < areas[-1]
    assert len({budget.epochs for budget in budgets}) == 1  # time is saved on the size before it is on the epochs


def test_a_gpu_in_the_recipe(here):
    phantom(here / "data")
    init(here / "data", here / "large.yaml", GPU)
    model, _, trainer = values_of(here / "large.yaml")
    assert (trainer["precision"], trainer["devices"]) == ("bf16-mixed", 1)
    assert model["network"]["backbone"] == "res2net50d"
    init(here / "data", here / "cpu.yaml", CPU)
    model, _, trainer = values_of(here / "cpu.yaml")
    assert trainer["precision"] == "32-true"
    assert "devices" not in trainer
    assert model["network"]["backbone"] == "resnet18"


def test_this_machine_without_a_gpu_needs_no_torch(tmp_path):
    phantom(tmp_path / "data")
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory > 2**28
    if machine.device != "cpu":
        pytest.skip("this machine has a GPU, which torch is asked about")
    code = (
        "import sys; from visattn.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 7 * bool({'torch', 'lightning'} & set(sys.modules)))"
    )
    words = ["init", str(tmp_path / "data"), "--output", str(tmp_path / "recipe.yaml")]
    assert subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True).returncode == 0


# No recipe holds a NUL character: the reader refuses it.
KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=6)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**9), 10**9)
        | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
        | st.floats(1e-6, 1e5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_values_are_read_back(value):
    def rounded(item):  # numbers are written to seven digits
        if isinstance(item, dict):
            return {key: rounded(below) for key, below in item.items()}
        if isinstance(item, list):
            return [rounded(below) for below in item]
        return pytest.approx(item, rel=1e-5) if isinstance(item, float) else item

    text = render([], [Line(0, "key", value, "why\n: {")])
    assert read_yaml(text, "test") == {"key": rounded(value)}


def test_scalars_look_as_people_write_them():
    assert [scalar(item) for item in (5e-4, 0.25, 16, None, True, "images/x", "^(a|b)\\d", [1, "x"])] == [
        "5e-4", "0.25", "16", "null", "true", "images/x", "'^(a|b)\\d'", "[1, x]",
    ]  # fmt: skip
    assert one_line("a\nb\x1b[0m") == "a b [0m"


@pytest.mark.slow  # decodes hundreds of photographs, twice
@pytest.mark.parametrize("name", ["kvasir_seg", "cvc_clinicdb", "isic2017", "dsb2018_nuclei", "chase_db1"])
def test_real_sets(name, real_data, here, capsys):
    assert init(real_data / name, here / "recipe.yaml") == 0
    arguments = values_of(here / "recipe.yaml")[1]
    data = ImageMaskFolder(**arguments)
    data.setup("fit")
    assert data.cases["val"]
    thing = {"kvasir_seg": "polyp", "cvc_clinicdb": "polyp", "isic2017": "lesion", "dsb2018_nuclei": "nucleus"}
    assert arguments["labels"] == {"background": 0, thing.get(name, "vessel"): 255}
    if name == "cvc_clinicdb":  # the videos of the public part end at frames 25, 50, 67, 78 and 103
        home = {int(case.image.stem): part for part, cases in data.cases.items() for case in cases}
        for first, last in ((1, 25), (26, 50), (51, 67), (68, 78), (79, 103)):
            assert len({home[frame] for frame in range(first, last + 1)}) == 1
    if name == "chase_db1":
        sides = {case.image.stem[:-1]: part for part, cases in data.cases.items() for case in cases}
        assert all(sides[case.image.stem[:-1]] == part for part, cases in data.cases.items() for case in cases)


@pytest.mark.slow  # each trains a network for a few steps
@pytest.mark.parametrize("prepare", [phantom, three_classes, deep_grey, zero_and_one, patients, parts])
def test_the_recipe_trains(prepare, here, capsys):
    if prepare is phantom:
        assert main(["phantom", "data", "--count", "12", "--seed", "1"]) == 0
    else:
        prepare(here / "data")
    assert main(["init", "data", "--output", "recipe.yaml"]) == 0
    few = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2", "--run", "run"]
    assert main(["fit", "--config", "recipe.yaml", *few]) == 0
    assert (here / "run" / "checkpoints" / "best.ckpt").is_file()
    images = "data/val/images" if prepare is parts else "data/images"
    assert main(["predict", images, "--checkpoint", "run", "--output", "masks"]) == 0
    assert len(list((here / "masks").glob("*.png"))) == len(list((here / images).iterdir()))
