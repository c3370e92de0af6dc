"""What `visattn predict` takes for a case: files by content, channels by suffix or table; what is wrong is named."""

import importlib.util
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest

from visattn.data.volumes import find_volume_cases, read_case
from visattn.errors import UserError

_SPEC = importlib.util.spec_from_file_location("bad_volumes", Path(__file__).with_name("bad_volumes.py"))
bad = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bad)

ONE, TWO = ["t1c"], ["t1c", "flair"]


def save(path, shape=(3, 4, 5), value=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.full(shape, value, np.int16), np.eye(4)), path)
    return path


def names(found):
    return [case.name for case in found[0]]


def files(found):
    return [[path.name for path in case.images] for case in found[0]]


def told(found):
    return {problem.name: str(problem) for problem in found[1]}


# Files and folders


def test_a_folder_is_searched_to_the_bottom(tmp_path):
    for name in ("b.nii.gz", "a.nii", "sub/deep/c.NII.GZ", ".hidden.nii", "._a.nii", ".git/d.nii.gz", "out/e.nii"):
        path = tmp_path / name
        save(path if not name.endswith("GZ") else path.with_name("c.nii.gz")).rename(path)
    (tmp_path / "notes.txt").write_text("nothing")
    found = find_volume_cases([tmp_path], ONE, skip=tmp_path / "out")
    assert names(found) == ["a", "b", "sub/deep/c"]
    assert found[1] == []
    assert {case.group for case in found[0]} == set(names(found))


def test_content_tells_not_the_name(tmp_path):
    content = save(tmp_path / "in" / "x.nii.gz").read_bytes()
    (tmp_path / "in" / "scan").write_bytes(content)
    (tmp_path / "in" / "1.2.840").write_bytes(save(tmp_path / "y.nii").read_bytes())
    found = find_volume_cases([tmp_path / "in"], ONE)
    assert names(found) == ["1.2.840", "scan", "x"]
    assert names(find_volume_cases([tmp_path / "in" / "scan"], ONE)) == ["scan"]
    assert all(read_case(case)[0].shape == (1, 3, 4, 5) for case in found[0])


def test_links_are_followed_once_and_pipes_not_opened(tmp_path):
    save(tmp_path / "in" / "a.nii")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "gone.nii").symlink_to(tmp_path / "nowhere.nii")
    os.mkfifo(tmp_path / "in" / "pipe.nii")
    os.mkfifo(tmp_path / "in" / "pipe")
    found = find_volume_cases([tmp_path / "in"], ONE)
    assert names(found) == ["a"]
    assert list(told(found)) == ["gone"]
    assert "no such file" in told(found)["gone"]


def test_one_file_named_twice_is_one_case(tmp_path):
    path = save(tmp_path / "in" / "a.nii")
    assert names(find_volume_cases([tmp_path / "in", path, path], ONE)) == ["a"]


def test_two_files_of_one_name_are_told_and_neither_is_taken(tmp_path):
    save(tmp_path / "one" / "a.nii"), save(tmp_path / "two" / "a.nii"), save(tmp_path / "two" / "b.nii")
    found = find_volume_cases([tmp_path / "one", tmp_path / "two"], ONE)
    assert names(found) == ["b"]
    assert "one/a.nii" in told(found)["a"]
    assert "two/a.nii: 2 cases have the name a" in told(found)["a"]
    save(tmp_path / "two" / "b.nii.gz")
    assert list(told(find_volume_cases([tmp_path / "two"], ONE))) == ["b"]


def test_label_maps_beside_images_are_left_out(tmp_path, caplog):
    for name in ("imagesTr/a.nii", "labelsTr/a.nii", "imagesTr/b.nii", "imagesTr/b_mask.nii", "imagesTr/c_t1.nii"):
        save(tmp_path / name)
    save(tmp_path / "imagesTr" / "c_seg.nii"), save(tmp_path / "imagesTr" / "d_seg.nii")
    found = find_volume_cases([tmp_path], ONE)
    assert names(found) == ["imagesTr/a", "imagesTr/b", "imagesTr/c_t1", "imagesTr/d_seg"]  # nothing beside d_seg
    assert "labelsTr: left out" in caplog.text
    assert "left out b_mask.nii, c_seg.nii" in caplog.text
    assert names(find_volume_cases([tmp_path / "labelsTr"], ONE)) == ["a"]
    assert names(find_volume_cases([tmp_path / "imagesTr" / "b_mask.nii"], ONE)) == ["b_mask"]


