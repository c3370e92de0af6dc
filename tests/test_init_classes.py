"""`visattn init` on data to classify: the recipe is valid, says why, and trains."""

import csv

import numpy as np
import pytest
from PIL import Image

from visattn.class_labels import ClassLabels
from visattn.cli import main
from visattn.data.class_phantom import phantom_classes
from visattn.data.image_folder import ImageFolder
from visattn.data.medmnist import MedMNIST
from visattn.init import write_recipe
from visattn.init.budget import choose_network
from visattn.init.class_recipe import make_class_plan
from visattn.init.class_survey import survey_classes
from visattn.init.machine import Machine
from visattn.labels import Labels
from visattn.recipe import resolve

CPU = Machine(cores=2, memory=2**34)
GPU = Machine(8, 2**36, "cuda", "a GPU", 24 * 2**30, 1, "bf16-mixed")


def folders(root, parts=("",), colour=True, count=12, names=("lobed", "round")):
    for part in parts:
        for kind, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for index, image in enumerate(phantom_classes(2, np.full(count, kind), 80, 10 * kind)):
                picture = np.stack([image, image // 2, 255 - image], -1) if colour else image
                Image.fromarray(picture).save(root / part / name / f"{part}{kind}{chr(97 + index)}.png")
    return root


def table(root, label="lobed", header=("image", "label", "group")):
    folders(root)
    rows = [(f"{name}/{kind}{chr(97 + i)}.png", name if label == "lobed" else label, f"p{i // 2}")
            for kind, name in enumerate(("lobed", "round")) for i in range(12)]  # fmt: skip
    with (root / "list.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])
    return root / "list.csv"


def arrays(path, rank=2, several=False, counts=(24, 8, 8)):
    content = {}
    for number, (part, count) in enumerate(zip(("train", "val", "test"), counts, strict=True)):
        kinds = np.arange(count) % 2
        content[f"{part}_images"] = phantom_classes(rank, kinds, 28, number)
        content[f"{part}_labels"] = np.eye(2, dtype=np.int64)[kinds] if several else kinds[:, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **content)
    return path


SOURCES = {
    "folders": lambda root: folders(root / "data"),
    "parts": lambda root: folders(root / "data", ("train", "val", "test"), colour=False),
    "table": lambda root: table(root / "data"),
    "several": lambda root: table(root / "data", "lobed|round"),
    "medmnist": lambda root: arrays(root / "breastmnist.npz"),
    "volumes": lambda root: arrays(root / "adrenalmnist3d.npz", rank=3),
    "own": lambda root: arrays(root / "mine.npz", several=True),
}


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("kind", SOURCES)
def test_the_recipe_is_valid_and_its_data_load(kind, machine, tmp_path, capsys):
    source, output = SOURCES[kind](tmp_path), tmp_path / "recipe.yaml"
    assert write_recipe(source, output, machine=machine) == 0
    _, tree = resolve([str(output)], [])
    arguments = tree["data"]["init_args"]
    module = ImageFolder if tree["data"]["class_path"].endswith("ImageFolder") else MedMNIST
    assert (module is MedMNIST) == (kind in ("medmnist", "volumes", "own"))
    data = module(**arguments, num_workers=0)
    data.setup()
    assert data.cases["train"]
    assert data.cases["val"]
    assert not {case.group for case in data.cases["train"]} & {case.group for case in data.cases["val"]}
    assert len(data.labels.names) == 2
    assert data.labels.multi_label == (kind in ("several", "own"))
    batch = next(iter(data.train_dataloader()))
    assert len(batch["image"]) == arguments["batch_size"]
    assert tree["model"]["init_args"]["loss"]["name"] == ("bce" if data.labels.multi_label else "cross_entropy")
    text = capsys.readouterr().out
    assert "visattn doctor" in text
    assert "visattn predict" in text
    before = "#"
    for line in output.read_text().splitlines():
        bare = line.endswith(":") or "class_path" in line
        assert bare or "#" in line or before.strip().startswith("#"), f"says why: {line}"
        before = line


def test_what_the_data_decide(tmp_path):
    grey = make_class_plan(survey_classes(SOURCES["parts"](tmp_path / "a")), CPU)
    assert grey.survey.grey
    assert grey.split == {}
    assert grey.counts == (24, 24)
    colour = make_class_plan(survey_classes(SOURCES["folders"](tmp_path / "b")), CPU)
    assert not colour.survey.grey
    assert colour.split["val"][0] == 0.2
    assert any("one patient" in note for note in colour.notes)
    grouped = make_class_plan(survey_classes(SOURCES["table"](tmp_path / "c")), CPU)
    assert "group_by" not in grouped.split
    assert not grouped.notes
    uneven = arrays(tmp_path / "breastmnist.npz", counts=(200, 8, 8))
    content = dict(np.load(uneven))
    for part in ("train", "val", "test"):
        content[f"{part}_labels"] = (np.arange(len(content[f"{part}_labels"])) % 50 == 0).astype(int)[:, None]
    np.savez(uneven, **content)
    assert any("unequal" in note for note in make_class_plan(survey_classes(uneven), CPU).notes)


def test_one_place_picks_the_network():
    classes = ClassLabels(("a", "b"))
    assert choose_network(classes, CPU).arguments["name"] == "resnet18"
    assert choose_network(classes, CPU, rank=3).arguments["name"] == "va_pyramid3d_tiny"
    assert choose_network(classes, GPU, rank=3).arguments["name"] == "va_pyramid3d_small"
    assert choose_network(Labels.from_config({"background": 0, "x": 1}), CPU).arguments["name"] == "pranet"


def test_problems_are_listed_and_the_recipe_written(tmp_path, capsys):
    root = folders(tmp_path / "data")
    (root / "lobed" / "broken.png").write_text("no image")
    assert main(["init", str(root), "--output", str(tmp_path / "r.yaml")]) == 1
    found = capsys.readouterr()
    assert "1 problem to put right" in found.err
    assert "broken.png" in found.err
    assert (tmp_path / "r.yaml").is_file()


def test_what_cannot_be_trained_on_writes_nothing(tmp_path, capsys):
    arrays(tmp_path / "set" / "breastmnist.npz")
    assert main(["init", str(tmp_path / "set"), "--output", str(tmp_path / "r.yaml")]) == 2
    assert "name one of them, as" in capsys.readouterr().err
    one = folders(tmp_path / "one", names=("a", "b"))
    for file in (one / "b").iterdir():
        file.write_text("no image")
    assert main(["init", str(one), "--output", str(tmp_path / "r.yaml")]) == 2
    assert "fewer than two classes" in capsys.readouterr().err
    command = ["init", str(folders(tmp_path / "two")), "--output", str(tmp_path / "r.yaml"), "--attention", "halo"]
    assert main(command) == 2
    assert "are for segmentation" in capsys.readouterr().err
    assert not (tmp_path / "r.yaml").exists()


def test_hostile_names_stay_names(tmp_path):
    root = folders(tmp_path / "data", names=("a: {b}", "- c # d"))
    assert write_recipe(root, tmp_path / "r.yaml", machine=CPU) == 0
    _, tree = resolve([str(tmp_path / "r.yaml")], [])
    assert tree["data"]["init_args"]["labels"] == ["- c # d", "a: {b}"]


@pytest.mark.slow  # each trains a network for a few steps
@pytest.mark.parametrize("kind", SOURCES)
def test_the_recipe_trains(kind, tmp_path):
    source, output = SOURCES[kind](tmp_path), tmp_path / "recipe.yaml"
    assert write_recipe(source, output, machine=CPU) == 0
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--run", str(tmp_path / "run")]
    assert main(["fit", "--config", str(output), "--data.num_workers", "0", *few]) == 0
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()
    if kind not in ("table", "several"):
        predicted = ["predict", str(source), "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
        assert main(predicted) == 0
