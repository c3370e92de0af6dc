import numpy as np
import pytest
import torch
from PIL import Image
from predict_fakes import mask, save_image

import visattn
import visattn.networks
from visattn.checkpoint import KEY
from visattn.errors import UserError
from visattn.predict import predict_folder
from visattn.predictor import Predictor, load


def test_the_same_pixels_from_python(tmp_path, checkpoint):
    array = save_image(tmp_path / "a.png", seed=5, size=(40, 24))
    predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out")
    predictor = visattn.load(checkpoint)
    expected = mask(tmp_path / "out" / "a.png")
    image = Image.open(tmp_path / "a.png")
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), image, np.asarray(image)):
        np.testing.assert_array_equal(predictor.predict(given), expected)
    assert predictor.predict_proba(image).shape == (1, 40, 24)
    grey = predictor.predict(array)
    assert grey.shape == (40, 24)
    assert predictor.recipe == {"seed_everything": 0}
    for bad in (array.astype(np.float32), np.zeros((2, 2, 4), np.uint8), np.zeros((0, 3, 3), np.uint8)):
        with pytest.raises(UserError, match="must be uint8"):
            predictor.predict(bad)
    with pytest.raises(UserError, match="more than 8 bits"):
        predictor.predict(Image.new("I;16", (3, 3)))


def test_a_checkpoint_whose_parts_disagree(tmp_path, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    entry = content[KEY]
    for key, value in [
        ("labels", {"labels": {"background": 0}}),
        ("preprocessing", {"size": [0, 3], "mean": [0.0], "std": [1.0], "channels": 1}),
        ("preprocessing", entry["preprocessing"] | {"std": [0.0] * 3}),
        ("postprocessing", {}),
        ("network", entry["network"] | {"classes": 4}),
        ("network", entry["network"] | {"activation": "softmax"}),
    ]:
        torch.save(content | {KEY: entry | {key: value}}, tmp_path / "bad.ckpt")
        with pytest.raises(UserError, match=r"bad\.ckpt: damaged checkpoint"):
            load(tmp_path / "bad.ckpt")
    torch.save(content | {KEY: entry | {"task": "detection"}}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="its task is 'detection'"):
        load(tmp_path / "bad.ckpt")
    assert "Predictor(bright" in repr(Predictor(load(checkpoint).checkpoint))
