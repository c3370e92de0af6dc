"""Data sets of volumes as their owners publish them: found without being told, and what does not fit is named."""

import json

import nibabel
import numpy as np
import pytest

from visattn.data.splits import Split, split_cases
from visattn.data.volumes import find_training_cases, read_case, scan_volumes
from visattn.errors import UserError
from visattn.labels import Labels


def save(path, shape=(3, 4, 5), value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.full(shape, value, np.uint8), np.eye(4)), path)
    return path


def fill(root, *names, shape=(3, 4, 5)):
    for name in names:
        save(root / f"{name}.nii.gz", shape)
    return root


def describe(root, **content):
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content))


def scan(root, layout="auto", channels=None):
    (found,) = scan_volumes(root, layout, channels)
    return found


def listed(found, root):
    """Names, images and label of each case."""
    return {
        case.name: ([str(path.relative_to(root)) for path in case.images], str(case.label.relative_to(root)))
        for case in found.cases
    }


# Decathlon


def test_decathlon_by_its_list(tmp_path):
    """What is listed counts; ./ and macOS's ._ files are as in the archives of the Decathlon."""
    fill(tmp_path, "imagesTr/h_001", "labelsTr/h_001", "imagesTr/h_003", "labelsTr/h_003", "imagesTs/h_002")
    fill(tmp_path, "imagesTr/._h_001", "labelsTr/._h_001", "imagesTr/extra")
    training = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in ("h_003", "h_001")]
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    describe(tmp_path, name="Hippocampus", modality={"0": "MRI"}, labels=labels, training=training, test=[])
    found = scan(tmp_path)
    assert found.layout == "decathlon"
    assert listed(found, tmp_path) == {
        "h_001": (["imagesTr/h_001.nii.gz"], "labelsTr/h_001.nii.gz"),
        "h_003": (["imagesTr/h_003.nii.gz"], "labelsTr/h_003.nii.gz"),
    }
    assert found.channels == ("MRI",)
    assert found.problems == ()
    assert Labels.from_config(**found.labels).names == ("background", "Anterior", "Posterior")
    assert scan(tmp_path, channels=["t1"]).channels == ("t1",)
    (tmp_path / "labelsTr" / "h_003.nii.gz").unlink()
    with pytest.raises(
        UserError, match=r"1 problem in the data \(1 cases\):\n.*lists \./labelsTr/h_003\.nii\.gz, which"
    ):
        find_training_cases(tmp_path)


def test_decathlon_without_its_list(tmp_path):
    """Numbers of four digits are names here, as labels of the same name tell."""
    fill(tmp_path, *(f"{folder}/case_{n:04d}" for folder in ("imagesTr", "labelsTr") for n in range(3)))
    found = scan(tmp_path)
    assert list(listed(found, tmp_path)) == ["case_0000", "case_0001", "case_0002"]
    assert found.channels == ("image",)
    assert found.labels is None


def test_decathlon_with_channels_along_the_fourth_axis(tmp_path):
    fill(tmp_path, "imagesTr/brats_1", "imagesTr/brats_2", shape=(3, 4, 5, 4))
    fill(tmp_path, "labelsTr/brats_1", "labelsTr/brats_2")
    training = [{"image": f"imagesTr/brats_{n}.nii.gz", "label": f"labelsTr/brats_{n}.nii.gz"} for n in (1, 2)]
    modality = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    describe(tmp_path, modality=modality, labels={"0": "background"}, training=training)
    cases = find_training_cases(tmp_path, channels=["t1gd", "flair"])
    assert [(case.channel_axis, case.picks) for case in cases] == [(3, (2, 0))] * 2
    assert read_case(cases[0])[0].shape == (2, 3, 4, 5)
    assert read_case(find_training_cases(tmp_path)[0])[0].shape == (4, 3, 4, 5)
    with pytest.raises(UserError, match=r"has 4 channels \(FLAIR, T1w, t1gd, T2w\), the recipe names 1 \(t1c\)"):
        find_training_cases(tmp_path, channels=["t1c"])
    save(tmp_path / "imagesTr" / "brats_2.nii.gz", (3, 4, 5, 2))
    assert "brats_2.nii.gz: has 2 channels, other cases 4" in str(scan(tmp_path).problems[0])


# nnU-Net


def nnunet(root, cases=("a", "b", "c"), **content):
    fill(root, *(f"imagesTr/{case}_{index:04d}" for case in cases for index in (0, 1)))
    fill(root, *(f"labelsTr/{case}" for case in cases))
    names = {"channel_names": {"0": "T1c", "1": "FLAIR"}, "labels": {"background": 0, "tumour": 1}}
    describe(root, **(names | {"numTraining": len(cases), "file_ending": ".nii.gz"} | content))
    return root


