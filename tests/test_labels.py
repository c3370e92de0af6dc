import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn.errors import UserError
from visattn.labels import IGNORE, Labels

BINARY = Labels.from_config({"background": 0, "polyp": 255})
ORGANS = Labels.from_config({"background": 0, "left": 1, "right": [2, 7], "spleen": 3}, ignore=9)
TUMOUR = Labels.from_config(
    {"background": 0, "oedema": 1, "necrosis": 2, "enhancing": 4},
    regions={
        "whole": ["oedema", "necrosis", "enhancing"],
        "core": ["necrosis", "enhancing"],
        "enhancing": ["enhancing"],
    },
)


@pytest.mark.parametrize(
    ("labels", "binary", "channels", "activation", "foreground"),
    [
        (BINARY, True, 1, "sigmoid", ("polyp",)),
        (ORGANS, False, 4, "softmax", ("left", "right", "spleen")),
        (TUMOUR, False, 3, "sigmoid", ("whole", "core", "enhancing")),
        (Labels.from_config({"a": 0, "b": 1}, regions={"b": ["b"]}), False, 1, "sigmoid", ("b",)),
    ],
)
def test_kind_of_task(labels, binary, channels, activation, foreground):
    assert (labels.binary, labels.channels, labels.activation, labels.foreground) == (
        binary,
        channels,
        activation,
        foreground,
    )


@pytest.mark.parametrize("labels", [BINARY, ORGANS, TUMOUR])
def test_config_round_trip(labels):
    config = labels.to_config()
    assert Labels.from_config(**config) == labels
    assert all(type(value) in (int, list) for value in config["labels"].values())


def test_encode_exact_merged_and_ignored():
    array = np.array([[0, 1, 2, 7, 3, 9]], np.int32)
    assert ORGANS.encode(array, "m.png").tolist() == [[0, 1, 2, 2, 3, IGNORE]]
    assert ORGANS.decode(np.array([0, 1, 2, 3, IGNORE])).tolist() == [0, 1, 2, 3, 9]


def test_encode_takes_the_nearer_of_two_far_labels():
    array = np.array([0, 8, 127, 128, 247, 255], np.uint8)
    assert BINARY.encode(array, "m.jpg").tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("extra", [{}, {"e": 5000}])
def test_encode_agrees_with_a_loop_over_all_values(extra):
    labels = Labels.from_config({"a": 40, "b": [0, 1], "c": 100, "d": 200, **extra}, ignore=255)
    owner = {40: 0, 0: 1, 1: 1, 100: 2, 200: 3, 255: IGNORE, **dict.fromkeys(extra.values(), 4)}
    for value in [*range(300), *range(4980, 5020)]:
        nearest = min(owner, key=lambda known: abs(known - value))
        if abs(nearest - value) <= 8:
            assert labels.encode(np.array([value]), "m").tolist() == [owner[nearest]]
        else:
            with pytest.raises(UserError, match=f"value {value} "):
                labels.encode(np.array([value]), "m")


def test_encode_with_three_far_labels_refuses_what_lies_between():
    labels = Labels.from_config({"background": 0, "cup": 128, "disc": 255})
    assert labels.encode(np.array([3, 120, 136, 250]), "m.jpg").tolist() == [0, 1, 1, 2]
    with pytest.raises(UserError, match=r"m\.jpg.*value 190"):  # an edge from 128 to 255, or from 0 to 255?
        labels.encode(np.array([0, 190]), "m.jpg")


def test_masks_of_0_and_1_and_noisy_ones_of_0_and_255_share_a_map():
    labels = Labels.from_config({"background": 0, "polyp": [255, 1]})
    assert labels.encode(np.array([0, 1, 1]), "m.png").tolist() == [0, 1, 1]
    assert labels.encode(np.array([0, 1, 255]), "m.png").tolist() == [0, 1, 1]
    assert labels.encode(np.array([0, 1, 3, 127, 128, 251, 255]), "m.jpg").tolist() == [0, 0, 0, 0, 1, 1, 1]
    for mask in ([0, 1, 2], [0, 1, 2, 255]):  # classes that the map does not name, not noise
        with pytest.raises(UserError, match="value 2 "):
            labels.encode(np.array(mask), "m.png")


def test_encode_needs_exact_values_where_labels_are_close():
    labels = Labels.from_config({"background": 0, "a": 10, "b": 20})
    with pytest.raises(UserError, match="value 9 "):
        labels.encode(np.array([0, 9, 20]), "m.png")


@pytest.mark.parametrize("value", [300, 65535, 70000, -1])
def test_encode_refuses_values_beyond_the_labels(value):
    with pytest.raises(UserError, match=r"m\.png"):
        BINARY.encode(np.array([0, value]), "m.png")


def test_zero_one_mask_is_not_taken_for_an_empty_one():
    with pytest.raises(UserError, match=r"m\.png: the mask holds only 0 and 1.*write the 1"):
        BINARY.encode(np.array([[0, 1], [1, 0]]), "m.png")
    assert BINARY.encode(np.array([[0, 1, 2]]), "m.jpg").tolist() == [[0, 0, 0]]  # noise of an empty JPEG
    assert BINARY.encode(np.zeros((2, 2), int), "m.png").tolist() == [[0, 0], [0, 0]]


