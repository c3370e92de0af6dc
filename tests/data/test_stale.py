import os
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest

from visattn.data import stale
from visattn.data.intensity import Normalise
from visattn.data.volume_cache import VolumeCache
from visattn.data.volume_preprocessing import VolumePreprocessing
from visattn.data.volumes import find_training_cases
from visattn.labels import Labels

NOW = 1.8e9
DAY = 24 * 3600


def entry(cache, name, days, size=100, kind="volume", mark="entry.json"):
    folder = cache / kind / name[:2] / name
    folder.mkdir(parents=True)
    (folder / "image.npy").write_bytes(b"x" * (size - 2))
    (folder / mark).write_text("{}")
    os.utime(folder / mark, (NOW - days * DAY, NOW - days * DAY))
    os.utime(folder, (NOW - days * DAY, NOW - days * DAY))
    return folder


@pytest.fixture
def free(monkeypatch):
    """Set the bytes that the disk has free."""
    state = SimpleNamespace(free=10**9)
    monkeypatch.setattr(stale.shutil, "disk_usage", lambda _: state)
    return state


def test_what_was_not_used_for_long_goes(tmp_path, free):
    old, young = entry(tmp_path, "old", 31), entry(tmp_path, "young", 29)
    facts = entry(tmp_path, "oldfacts", 31, 50, "facts", "facts.json")
    other = tmp_path / "mine" / "ab" / "entry"
    other.mkdir(parents=True)
    (other / "entry.json").write_text("")
    os.utime(other / "entry.json", (0, 0))
    assert stale.drop_stale(tmp_path, NOW) == (2, 150)
    assert young.is_dir()
    assert other.is_dir()
    assert not old.exists()
    assert not facts.exists()
    assert not list(tmp_path.rglob("*.part"))
    assert stale.drop_stale(tmp_path, NOW) == (0, 0)


def test_a_cache_larger_than_what_is_free_loses_the_longest_unused(tmp_path, free):
    days = (25, 20, 15, 10, 6, 1)
    folders = [entry(tmp_path, f"e{number}", number) for number in days]
    free.free = 350  # 600 used: without the first two, 400 used and 550 free
    assert stale.drop_stale(tmp_path, NOW) == (2, 200)
    assert [folder.exists() for folder in folders] == [False, False, True, True, True, True]
    free.free = 0  # what may be in use stays, whatever is free
    assert stale.drop_stale(tmp_path, NOW) == (2, 200)
    assert [folder.exists() for folder in folders] == [False] * 4 + [True] * 2


def test_what_is_taken_up_this_moment_stays(tmp_path, free, monkeypatch):
    folder = entry(tmp_path, "old", 40)
    seen = stale._entries

    def then_used(*arguments):
        found = seen(*arguments)
        os.utime(folder / "entry.json", (NOW, NOW))
        return found

    monkeypatch.setattr(stale, "_entries", then_used)
    assert stale.drop_stale(tmp_path, NOW) == (0, 0)
    assert (folder / "image.npy").is_file()


def test_leftovers_of_a_killed_process_go_after_a_day(tmp_path, free):
    for name, days in ((".a.part", 2), (".b.part", 0.5)):
        part = tmp_path / "volume" / "ab" / name
        part.mkdir(parents=True)
        os.utime(part, (NOW - days * DAY, NOW - days * DAY))
    stale.drop_stale(tmp_path, NOW)
    assert [path.name for path in (tmp_path / "volume" / "ab").iterdir()] == [".b.part"]


def test_no_cache_is_nothing_to_do(tmp_path):
    assert stale.drop_stale(tmp_path / "none") == (0, 0)


def test_using_an_entry_makes_it_young(tmp_path):
    for kind, array in (("images", np.random.default_rng(0).random((5, 6, 7))), ("labels", np.ones((5, 6, 7)))):
        (tmp_path / "data" / kind).mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.eye(4)), tmp_path / "data" / kind / "a.nii.gz")
    (case,) = find_training_cases(tmp_path / "data")
    cache = VolumeCache(tmp_path / "cache", Labels.from_config({"background": 0, "thing": 1}))
    preprocessing = VolumePreprocessing(("image",), (Normalise("zscore"),))
    facts = cache.facts(case)
    made = cache.entry(case, facts, preprocessing)
    marks = [*(tmp_path / "cache").rglob("facts.json"), made.folder / "entry.json"]
    assert len(marks) == 2
    for mark in marks:
        os.utime(mark, (0, 0))
    cache.entry(case, cache.facts(case), preprocessing)
    assert cache.tidy() == (0, 0)
    for mark in marks:
        os.utime(mark, (0, 0))
    assert cache.tidy()[0] == 2
    assert np.array_equal(cache.entry(case, cache.facts(case), preprocessing).array("truth"), np.ones((5, 6, 7)))