def test_nnunet_names_its_channels(tmp_path):
    found = scan(nnunet(tmp_path))
    assert found.layout == "nnunet"
    assert found.channels == ("T1c", "FLAIR")
    assert listed(found, tmp_path)["b"] == (["imagesTr/b_0000.nii.gz", "imagesTr/b_0001.nii.gz"], "labelsTr/b.nii.gz")
    only = scan(tmp_path, channels=["flair"])
    assert listed(only, tmp_path)["b"][0] == ["imagesTr/b_0001.nii.gz"]
    with pytest.raises(UserError, match="the recipe names 2"):  # FLAIR is the second, not the first
        scan(tmp_path, channels=["flair", "t2"])
    assert scan(tmp_path, channels=["first", "second"]).channels == ("first", "second")


def test_nnunet_without_dataset_json_is_told_by_its_suffixes(tmp_path):
    nnunet(tmp_path)
    (tmp_path / "dataset.json").unlink()
    found = scan(tmp_path, channels=["t1c", "flair"])
    assert found.layout == "nnunet"
    assert len(found.cases) == 3
    assert len(found.cases[0].images) == 2


def test_nnunet_1_lists_images_without_suffixes(tmp_path):
    training = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "abc"]
    nnunet(tmp_path)
    describe(tmp_path, modality={"0": "T1c", "1": "FLAIR"}, labels={"0": "no", "1": "yes"}, training=training)
    found = scan(tmp_path)
    assert found.layout == "nnunet"
    assert found.channels == ("T1c", "FLAIR")
    assert len(found.cases) == 3
    assert found.problems == ()


def test_nnunet_problems_are_collected(tmp_path):
    nnunet(tmp_path)
    (tmp_path / "imagesTr" / "a_0001.nii.gz").unlink()
    (tmp_path / "labelsTr" / "b.nii.gz").unlink()
    fill(tmp_path, "labelsTr/lonely", "imagesTr/c_0002", "imagesTr/plain")
    with pytest.raises(UserError) as caught:
        find_training_cases(tmp_path)
    text = str(caught.value)
    assert text.startswith("5 problems in the data (0 cases)")
    problems = {problem.name: str(problem) for problem in scan(tmp_path).problems}
    assert "channels are missing: a_0001 (FLAIR)" in problems["a"]
    assert "no label b beside it" in problems["b"]
    assert "c_0002.nii.gz are more than the 2 channels" in problems["c"]
    assert "lonely.nii.gz: no image of that name" in problems["lonely"]
    assert "has no channel suffix" in problems["plain"]


def test_nnunet_files_listed_one_by_one(tmp_path):
    fill(tmp_path, "x/one", "x/two", "y/mask")
    case = {"images": ["x/one.nii.gz", "x/two.nii.gz"], "label": "y/mask.nii.gz"}
    describe(tmp_path, channel_names={"0": "T1", "1": "T2"}, labels={"background": 0, "a": 1}, dataset={"k": case})
    assert listed(scan(tmp_path), tmp_path) == {"mask": (["x/one.nii.gz", "x/two.nii.gz"], "y/mask.nii.gz")}


def test_labels_of_dataset_json_fit_a_recipe(tmp_path):
    regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    found = scan(nnunet(tmp_path, labels=regions, regions_class_order=[1, 2, 3]))
    labels = Labels.from_config(**found.labels)
    assert labels.values == ((0,), (1,), (2,), (3,))
    assert [name for name, _ in labels.regions] == ["whole", "core", "enhancing"]
    assert labels.ignore == (4,)
    for wrong in ({}, [], {"a": "b"}, {"a": [1.5]}):
        describe(tmp_path, channel_names={"0": "a", "1": "b"}, file_ending=".nii.gz", labels=wrong)
        with pytest.raises(UserError, match=r"dataset\.json: its labels are none"):
            scan(tmp_path)


@pytest.mark.parametrize("place", ["inside", "sibling"])
def test_splits_of_nnunet_are_found_and_followed(tmp_path, place):
    root = nnunet(tmp_path / "nnUNet_raw" / "Dataset007_X")
    assert scan(root).splits is None
    folder = root if place == "inside" else tmp_path / "nnUNet_preprocessed" / "Dataset007_X"
    folder.mkdir(parents=True, exist_ok=True)
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["b", "c"], "val": ["a"]}]
    (folder / "splits_final.json").write_text(json.dumps(folds))
    found = scan(root)
    assert found.splits == (folder / "splits_final.json").resolve()
    split = Split.from_config({"files": str(found.splits), "fold": 1})
    parts = split_cases(list(found.cases), [()] * 3, split, 0)
    assert {part: [case.name for case in cases] for part, cases in parts.items()} == folds[1] | {"test": []}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"file_ending": ".mha", "channel_names": {"0": "a"}}', r"end in '\.mha', but volumes are read from \.nii"),
        ('{"file_ending": ".nii.gz", "channel_names": {"1": "a"}}', "count from 0"),
        ('{"file_ending": ".nii.gz", "channel_names": {"0": 3}}', "its channels are no names"),
        ('{"training": [3]}', "an entry of its training cases"),
        ('{"training": [{"image": null, "label": "a"}]}', "an entry of its training cases"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_damaged_dataset_json_is_refused(tmp_path, content, said):
    nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=rf"dataset\.json: .*{said}"):
        scan(tmp_path)


