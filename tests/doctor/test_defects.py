"""Each planted defect is found: by its code, on its file, with its severity; a clean set has none."""

import os
from pathlib import Path

import pytest

from visattn.doctor import class_codes, volume_codes
from visattn.doctor.codes import KINDS


@pytest.mark.parametrize("recipe", [None, ()], ids=["folder", "recipe"])
def test_a_clean_set_has_nothing_to_complain_about(clean, examine, recipe):
    report = examine(clean, recipe)
    assert [finding.code for finding in report.findings if finding.severity != "info"] == []
    assert report.exit_code == 0
    assert report.cases == 16


def test_a_planted_defect_is_found(planted, clean, examine):
    files = planted.plant(clean)
    report = examine(clean, planted.recipe)
    found = {finding.code: finding for finding in report.findings}
    assert planted.code in found, report.codes()
    finding = found[planted.code]
    assert finding.severity == KINDS[planted.code].severity
    if files:
        assert [place.path for place in finding.places] == files
    else:
        assert finding.details
    errors = {code for code, finding in found.items() if finding.severity == "error"}
    own = {planted.code} if finding.severity == "error" else set()
    assert errors == own | set(planted.also)  # the right name, and no other beside it
    assert report.exit_code == bool(errors)


def test_every_kind_is_planted(defects):
    planted = {defect.code for defect in defects.DEFECTS}
    always = {"class-balance", "parts", "loader-advice"}  # of any data set
    mocked = {"no-permission"}  # below: the tests may run as root, who may read everything
    volumes = {*volume_codes.ERRORS, *volume_codes.WARNINGS, *volume_codes.INFO}  # test_doctor_volumes.py plants them
    classes = {*class_codes.ERRORS, *class_codes.WARNINGS}  # test_doctor_classes.py plants them
    assert set(KINDS) == planted | always | mocked | volumes | classes
    assert len(planted) >= 40


def test_a_file_without_permission(clean, examine, defects, monkeypatch):
    opening = os.open

    def guarded(path, *args, **kwargs):
        if Path(path).name == f"{defects.CASE}.png" and Path(path).parent.name == "images":
            raise PermissionError(13, "Permission denied")
        return opening(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", guarded)
    report = examine(clean)
    (finding,) = [finding for finding in report.findings if finding.code == "no-permission"]
    assert [place.path for place in finding.places] == [defects.IMAGE]
    assert report.exit_code == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_in_truth(clean, examine, defects):
    (clean / defects.MASK).chmod(0)
    assert "no-permission" in examine(clean).codes()
