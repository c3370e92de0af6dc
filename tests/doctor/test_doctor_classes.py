"""Data to classify: every kind of finding is planted once, and clean data have none."""

import csv
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visattn.cli import main
from visattn.data.class_phantom import phantom_classes
from visattn.data.image_folder import ImageFolder
from visattn.data.medmnist import MedMNIST
from visattn.doctor import class_codes, examine_folder, examine_recipe
from visattn.doctor.class_sets import KEYS


def drawn(number, kind=0, side=64):
    return phantom_classes(2, np.array([kind]), side, number)[0]


def folders(root, counts=(("lobed", 8), ("round", 8)), parts=("",)):
    number = 0
    for part in parts:
        for kind, (name, count) in enumerate(counts):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                number += 1
                colour = np.stack([drawn(number, kind), drawn(number, kind) // 2, drawn(number, kind)], -1)
                Image.fromarray(colour).save(root / part / name / f"{part}case{number}x{index}.png")
    return root


def table(path, rows, columns=("image", "label", "group", "part")):
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def arrays(path, labels=None, **changes):
    content = {}
    for number, (part, count) in enumerate({"train": 24, "val": 8, "test": 8}.items()):
        kinds = np.arange(count) % 2
        content[f"{part}_images"] = phantom_classes(2, kinds, 32, 100 + number)
        content[f"{part}_labels"] = kinds[:, None] if labels is None else labels(kinds)
    content |= {key: change(content[key]) for key, change in changes.items()}
    np.savez(path, **content)
    return path


def codes(path):
    return examine_folder(path).codes()


def finding(path, code):
    return next(one for one in examine_folder(path).findings if one.code == code)


def severe(path):
    return {one.code for one in examine_folder(path).findings if one.severity != "info"}


def test_clean_data_have_no_error_or_warning(tmp_path):
    assert severe(folders(tmp_path / "plain")) == set()
    assert severe(folders(tmp_path / "parts", parts=("train", "val"))) == set()
    assert severe(arrays(tmp_path / "breastmnist.npz")) == set()
    report = examine_folder(tmp_path / "breastmnist.npz")
    assert (report.cases, report.classes, report.exit_code) == (40, ["malignant", "normal, benign"], 0)
    assert "malignant 20 of 40 cases (50.0%)" in finding(tmp_path / "breastmnist.npz", "class-balance").details
    assert finding(tmp_path / "parts", "parts").details == ["train 16, val 16, test 0"]


def test_bad_images_are_named(tmp_path):
    root = folders(tmp_path / "in")
    (root / "lobed" / "broken.png").write_bytes((root / "lobed" / "case1x0.png").read_bytes()[:-30])
    (root / "round" / "text.png").write_text("no image")
    (root / "round" / "flat.png").write_bytes(b"")
    Image.new("L", (64, 64), 90).save(root / "round" / "plain.png")
    Image.new("RGB", (64, 300), 90).save(root / "round" / "long.png")
    found = codes(root)
    assert {"truncated-file", "not-an-image", "empty-file", "constant-image", "aspect-extreme"} <= set(found)
    assert {"sizes-mixed", "channels-mixed"} <= set(found)
    assert main(["doctor", str(root)]) == 1


def test_classes(tmp_path):
    root = folders(tmp_path / "in", (("Big one", 34), ("small", 3), ("big_one", 4)))
    (root / "empty").mkdir()
    Image.fromarray(drawn(500)).save(root / "stray.png")
    found = codes(root)
    assert {"class-imbalance", "class-names-alike", "class-empty", "image-without-class"} <= set(found)
    assert finding(root, "class-imbalance").details == ["Big one 34, small 3"]
    assert finding(root, "class-names-alike").details == ["'Big one', 'big_one'"]
    assert finding(root, "class-empty").details == ["empty"]
    alone = table(
        tmp_path / "one.csv", [(f"in/small/case{n}x{n - 35}.png", "small") for n in (35, 36)], ("image", "label")
    )
    assert "one-class" in codes(alone)


def test_a_class_that_a_part_lacks(tmp_path):
    root = folders(tmp_path / "in", parts=("train", "val"))
    for file in (root / "val" / "round").iterdir():
        file.unlink()
    assert finding(root, "class-missing-in-part").details == ["round in val"]
    other = folders(tmp_path / "other", parts=("train", "val"))
    for file in (other / "train" / "round").iterdir():
        file.unlink()
    assert finding(other, "class-never-trained").details == ["round, of val"]


def test_copies_across_parts_and_with_two_classes(tmp_path):
    root = folders(tmp_path / "in", parts=("train", "val"))
    (root / "val" / "lobed" / "copy.png").write_bytes((root / "train" / "lobed" / "traincase1x0.png").read_bytes())
    (root / "train" / "lobed" / "twice.png").write_bytes((root / "train" / "round" / "traincase9x0.png").read_bytes())
    found = codes(root)
    assert {"duplicate-across-parts", "same-image-different-classes", "duplicate-image"} <= set(found)
    (place,) = finding(root, "same-image-different-classes").places
    assert "lobed" in place.path + place.note
    assert "round" in place.path + place.note

    def copied(images):
        images[3] = arrays_train[0]
        return images

    arrays_train = phantom_classes(2, np.arange(24) % 2, 32, 100)
    path = arrays(tmp_path / "breastmnist.npz", test_images=copied)
    (place,) = finding(path, "duplicate-across-parts").places
    assert (place.path, place.note) == ("train_00000", "(train) = test_00003 (test)")
    (place,) = finding(path, "same-image-different-classes").places
    assert place.note == "(normal, benign) = train_00000 (malignant)"


def test_tables(tmp_path):
    root = folders(tmp_path / "in")
    names = sorted(path.relative_to(tmp_path).as_posix() for path in root.rglob("*.png"))
    rows = [(name, name.split("/")[1], f"p{i // 2}", "val" if i % 4 == 0 else "train") for i, name in enumerate(names)]
    rows += [("in/none.png", "round", "x", "train"), ("", "round", "", ""), (names[0], "lobed", "z", "nowhere")]
    path = table(tmp_path / "list.csv", rows)
    found = codes(path)
    assert {"missing-file", "table-line", "group-across-parts"} <= set(found)
    assert len(finding(path, "table-line").details) == 2
    assert "line 19" in finding(path, "table-line").details[0]
    clean = table(tmp_path / "clean.csv", [(*row[:3], "") for row in rows[:16]])
    assert severe(clean) == set()
    several = table(tmp_path / "several.csv", [(*row[:1], "lobed|round") for row in rows[:16]], ("image", "label"))
    assert examine_folder(several).classes == ["lobed", "round"]


def test_numbers_that_are_no_class(tmp_path):
    path = arrays(
        tmp_path / "breastmnist.npz", train_labels=lambda labels: np.where(np.arange(24)[:, None] == 5, 7, labels)
    )
    (place,) = finding(path, "class-out-of-range").places
    assert (place.path, place.note) == ("train_00005", "7; there are 2 classes, from 0 on")
    assert "class-numbers" in codes(arrays(tmp_path / "dermamnist.npz", lambda kinds: np.eye(2, dtype=int)[kinds]))
    assert main(["doctor", str(tmp_path / "breastmnist.npz")]) == 1


def test_volumes_of_an_npz(tmp_path):
    volumes = {
        part: phantom_classes(3, np.arange(6) % 2, 12, seed) for seed, part in enumerate(("train", "val", "test"))
    }
    volumes["test"][1] = volumes["train"][1]
    volumes["val"][0] = 7
    labels = {f"{part}_labels": np.arange(6)[:, None] % 2 for part in volumes}
    np.savez(tmp_path / "nodulemnist3d.npz", **{f"{part}_images": v for part, v in volumes.items()}, **labels)
    found = codes(tmp_path / "nodulemnist3d.npz")
    assert found["duplicate-across-parts"] == 1
    assert found["constant-image"] == 1


def recipe(path, data):
    path.write_text(
        "# Small\nmodel:\n  class_path: ClassificationTask\n  init_args:\n    network: {name: resnet10t}\n"
        f"    optimizer: {{name: adamw, lr: 1e-3}}\ndata: {json.dumps(data)}\n"
    )
    return str(path)


def test_a_recipe_is_divided_as_training_divides_it(tmp_path):
    root = folders(tmp_path / "in")
    data = {"class_path": "ImageFolder", "init_args": {"root": str(root), "split": {"val": 0.25}, "batch_size": 4}}
    name = recipe(tmp_path / "r.yaml", data)
    report = examine_recipe([name])
    trained = ImageFolder(str(root), split={"val": 0.25}, batch_size=4, num_workers=0)
    trained.setup()
    counts = ", ".join(f"{part} {len(trained.cases[part])}" for part in ("train", "val", "test"))
    parts = next(one for one in report.findings if one.code == "parts")
    assert parts.details == [counts]
    unknown = examine_recipe([name], ["--data.labels", "[lobed, other]"]).codes()
    assert {"class-unknown", "class-empty"} <= set(unknown)
    grouped = examine_recipe([name], ["--data.split.group_by", r"^(case\d)"])
    assert "groups" in next(one for one in grouped.findings if one.code == "parts").details[0]
    assert examine_recipe(["medmnist_medvitv2"]).exit_code == 0
    assert examine_recipe(["medmnist3d_pyramid"]).classes == ["round", "lobed", "hollow"]
    assert examine_recipe(["medmnist_medvitv2"], ["--data.root", str(arrays(tmp_path / "breastmnist.npz"))]).cases == 40


def test_keys_are_those_of_the_data_modules():
    for module in (ImageFolder, MedMNIST):
        parameters = inspect.signature(module).parameters
        assert list(KEYS[module.__name__]) == list(parameters)
        for key, parameter in list(parameters.items())[1:]:
            assert KEYS[module.__name__][key] == parameter.default, key


def test_json_and_refusals(tmp_path, capsys):
    assert main(["doctor", str(folders(tmp_path / "in")), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["classes"] == ["lobed", "round"]
    assert content["labels"] is None
    arrays(tmp_path / "breastmnist.npz")
    assert main(["doctor", str(tmp_path)]) == 2
    assert "name one of them, as" in capsys.readouterr().err
    halves = tmp_path / "halves"
    for name in ("pictures", "labels"):
        (halves / name).mkdir(parents=True)
        Image.fromarray(drawn(1)).save(halves / name / "a.png")
    assert main(["doctor", str(halves)]) == 2, "halves of a segmentation set are no classes"
    assert "holds no images/ with masks/" in capsys.readouterr().err


def test_torch_is_not_loaded(tmp_path):
    arrays(tmp_path / "breastmnist.npz")
    code = (
        "import sys; from visattn.doctor import examine_folder; examine_folder(sys.argv[1]); "
        "assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "breastmnist.npz")], check=True)


def test_real_data(real_data):
    path = real_data / "medmnist" / "breastmnist.npz"
    if not path.is_file():
        pytest.skip("no MedMNIST there")
    (place,) = finding(path, "same-image-different-classes").places
    assert place.path == "test_00076"
    assert place.note == "(normal, benign) = train_00115 (malignant)"


def test_every_kind_is_planted():
    source = Path(__file__).read_text()
    assert [code for code in (*class_codes.ERRORS, *class_codes.WARNINGS) if f'"{code}"' not in source] == []