# images/ and labels/


@pytest.mark.parametrize(("images", "labels", "ending"), [("images", "labels", ""), ("images", "masks", "_seg")])
def test_two_folders(tmp_path, images, labels, ending):
    fill(tmp_path, f"{images}/a", f"{images}/b", f"{labels}/a{ending}", f"{labels}/b{ending}")
    found = scan(tmp_path)
    assert found.layout == "folders"
    assert listed(found, tmp_path)["b"] == ([f"{images}/b.nii.gz"], f"{labels}/b{ending}.nii.gz")
    fill(tmp_path, f"{images}/c", f"{labels}/d{ending}")
    save(tmp_path / images / "a.nii")
    problems = {problem.name: str(problem) for problem in scan(tmp_path).problems}
    assert set(problems) == {"a", "c", f"d{ending}"}
    assert "shares its stem" in problems["a"]
    assert "no label of that name" in problems["c"]


def test_several_roots_keep_their_names_apart(tmp_path):
    for root in ("one", "two"):
        fill(tmp_path / root, "images/a", "labels/a")
    cases = find_training_cases([tmp_path / "one", tmp_path / "two"])
    assert [(case.name, case.group) for case in cases] == [("one/a", "one/a"), ("two/a", "two/a")]
    with pytest.raises(UserError, match="named twice"):
        find_training_cases([tmp_path / "one", tmp_path / "two" / ".." / "one"])


# BIDS


def test_bids_with_labels_among_derivatives(tmp_path):
    fill(tmp_path, "sub-01/anat/sub-01_T1w", "sub-01/anat/sub-01_FLAIR", "sub-02/ses-a/anat/sub-02_ses-a_T1w")
    fill(tmp_path, "sub-02/ses-b/anat/sub-02_ses-b_run-1_T1w", "sub-02/ses-a/anat/sub-02_ses-a_FLAIR")
    fill(tmp_path, "derivatives/x/sub-01/anat/sub-01_space-orig_dseg", "derivatives/x/sub-02/anat/sub-02_ses-a_dseg")
    fill(tmp_path, "derivatives/y/sub-02/sub-02_ses-b_run-1_desc-manual_dseg", "derivatives/y/sub-02/sub-02_ses-b_mask")
    found = scan(tmp_path)
    assert found.layout == "bids"
    assert found.channels == ("T1w",)
    assert [(case.name, case.group) for case in found.cases] == [
        ("sub-01", "sub-01"),
        ("sub-02_ses-a", "sub-02"),
        ("sub-02_ses-b_run-1", "sub-02"),
    ]
    assert listed(found, tmp_path)["sub-02_ses-a"][1].endswith("sub-02_ses-a_dseg.nii.gz")
    assert found.problems == ()
    two = scan(tmp_path, "bids", ["t1", "flair"])
    assert [case.name for case in two.cases] == ["sub-01", "sub-02_ses-a"]
    assert [path.name for path in two.cases[0].images] == ["sub-01_T1w.nii.gz", "sub-01_FLAIR.nii.gz"]
    assert "no FLAIR beside T1w" in str(two.problems[0])
    fill(tmp_path, "derivatives/z/sub-01_dseg")
    assert "needs one label among derivatives, found" in str(scan(tmp_path).problems[0])
    with pytest.raises(UserError, match=r"are FLAIR, T1w, the recipe names t2"):
        scan(tmp_path, channels=["t2"])


def test_bids_without_labels_says_what_was_found(tmp_path):
    fill(tmp_path, "sub-01/anat/sub-01_T1w", "derivatives/x/sub-01/sub-01_brain")
    with pytest.raises(UserError, match=r"dseg\.nii\.gz; found 1 images \(T1w\) and 0 labels"):
        scan(tmp_path)


# Patterns

BRATS = {"flair": "{case}/Flair_*.nii.gz", "t1c": "{case}/T1c_*.nii.gz", "label": "{case}/OTMultiClass.nii.gz"}