def test_derivatives_of_bids_are_left_out(tmp_path):
    save(tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii"), save(tmp_path / "derivatives" / "x" / "sub-01_dseg.nii")
    assert names(find_volume_cases([tmp_path], ONE)) == ["sub-01/anat/sub-01_T1w"]
    assert names(find_volume_cases([tmp_path / "derivatives"], ONE)) == ["x/sub-01_dseg"]


def test_inputs_that_hold_nothing_are_refused(tmp_path):
    save(tmp_path / "scans" / "a.nii")
    with pytest.raises(UserError, match=rf"no such file or folder.\nDid you mean {tmp_path}/scans\?"):
        find_volume_cases([tmp_path / "scan"], ONE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.mha").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no volume in this folder. It holds 1 .mha files: convert them"):
        find_volume_cases([tmp_path / "empty"], ONE)
    with pytest.raises(UserError, match="is an input folder too"):
        find_volume_cases([tmp_path / "scans"], ONE, skip=tmp_path / "scans")


# Channels by suffix


def test_suffixes_make_the_channels_of_a_case(tmp_path):
    for name in ("a_0001.nii.gz", "a_0000.nii.gz", "sub/a_0000.nii.gz", "sub/a_0001.nii"):
        save(tmp_path / name)
    found = find_volume_cases([tmp_path], TWO)
    assert names(found) == ["a", "sub/a"]
    assert files(found) == [["a_0000.nii.gz", "a_0001.nii.gz"], ["a_0000.nii.gz", "a_0001.nii"]]
    outright = find_volume_cases([tmp_path / "a_0001.nii.gz", tmp_path / "a_0000.nii.gz"], TWO)
    assert files(outright) == [["a_0000.nii.gz", "a_0001.nii.gz"]]


def test_a_missing_or_surplus_channel_is_that_cases_problem(tmp_path):
    for name in ("a_0000", "a_0001", "b_0001", "c_0000", "c_0001", "c_0002", "d"):
        save(tmp_path / f"{name}.nii.gz")
    found = find_volume_cases([tmp_path], TWO)
    assert names(found) == ["a"]
    problems = told(found)
    assert set(problems) == {"b", "c", "d"}
    assert (
        f"{tmp_path}/b: a channel is missing, _0000 (t1c); the network takes 2 channels (t1c, flair)" in problems["b"]
    )
    assert "but there is c_0002.nii.gz" in problems["c"]
    assert "d.nii.gz: is one channel, but the network takes 2 channels" in problems["d"]


def test_one_channel_with_or_without_suffix(tmp_path):
    for name in ("a_0000", "b", "patient_0007", "patient_0008"):
        save(tmp_path / f"{name}.nii.gz")
    found = find_volume_cases([tmp_path], ONE)
    assert names(found) == ["a", "b", "patient_0007", "patient_0008"]  # numbers of patients are no channels
    save(tmp_path / "a_0001.nii.gz")
    found = find_volume_cases([tmp_path], ONE)
    assert names(found) == ["b", "patient_0007", "patient_0008"]
    assert "the network takes 1 channel (t1c), but there is a_0001.nii.gz" in told(found)["a"]


def test_channels_along_the_fourth_axis(tmp_path):
    save(tmp_path / "a.nii.gz", (3, 4, 5, 2)), save(tmp_path / "case_0001.nii.gz", (3, 4, 5, 2))
    save(tmp_path / "b.nii.gz", (3, 4, 5, 3)), save(tmp_path / "c.nii.gz", (3, 4, 5, 1))
    found = find_volume_cases([tmp_path], TWO)
    assert names(found) == ["a", "case_0001"]
    assert read_case(found[0][0])[0].shape == (2, 3, 4, 5)
    assert "b.nii.gz: holds 3 volumes along its fourth axis, but the network takes 2" in told(found)["b"]
    assert "c.nii.gz: is one channel" in told(found)["c"]
    single = find_volume_cases([tmp_path], ONE)
    assert names(single) == ["c"]
    assert read_case(single[0][0])[0].shape == (1, 3, 4, 5)
    assert set(told(single)) == {"a", "b", "case_0001"}


# A table


def table(tmp_path, text):
    (tmp_path / "cases.csv").write_text(text, encoding="utf-8-sig")
    return tmp_path / "cases.csv"


def test_a_table_names_the_channels(tmp_path, caplog):
    save(tmp_path / "x" / "one.nii"), save(tmp_path / "two.nii.gz"), save(tmp_path / "three.nii")
    path = table(tmp_path, f"case,age,flair,t1c\nanna,7,x/one.nii,two.nii.gz\nben,8,{tmp_path}/three.nii,two.nii.gz\n")
    found = find_volume_cases([], TWO, path)
    assert names(found) == ["anna", "ben"]
    assert files(found) == [["two.nii.gz", "one.nii"], ["two.nii.gz", "three.nii"]]
    assert "the columns age are no channels of the network" in caplog.text
    both = find_volume_cases([save(tmp_path / "in" / "c.nii", (3, 4, 5, 2))], TWO, path)
    assert names(both) == ["anna", "ben", "c"]


def test_a_bad_row_is_that_cases_problem(tmp_path):
    save(tmp_path / "a.nii"), save(tmp_path / "b.nii")
    rows = (
        "good,a.nii,b.nii\nempty,a.nii,\nabsent,a.nii,c.nii\n../out,a.nii,b.nii\n,a.nii,b.nii\n/x,a.nii,b.nii\nshort\n"
    )
    found = find_volume_cases([], TWO, table(tmp_path, "case,t1c,flair\n" + rows))
    assert names(found) == ["good"]
    problems = told(found)
    assert "line 3, case empty: no flair is given" in problems["empty"]
    assert f"line 4, case absent: no such file: {tmp_path}/c.nii" in problems["absent"]
    assert "line 5: '../out' is no name for a case" in problems["line 5"]
    assert set(problems) == {"empty", "absent", "line 5", "line 6", "line 7", "short"}


def test_a_table_that_cannot_be_used_is_refused(tmp_path):
    for text, said in [
        ("case,t1c\na,b\n", "has no column 'flair'; its columns are case, t1c.\nNeeded: case, t1c, flair"),
        ("case,t1c,flair\n", "lists no case"),
        ("", "has no column 'case'"),
    ]:
        with pytest.raises(UserError, match=said):
            find_volume_cases([], TWO, table(tmp_path, text))
    with pytest.raises(UserError, match="cannot read"):
        find_volume_cases([], TWO, tmp_path / "none.csv")
    (tmp_path / "cases.csv").write_bytes(b"case,t1c,flair\n\xff\xfe,a,b\n")
    with pytest.raises(UserError, match="cannot read"):
        find_volume_cases([], TWO, tmp_path / "cases.csv")


# Bad files


def test_every_bad_file_is_its_own_problem_and_the_good_one_goes_on(tmp_path):
    """Headers are told when cases are found, voxels when they are read; nothing else is raised, nothing lost."""
    written = bad.write_all(tmp_path)
    save(tmp_path / "zz_good.nii.gz")
    cases, problems = find_volume_cases([tmp_path], ONE)
    messages = {str(problem.path): str(problem) for problem in problems}
    for case in cases:
        if case.name == "zz_good":
            continue
        with pytest.raises(UserError) as caught:
            read_case(case)
        messages[str(case.images[0])] = str(caught.value)
    assert set(messages) == {str(path) for path in written}
    assert all(path in message for path, message in messages.items())
    assert all(len(message.splitlines()) <= 6 for message in messages.values())
    assert len(problems) >= 35  # before any voxel is read
    assert "zz_good" in [case.name for case in cases]


def test_a_bad_channel_is_its_cases_problem(tmp_path):
    save(tmp_path / "a_0000.nii"), save(tmp_path / "b_0000.nii"), save(tmp_path / "b_0001.nii")
    (tmp_path / "a_0001.nii").write_bytes(bad.PLAIN[:200])
    found = find_volume_cases([tmp_path], TWO)
    assert names(found) == ["b"]
    assert "a_0001.nii: the file is truncated" in told(found)["a"]


# Volumes of patients


def test_volumes_as_published(real_data):
    found = find_volume_cases([real_data / "nifti_unlabelled"], ["t1c"])
    assert names(found) == ["CT_AVM", "MR_Gd", "chris_t1"]
    assert found[1] == []
    found = find_volume_cases([real_data / "hippocampus"], ["t1"])
    assert len(found[0]) == 120
    assert not [case for case in found[0] if "labels" in case.name]
