import cv2
import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from visattn.metrics import case_metrics
from visattn.metrics.maps import protocol_levels


def predictions(truth, generator):
    """A mask moved and blurred, one far too small, and one with a stray blob, as maps in 0..1."""
    height, width = truth.shape
    shift = np.float32([[1, 0, generator.integers(-9, 10)], [0, 1, generator.integers(-9, 10)]])
    moved = cv2.GaussianBlur(cv2.warpAffine(truth, shift, (width, height)).astype(np.float32), (0, 0), 5)
    small = cv2.erode(truth, np.ones((3, 3), np.uint8), iterations=min(height, width) // 40).astype(np.float32)
    stray = moved.copy()
    stray[: height // 9, : width // 9] = 0.9
    return [np.clip(probability + generator.random(truth.shape) * 0.04, 0, 1) for probability in (moved, small, stray)]


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
def test_kvasir_masks_score_as_pysodmetrics_and_monai_say(real_data, binary, pysodmetrics):
    files = sorted((real_data / "kvasir_seg" / "masks").glob("*"))[::40]
    assert len(files) >= 5
    generator = np.random.default_rng(0)
    compared = 0
    for file in files:
        truth = (cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) > 127).astype(np.uint8)
        for probability in predictions(truth, generator):
            prediction = binary.from_probabilities(probability[None])
            if not prediction.any():
                continue
            (row,) = case_metrics(prediction, truth, binary, probability[None], "full")
            expected = pysodmetrics(protocol_levels(probability), truth.astype(bool))
            assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6)
            a, b = (torch.tensor(mask)[None, None].float() for mask in (prediction, truth))
            hd95 = compute_hausdorff_distance(a, b, include_background=True, percentile=95).item()
            nsd = compute_surface_dice(a, b, [2.0], include_background=True).item()
            assert row["hd95"] == pytest.approx(hd95, rel=1e-5)
            assert row["nsd"] == pytest.approx(nsd, abs=1e-6)
            compared += 1
    assert compared >= 12
