import itertools
import json
import math
import os
import pickle
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from visattn.labels import IGNORE, Labels
from visattn.metrics import SUITES, SegmentationMetrics, case_metrics
from visattn.metrics.calibration import count_bins, describe_calibration
from visattn.metrics.confusion import count_confusion, describe_confusion


def some_cases(labels, blob, count, seed=0):
    generator = np.random.default_rng(seed)
    for number in range(count):
        shape = tuple(generator.integers(12, 30, 2))
        probabilities = np.stack([blob(generator, shape, 2) for _ in range(labels.channels)])
        truth = labels.from_probabilities(probabilities + generator.normal(size=probabilities.shape) * 0.2)
        if number % 4 == 3:
            truth[:] = 0
        yield f"case {number} é", labels.from_probabilities(probabilities), truth, probabilities


@pytest.mark.parametrize("suite", ["headline", "surface", "full"])
@pytest.mark.parametrize("kind", ["binary", "three", "regions"])
def test_means_are_those_of_the_rows(request, blob, kind, suite):
    labels = request.getfixturevalue(kind)
    metric = SegmentationMetrics(labels, suite)
    table = []
    for name, prediction, truth, probabilities in some_cases(labels, blob, 9):
        metric.update(name, prediction, truth, probabilities, group=f"patient {len(table) // 2}")
        table.append(case_metrics(prediction, truth, labels, probabilities, suite))
    result = metric.compute()
    by_class = {name: [rows[index] for rows in table] for index, name in enumerate(labels.foreground)}
    for measure in SUITES[suite]:
        expected = []
        for name, rows in by_class.items():
            defined = [row[measure] for row in rows if row[measure] is not None]
            expected.append(sum(defined) / len(defined))
            assert result[f"{name}/{measure}"] == pytest.approx(expected[-1])
        assert result[f"mean/{measure}"] == pytest.approx(sum(expected) / len(expected))
    assert result["cases"] == 9
    for name, rows in by_class.items():
        assert result[f"{name}/undefined"] == sum(row["dice"] is None for row in rows)
    assert all(isinstance(value, int | float) for value in result.values())

    rows = metric.rows()
    assert [row["case"] for row in rows[:: len(by_class)]] == [f"case {number} é" for number in range(9)]
    assert (rows[-1]["group"], rows[-1]["class"]) == ("patient 4", labels.foreground[-1])
    measured = [{key: row[key] for key in SUITES[suite]} for row in rows]
    assert measured == [row for rows in table for row in rows]


def test_max_e_of_the_set_is_that_of_pysodmetrics(binary, blob, pysodmetrics):
    import py_sod_metrics

    from visattn.metrics.maps import protocol_levels

    metric, oracle = SegmentationMetrics(binary, "full"), py_sod_metrics.Emeasure()
    for name, prediction, truth, probabilities in some_cases(binary, blob, 6):
        if truth.any():
            metric.update(name, prediction, truth, probabilities)
            oracle.step(protocol_levels(probabilities[0]), truth * 255)
    nothing = np.zeros((20, 20), np.uint8)
    metric.update("undefined, so left out", nothing, nothing)
    result = metric.compute()
    expected = oracle.get_results()["em"]["curve"].max()
    assert result["polyp/e_max_curve"] == pytest.approx(expected, abs=1e-6)
    assert result["polyp/e_max"] > expected + 1e-3  # every case at its own best threshold


def test_a_repeated_case_counts_once(binary, blob):
    cases = list(some_cases(binary, blob, 5))
    once, padded = SegmentationMetrics(binary), SegmentationMetrics(binary)
    for case in cases:
        once.update(*case)
    for case in [*cases, cases[0], cases[1]]:
        padded.update(*case)
    assert padded.compute() == once.compute()
    assert len(padded.rows()) == 5
    # A name may come back in another group: patients number their images from 1.
    padded.update(*cases[0], group="another patient")
    assert padded.compute()["cases"] == 6


def test_reset_and_no_cases(binary, blob):
    metric = SegmentationMetrics(binary, "full")
    for case in some_cases(binary, blob, 3):
        metric.update(*case)
    metric.reset()
    assert metric.rows() == []
    with pytest.warns(UserWarning, match="before the ``update``"):
        result = metric.compute()
    assert result["cases"] == result["polyp/undefined"] == 0
    assert all(math.isnan(result[f"mean/{name}"]) for name in ("dice", "e_max_curve"))


def test_the_suite_can_change_between_epochs_only(binary, blob):
    metric = SegmentationMetrics(binary)
    first, second, third, _ = some_cases(binary, blob, 4)
    metric.update(*first)
    assert "mean/hd95" not in metric.compute()
    metric.update(*second, suite="full")
    with pytest.raises(ValueError, match="different suites"):
        metric.compute()
    metric.reset()
    metric.update(*third, suite="full")
    assert "mean/hd95" in metric.compute()


def test_survives_conversion_and_pickling(binary, blob):
    metric = SegmentationMetrics(binary, "full")
    for case in some_cases(binary, blob, 3):
        metric.update(*case)
    expected = metric.compute()
    copy = pickle.loads(pickle.dumps(metric.bfloat16()))
    copy._computed = None
    assert copy.compute() == expected
    assert {state.dtype for state in copy.records} == {torch.int64}
    assert copy.confusion() == metric.confusion()
    assert copy.calibration() == metric.calibration()