def test_folders_of_cases_by_pattern(tmp_path):
    for case in ("p1", "p2"):
        fill(
            tmp_path,
            f"{case}/Flair_x",
            f"{case}/T1c_x",
            f"{case}/OTMultiClass",
            f"{case}/brainmask",
            f"{case}/.Flair_y",
        )
    found = scan(tmp_path, BRATS, ["t1c", "flair"])
    assert listed(found, tmp_path)["p2"] == (["p2/T1c_x.nii.gz", "p2/Flair_x.nii.gz"], "p2/OTMultiClass.nii.gz")
    assert scan(tmp_path, BRATS).channels == ("flair", "t1c")
    (tmp_path / "p1" / "T1c_x.nii.gz").unlink()
    fill(tmp_path, "p2/Flair_z")
    problems = {problem.name: str(problem) for problem in scan(tmp_path, BRATS).problems}
    assert "case p1 has no t1c (p1/T1c_*.nii.gz)" in problems["p1"]
    assert "p2/Flair_x.nii.gz, p2/Flair_z.nii.gz match one pattern" in problems["p2"]


def test_a_case_may_be_a_part_of_a_name_or_stand_deep(tmp_path):
    fill(tmp_path, "img/anna_t1", "img/ben_t1", "seg/v1/anna/anna_seg", "seg/v1/ben/ben_seg", "seg/v1/ben/anna_seg")
    layout = {"t1": "img/{case}_t[12].nii.gz", "label": "seg/**/{case}/{case}_seg.nii.gz"}
    found = scan(tmp_path, layout)
    assert listed(found, tmp_path)["ben"] == (["img/ben_t1.nii.gz"], "seg/v1/ben/ben_seg.nii.gz")
    assert found.problems == ()


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"t1c": "{case}/a.nii"}, "needs a pattern for each channel and one for 'label'"),
        ({"label": "{case}/a.nii"}, "needs a pattern for each channel"),
        (BRATS | {"t1c": "x/T1c.nii.gz"}, r"data\.layout\.t1c: 'x/T1c\.nii\.gz' must hold \{case\}"),
        (BRATS | {"t1c": "../{case}/T1c.nii.gz"}, "lead into the data's folder"),
        (BRATS | {"t1c": "/{case}/T1c.nii.gz"}, "lead into the data's folder"),
        (BRATS | {"t1c": "**{case}.nii"}, r"data\.layout\.t1c: .* is no pattern"),
        (BRATS | {"t1c": "{case}/[z-a]*.nii"}, r"data\.layout\.t1c: .* is no pattern"),
        (BRATS | {"t1c": "{case}/T2*.nii.gz"}, r"no file below .* matches t1c: \{case\}/T2"),
        ("nnunett", "unknown data.layout 'nnunett'. Did you mean 'nnunet'"),
    ],
)
def test_a_layout_that_cannot_be_used_is_refused(tmp_path, layout, said):
    fill(tmp_path, "p1/Flair_x", "p1/T1c_x", "p1/OTMultiClass")
    with pytest.raises(UserError, match=said):
        scan(tmp_path, layout)


def test_an_image_is_not_its_own_label(tmp_path):
    fill(tmp_path, "p1/scan")
    (problem,) = scan(tmp_path, {"t1": "{case}/*.nii.gz", "label": "{case}/scan.nii.gz"}).problems
    assert "scan.nii.gz: matches the patterns of a channel and of the label" in str(problem)


def test_a_channel_without_a_pattern_is_named(tmp_path):
    fill(tmp_path, "p1/Flair_x", "p1/T1c_x", "p1/OTMultiClass")
    with pytest.raises(UserError, match=r"'flare'. Did you mean 'flair'"):
        scan(tmp_path, BRATS, ["flare"])


# Nothing


def test_an_unknown_folder_says_what_was_found_and_expected(tmp_path):
    fill(tmp_path / "sets" / "Task04", "imagesTr/a", "labelsTr/a")
    with pytest.raises(
        UserError, match=r"(?s)no known layout.*Its folders Task04 do.*Found: Task04/.*data\.layout: "
    ) as e:
        find_training_cases(tmp_path / "sets")
    assert len(str(e.value).splitlines()) <= 6
    with pytest.raises(UserError, match=rf"no folder {tmp_path}/set\. Did you mean {tmp_path}/sets\?"):
        find_training_cases(tmp_path / "set")
    for layout, said in [("bids", "expected sub-"), ("folders", "needs images/"), ("nnunet", "needs imagesTr/")]:
        with pytest.raises(UserError, match=said):
            find_training_cases(tmp_path / "sets", layout)
    with pytest.raises(UserError, match="is a file"):
        find_training_cases(save(tmp_path / "a.nii"))
