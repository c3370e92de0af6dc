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
from visattn.init.class_network import class_network
from visattn.init.class_recipe import make_class_plan
from visattn.init.class_survey import survey_classes
from visattn.init.composed import Wanted
from visattn.init.machine import Machine
from visattn.labels import Labels
from visattn.networks.classifier import create_classifier
from visattn.recipe import resolve
from visattn.recipe_cli import parse

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
    Image.new("RGB", (40, 40)).save(root / "round" / "1a.jpg")
    assert main(["init", str(root), "--output", str(tmp_path / "r.yaml")]) == 1
    found = capsys.readouterr()
    assert "2 problems to put right" in found.err
    assert "1a.png: shares its name with 1a.jpg" in found.err
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
    assert not (tmp_path / "r.yaml").exists()


def written(source, output, *words):
    assert main(["init", str(source), "--output", str(output), *words]) == 0
    _, tree = resolve([str(output)], [])
    parse(tree).build()
    return tree["model"]["init_args"]["network"], tree["data"]["init_args"]


def test_the_network_that_is_asked_for(tmp_path, capsys):
    source = folders(tmp_path / "data")
    network, _ = written(source, tmp_path / "a.yaml", "--network", "resnet10t")
    assert network == {"name": "resnet10t", "pretrained": False}
    assert "resnet10t, " in capsys.readouterr().out


@pytest.mark.slow  # computes what pyramids cost
def test_the_attention_that_is_asked_for(tmp_path, capsys):
    source = folders(tmp_path / "data")
    network, data = written(source, tmp_path / "b.yaml", "--attention", "neighborhood")
    assert network["name"].startswith("va_pyramid_")
    assert network["attention"] == "neighborhood"
    assert data["size"] == 96, "as large as the images"
    assert "with neighborhood attention" in capsys.readouterr().out
    network, _ = written(arrays(tmp_path / "adrenalmnist3d.npz", rank=3), tmp_path / "d.yaml", "--attention", "halo")
    assert network["name"].startswith("va_pyramid3d_")
    assert create_classifier(**network, in_channels=1, classes=2) is not None


@pytest.mark.slow  # computes what larger networks cost
def test_a_network_of_one_size_gets_that_size(tmp_path):
    source = folders(tmp_path / "data")
    assert written(source, tmp_path / "a.yaml", "--network", "va_biformer_tiny")[1]["size"] == 96
    assert written(source, tmp_path / "b.yaml", "--network", "vit_tiny_patch16_224")[1]["size"] == 224
    assert "takes no other size" in (tmp_path / "b.yaml").read_text()
    _, data = written(arrays(tmp_path / "breastmnist.npz"), tmp_path / "c.yaml", "--network", "va_agent_swin_t")
    assert data["size"] == 224


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--network", "resnt18"], ["unknown network 'resnt18'", "Did you mean 'resnet18'"]),
        (["--network", "unet"], ["makes masks", "models --task classification"]),
        (["--network", "va_pyramid3d_tiny"], ["takes volumes, and these are images"]),
        (["--network", "resnet18", "--attention", "halo"], ["blocks of 'resnet18' are its own", "leave --network out"]),
        (["--attention", "neigborhood"], ["unknown attention", "Did you mean 'neighborhood'"]),
        (["--backbone", "resnet18"], ["one network", "--network resnet18"]),
    ],
)
def test_a_network_that_cannot_be_is_told_before_the_images_are_read(words, messages, tmp_path, monkeypatch, capsys):
    source = folders(tmp_path / "data", count=1)
    monkeypatch.setattr("visattn.init.survey_classes", lambda path: pytest.fail("the images were read"))
    assert main(["init", str(source), "--output", str(tmp_path / "r.yaml"), *words]) == 2
    error = capsys.readouterr().err
    assert all(message in error for message in messages), error
    assert not (tmp_path / "r.yaml").exists()


@pytest.mark.slow  # computes costs of three networks
def test_computed_costs_agree_with_measured_ones():
    """The classifiers that init picks by itself were measured; the same ones, computed, come near."""
    classes = ClassLabels(("a", "b"))
    for rank, machine, channels in ((2, CPU, 3), (3, CPU, 1), (3, GPU, 1)):
        measured = choose_network(classes, machine, rank=rank)
        computed = class_network(classes, machine, channels, rank, Wanted(measured.arguments["name"]))
        assert computed.parameters == pytest.approx(measured.parameters, rel=0.1), measured.title
        assert computed.pixel_bytes == pytest.approx(measured.pixel_bytes, rel=0.6), measured.title
        assert computed.seconds[1] == pytest.approx(measured.seconds[1], rel=0.6), measured.title


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