def test_mask_of_0_and_255_under_labels_0_and_1_names_the_value():
    with pytest.raises(UserError, match="value 255"):
        Labels.from_config({"background": 0, "polyp": 1}).encode(np.array([0, 255]), "m.png")


def test_error_lists_few_of_many_values():
    with pytest.raises(UserError) as caught:
        ORGANS.encode(np.arange(200), "m.png")
    assert "4, 5, 6, 8, 10, 11, ..." in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 6


@given(st.data())
@settings(deadline=None)
def test_encode_decode_round_trip(data):
    values = data.draw(st.lists(st.integers(0, 65535), min_size=2, max_size=254, unique=True))
    labels = Labels.from_config({f"l{i}": value for i, value in enumerate(values)})
    indices = np.array(data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=40)), np.uint8)
    written = labels.decode(indices)
    assert written.dtype == (np.uint8 if max(values) < 256 else np.uint16)
    if max(written) == 1 and 1 not in values:
        return
    assert (labels.encode(written, "m") == indices).all()


def test_decode_refuses_an_unknown_class():
    with pytest.raises(ValueError, match="4 classes"):
        ORGANS.decode(np.array([0, 4]))
    with pytest.raises(ValueError, match="2 classes"):
        BINARY.decode(np.array([0, IGNORE]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": {"a": 0}}, "2 to 254"),
        ({"labels": {f"l{i}": i for i in range(255)}}, "2 to 254"),
        ({"labels": {"a": 0, "b": 0}}, "value 0 is given to 'a' and again to 'b'"),
        ({"labels": {"a": 0, "b": [1, 1]}}, "value 1"),
        ({"labels": {"a": 0, "b": 1}, "ignore": 1}, "again to 'ignore'"),
        ({"labels": {"a": 0, "b": 1.5}}, "1.5"),
        ({"labels": {"a": 0, "b": True}}, "True"),
        ({"labels": {"a": 0, "b": "1"}}, "'1'"),
        ({"labels": {"a": 0, "b": -1}}, "-1"),
        ({"labels": {"a": 0, "b": []}}, "empty"),
        ({"labels": {"a": 0, False: 1}}, "quotes"),
        ({"labels": ["a", "b"]}, "2 to 254"),
        ({"labels": {"a": 0, "b": 1}, "regions": {"r": ["bb"]}}, "Did you mean 'b'"),
        ({"labels": {"a": 0, "b": 1}, "regions": {"r": ["a"]}}, "background"),
        ({"labels": {"a": 0, "b": 1}, "regions": {"r": []}}, "list of labels"),
        ({"labels": {"a": 0, "b": 1, "c": 2}, "regions": {"r": ["b"], "s": ["b", "c"]}}, "all labels of 'r'"),
        ({"labels": {"a": 0, "b": 1}, "regions": {"r": ["b", "b"]}}, "twice"),
    ],
)
def test_bad_configs(arguments, message):
    with pytest.raises(UserError, match=message):
        Labels.from_config(**arguments)


def test_onehot_of_arrays_and_tensors():
    indices = np.array([[0, 1, 3, IGNORE]], np.uint8)
    assert BINARY.onehot(np.array([[0, 1, IGNORE]])).tolist() == [[[False, True, False]]]
    assert ORGANS.onehot(indices)[:, 0].astype(int).T.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0] * 4]
    regions = TUMOUR.onehot(np.array([[0, 1, 2, 3, IGNORE]]))[:, 0].astype(int).T
    assert regions.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]]
    batch = TUMOUR.onehot(torch.tensor([[[0, 1, 2, 3]]]), axis=1)
    assert batch.shape == (1, 3, 1, 4)
    assert batch.dtype == torch.bool
    assert (batch[0].numpy() == TUMOUR.onehot(np.array([[0, 1, 2, 3]]))).all()


def test_from_probabilities():
    assert BINARY.from_probabilities(np.array([[[0.49, 0.5, 0.9]]])).tolist() == [[0, 1, 1]]
    assert BINARY.from_probabilities(np.array([[[0.49, 0.5, 0.9]]]), 0.8).tolist() == [[0, 0, 1]]
    assert ORGANS.from_probabilities(np.array([0.1, 0.2, 0.4, 0.3])[:, None, None]).tolist() == [[2]]
    painted = TUMOUR.from_probabilities(np.array([[[0, 1, 1, 1, 0]], [[0, 0, 1, 1, 0]], [[0, 0, 0, 1, 1]]], float))
    assert painted.tolist() == [[0, 1, 2, 3, 3]]
    with pytest.raises(ValueError, match="4 channels"):
        ORGANS.from_probabilities(np.zeros((3, 2, 2)))


@pytest.mark.parametrize("labels", [BINARY, ORGANS, TUMOUR])
def test_certain_probabilities_give_the_truth_back(labels):
    indices = np.arange(len(labels.names), dtype=np.uint8)[None]
    assert (labels.from_probabilities(labels.onehot(indices).astype(float)) == indices).all()