@pytest.mark.parametrize("kind", ["binary", "three", "regions"])
def test_confusion_and_calibration_are_sums_over_cases(request, blob, kind):
    labels = request.getfixturevalue(kind)
    metric = SegmentationMetrics(labels, "full")
    cases = list(some_cases(labels, blob, 5))
    for name, prediction, truth, probabilities in [*cases, cases[2]]:  # a repeated case counts once
        truth[:2, :3] = IGNORE
        metric.update(name, prediction, truth, probabilities)
    counts = sum(count_confusion(prediction, truth, labels) for _, prediction, truth, _ in cases)
    assert metric.confusion() == describe_confusion(counts, labels)
    assert counts.sum() == sum(truth.size - 6 for _, _, truth, _ in cases) * max(1, len(labels.regions))
    sums = sum(count_bins(probabilities, truth, labels) for _, _, truth, probabilities in cases)
    found, expected = metric.calibration(), describe_calibration(sums, labels)
    assert list(found) == list(labels.foreground)
    for name in found:
        assert found[name]["count"] == expected[name]["count"]
        assert found[name]["ece"] == pytest.approx(expected[name]["ece"])
        assert found[name]["ece"] > 0.01
    json.dumps([metric.confusion(), found])


def test_pixels_are_kept_in_the_full_suite_alone(binary, blob):
    metric = SegmentationMetrics(binary)
    assert metric.confusion() == metric.calibration() == {}
    for case in some_cases(binary, blob, 2):
        metric.update(*case)
    assert metric.confusion() == metric.calibration() == {}
    metric.reset()
    for name, prediction, truth, _ in some_cases(binary, blob, 2):
        metric.update(name, prediction, truth, suite="full")
    assert metric.confusion()
    assert metric.calibration() == {}, "a mask has no probabilities"
    metric.reset()
    assert metric.confusion() == {}


def test_a_class_called_mean_is_refused():
    with pytest.raises(ValueError, match="'mean'"):
        SegmentationMetrics(Labels.from_config({"background": 0, "mean": 1}))


def ranks(labels, cases, shares, suite="headline"):
    """Metrics of several processes in one: each gathers what all hold."""
    everyone = []

    states = itertools.cycle(("names", "records", "pixels"))  # torchmetrics asks for them in the order of add_state

    def gather(state, group=None):
        name = next(states)
        return [torch.cat(getattr(metric, name)) for metric in everyone]

    for share in shares:
        metric = SegmentationMetrics(labels, suite, dist_sync_fn=gather, distributed_available_fn=lambda: True)
        for index in share:
            metric.update(*cases[index])
        everyone.append(metric)
    return everyone


@pytest.mark.parametrize("shares", [[[0, 2, 4, 6], [1, 3, 5, 0]], [[6, 5, 4, 3, 2], [0, 1]], [range(7), []]])
def test_two_processes_equal_one(three, blob, shares):
    cases = list(some_cases(three, blob, 7))
    alone = SegmentationMetrics(three, "full")
    for case in cases:
        alone.update(*case)
    for metric in ranks(three, cases, shares, "full"):
        assert metric.rows() == alone.rows()
        assert metric.confusion() == alone.confusion()
        assert metric.calibration() == alone.calibration()
        if metric.update_called:
            assert metric.compute() == alone.compute()
            assert metric.compute()["cases"] == 7


WORKER = """
import json, sys, warnings
import numpy as np
import torch.distributed as dist
from torch.utils.data import DistributedSampler
from visattn.labels import Labels
from visattn.metrics import SegmentationMetrics

rank, target = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", rank=rank, world_size=2)
labels = Labels.from_config({"background": 0, "polyp": 255})
metric = SegmentationMetrics(labels, "full")
found = []
for share in (list(DistributedSampler(range(7), 2, rank, shuffle=False)), [0] if rank else []):
    metric.reset()
    for index in share:
        generator = np.random.default_rng(index)
        truth, probabilities = np.zeros((20, 24 + index), np.uint8), generator.random((1, 20, 24 + index))
        truth[4:12, 5 + index:15] = 1
        metric.update(f"case {index}", labels.from_probabilities(probabilities), truth, probabilities)
    pixels = [metric.confusion(), metric.calibration()]
    found.append({"seen": share, "result": metric.compute(), "rows": metric.rows(), "pixels": pixels})
with open(f"{target}/{rank}.json", "w") as file:
    json.dump(found, file)
dist.destroy_process_group()
"""


@pytest.mark.slow  # two fresh processes, each importing torch
def test_two_real_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", WORKER, str(rank), str(tmp_path)], env=environment)
        for rank in (0, 1)
    ]
    try:
        assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    padded, lopsided = zip(*(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)), strict=True)
    assert sum(len(process["seen"]) for process in padded) == 8  # the sampler did repeat a case
    assert lopsided[0]["seen"] == []  # a process that saw nothing
    for (first, second), count in ((padded, 7), (lopsided, 1)):
        assert first["result"] == second["result"]
        assert first["rows"] == second["rows"]
        assert first["pixels"] == second["pixels"]
        assert sum(map(sum, first["pixels"][0]["counts"])) == sum(20 * (24 + index) for index in range(count))
        assert first["result"]["cases"] == len(first["rows"]) == count
        mean = sum(row["dice"] for row in first["rows"]) / count
        assert first["result"]["mean/dice"] == pytest.approx(mean)
