import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryConfusionMatrix, MulticlassConfusionMatrix

from visattn.labels import IGNORE, Labels
from visattn.metrics.confusion import confusion_shape, count_confusion, describe_confusion


def indices(generator, classes, shape=(13, 17), ignored=True):
    array = generator.integers(0, classes, shape).astype(np.uint8)
    if ignored:
        array[generator.random(shape) < 0.1] = IGNORE
    return array


@pytest.mark.parametrize("kind", ["binary", "three"])
def test_counts_are_those_of_a_loop_and_of_torchmetrics(request, kind):
    labels = request.getfixturevalue(kind)
    classes = len(labels.names)
    generator = np.random.default_rng(0)
    truth, prediction = indices(generator, classes), indices(generator, classes, ignored=False)
    naive = [[0] * classes for _ in range(classes)]
    for true, predicted in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if true != IGNORE:
            naive[true][predicted] += 1
    counts = count_confusion(prediction, truth, labels)
    assert counts.tolist() == naive
    assert counts.shape == confusion_shape(labels)
    oracle = (
        BinaryConfusionMatrix(ignore_index=IGNORE)
        if classes == 2
        else MulticlassConfusionMatrix(classes, ignore_index=IGNORE)
    )
    assert oracle(torch.from_numpy(prediction).long(), torch.from_numpy(truth).long()).tolist() == naive
    assert describe_confusion(counts, labels) == {"names": list(labels.names), "counts": naive}


def test_each_region_has_its_own_table(regions):
    generator = np.random.default_rng(1)
    truth, prediction = indices(generator, 3), indices(generator, 3, ignored=False)
    expected = {}
    for name, members in (("whole", {1, 2}), ("centre", {2})):
        naive = [[0, 0], [0, 0]]
        for true, predicted in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
            if true != IGNORE:
                naive[true in members][predicted in members] += 1
        expected[name] = naive
    counts = count_confusion(prediction, truth, regions)
    assert counts.shape == confusion_shape(regions) == (2, 2, 2)
    assert describe_confusion(counts, regions) == {"regions": expected}


def test_a_case_in_which_all_is_ignored_counts_nothing(three):
    truth = np.full((5, 7), IGNORE, np.uint8)
    assert count_confusion(np.ones((5, 7), np.uint8), truth, three).sum() == 0


def test_many_pixels_and_classes_do_not_overflow():
    labels = Labels.from_config({f"c{index}": index for index in range(254)})
    truth = np.full((300, 300), 253, np.uint8)  # 253 * 254 does not fit a byte, 90000 not 16 bits
    counts = count_confusion(truth, truth, labels)
    assert counts[253, 253] == counts.sum() == 90000


def test_what_does_not_fit_is_refused(binary):
    with pytest.raises(ValueError, match="shape"):
        count_confusion(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), binary)
    with pytest.raises(ValueError, match=r"prediction has indices 0\.\.2"):
        count_confusion(np.array([[0, 2]]), np.zeros((1, 2), np.uint8), binary)
