"""Copies are found in any dress, different images are not, and sixty thousand hashes cost little time and memory."""

import tracemalloc

import cv2
import numpy as np
import pytest

from visattn.data.images import read_image
from visattn.data.phantom import phantom_images
from visattn.doctor import twins
from visattn.doctor.sequences import find_sequences
from visattn.doctor.twins import RADIUS, find_twins, gather, near_pairs, thumbnail


def thumbnails(images):
    return np.stack([thumbnail(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)) for image in images])


def reencoded(image, quality):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def resized(image, factor):
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=how)


DRESSES = {
    "quality 30": lambda image: reencoded(image, 30),
    "half": lambda image: resized(image, 0.5),
    "double": lambda image: resized(image, 2),
    "brighter": lambda image: np.clip(image * 1.1 + 8, 0, 255).astype(np.uint8),
    "blurred": lambda image: cv2.GaussianBlur(image, (0, 0), 1),
    "mirrored": lambda image: np.ascontiguousarray(image[:, ::-1]),
    "upside down": lambda image: np.ascontiguousarray(image[::-1]),
    "turned by 90": lambda image: np.rot90(image).copy(),
    "turned by 270": lambda image: np.rot90(image, 3).copy(),
    "transposed": lambda image: np.ascontiguousarray(image.transpose(1, 0, 2)),
}


@pytest.fixture(scope="module")
def pictures():
    return [image for image, _, _ in phantom_images(24, seed=3, size=(96, 120))]


@pytest.mark.parametrize("small", [True, False], ids=["all pairs", "by hash"])
@pytest.mark.parametrize("dress", DRESSES)
def test_a_copy_is_found_and_nothing_else(pictures, dress, small, monkeypatch):
    monkeypatch.setattr(twins, "SMALL", 10**6 if small else 0)
    found = find_twins(thumbnails([*pictures, DRESSES[dress](pictures[5])]))
    assert [(twin.first, twin.second) for twin in found] == [(5, 24)]
    assert found[0].turned == dress.startswith(("mirrored", "upside", "turned", "transposed"))


def test_turned_copies_are_left_alone_if_not_asked_for(pictures):
    assert find_twins(thumbnails([*pictures, DRESSES["mirrored"](pictures[5])]), turned=False) == []


def test_constant_images_are_no_twins():
    assert find_twins(np.full((5, 32, 32), 7, np.uint8)) == []


def test_equal_thumbnails_are_tied_to_the_first(pictures):
    small = thumbnails([pictures[0], pictures[1], pictures[0], pictures[0]])
    assert [(twin.first, twin.second) for twin in find_twins(small)] == [(0, 2), (0, 3)]


def slow_pairs(hashes, others, radius):
    return {
        (i, j)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if int(hashes[i] ^ others[j]).bit_count() <= radius
    }


@pytest.mark.parametrize("radius", [3, RADIUS])
def test_near_pairs_are_those_of_a_slow_loop(radius):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 150, dtype=np.uint64)
    for index in range(50, 110):  # copies with 0 to 9 bits changed
        bits = rng.choice(63, index % 10, replace=False)
        hashes[index] = hashes[index - 50] ^ np.uint64(sum(1 << int(bit) for bit in bits))
    others = rng.permutation(hashes)
    for against in (hashes, others):
        first, second = near_pairs(hashes, None if against is hashes else others, radius)
        found = set(zip(first.tolist(), second.tolist(), strict=True))
        assert found == slow_pairs(hashes, against, radius)
        assert len(found) > 5


def test_the_search_compares_few_pairs_and_needs_little_memory(monkeypatch):
    """Comparisons are counted: a tenfold set may cost no more than a hundredth of all its pairs."""
    compared = []
    count = np.bitwise_count
    monkeypatch.setattr(np, "bitwise_count", lambda array: compared.append(len(array)) or count(array))
    rng = np.random.default_rng(0)
    for number in (2000, 20000):
        compared.clear()
        hashes = rng.integers(0, 2**63, number, dtype=np.uint64)
        hashes[number // 2] = hashes[0] ^ np.uint64(0b101)
        tracemalloc.start()
        first, second = near_pairs(hashes)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (first.tolist(), second.tolist()) == ([0], [number // 2])
        assert sum(compared) < 0.02 * number * (number - 1) / 2 + 20 * number
        assert peak < 400 * number


def test_ten_thousand_equal_hashes_do_not_explode():
    first, _ = near_pairs(np.full(10_000, 12345, np.uint64))
    assert 10_000 <= len(first) <= 10_000 * 2 * 32 * (RADIUS + 1)


@pytest.mark.slow
def test_sixty_thousand_images():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (60_000, 32, 32), np.uint8)
    small[30_000:30_010] = small[:10, :, ::-1]
    small[40_000:40_010] = np.clip(small[:10].astype(int) + rng.integers(-3, 4, (10, 32, 32)), 0, 255)
    found = {(twin.first, twin.second, twin.turned) for twin in find_twins(small)}
    assert {(i, 30_000 + i, True) for i in range(10)} | {(i, 40_000 + i, False) for i in range(10)} <= found
    assert len(found) == 30  # and the two copies of one image, which are mirrored copies of each other


def test_gather():
    assert gather([(4, 2), (7, 9), (2, 1), (9, 8)]) == [[1, 2, 4], [7, 8, 9]]
    assert gather([]) == []


def test_images_in_no_order_are_no_video(pictures):
    colours = np.zeros((len(pictures), 256), np.uint8)
    assert find_sequences([str(i) for i in range(len(pictures))], thumbnails(pictures), colours) == []


def test_the_videos_of_clinicdb(real_data):
    from visattn.doctor import examine_folder

    report = examine_folder(real_data / "cvc_clinicdb")
    ends = {}
    for first, index in report.ties:
        ends[first] = max(ends.get(first, 0), int(report.images[index].image.stem))
    assert {25, 50, 67, 78, 103} <= set(ends.values())
    assert report.exit_code == 0


@pytest.mark.parametrize("name", ["kvasir_seg", "chase_db1", "dsb2018_nuclei"])
def test_different_real_images_are_no_twins(real_data, name):
    files = sorted((real_data / name / "images").iterdir())[:60]
    assert find_twins(thumbnails([read_image(path) for path in files])) == []
