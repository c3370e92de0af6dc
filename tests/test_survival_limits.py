"""What is told when memory, space or permission runs out, and what is left."""

import errno
import multiprocessing
import os
import shutil
import threading
from collections import namedtuple

import pytest
import torch

from visattn import space
from visattn.base_task import WeightAverage
from visattn.cli import main
from visattn.errors import UserError
from visattn.failures import explained
from visattn.files import atomic_write, remove_leftovers, write_text_atomic
from visattn.recipe import resolve
from visattn.runs import find_checkpoint, named_run
from visattn.task import SegmentationTask

ADVICE = "Lower data.batch_size (16) or data.size (352)."


def told(error: Exception) -> str:
    with pytest.raises(UserError) as caught, explained(ADVICE, "runs/a"):
        raise error
    assert len(str(caught.value).splitlines()) <= 6
    return str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("unable to mmap 805306368 bytes from file </torch_1_2_0>: Cannot allocate memory (12)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError("Unable to allocate 9.31 GiB for an array with shape (25, 100000000)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_names_the_keys_to_lower(error):
    assert told(error) == f"out of memory.\n{ADVICE}"


def test_a_full_disk_names_the_file_and_how_to_go_on(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, atomic_write(tmp_path / "metrics.csv"):
        raise OSError(errno.ENOSPC, "No space left on device")
    said = told(caught.value)
    assert f"{tmp_path / 'metrics.csv'}: cannot be written: No space left" in said
    assert "--run runs/a --ckpt_path last" in said
    hidden = RuntimeError("unexpected pos 64 vs 0")
    hidden.__context__ = OSError(errno.EROFS, "Read-only file system")
    assert "make it writable" in told(hidden)


def test_what_a_loading_process_says_is_told_without_its_traceback():
    text = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n"
    assert told(UserError(text + "visattn.errors.UserError: a.png: truncated\n")) == "a.png: truncated"
    assert told(UserError("a.png: truncated\nCopy it again.")) == "a.png: truncated\nCopy it again."
    assert "data.num_workers" in told(RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed."))


def test_a_failed_compilation_names_its_key():
    class BackendError(RuntimeError):
        pass

    BackendError.__module__ = "torch._dynamo.exc"
    assert "model.compile" in told(BackendError("backend='inductor' raised:\nNo working C++ compiler found"))


def test_a_defect_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="size mismatch"), explained(ADVICE, "runs/a"):
        raise RuntimeError("size mismatch")
    with pytest.raises(FileNotFoundError), explained(ADVICE, "runs/a"):
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")


def test_too_small_a_disk_is_told_with_what_is_needed(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 400_000_000))
    space.refuse_too_small(tmp_path / "new" / "run", 100_000_000, 3)
    with pytest.raises(UserError, match=r"400 MB are free, and this run needs about 650 MB \(3 x 200 MB"):
        space.refuse_too_small(tmp_path / "new" / "run", 200_000_000, 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 1000))
    with pytest.raises(UserError, match="is full"):
        space.refuse_unwritable(tmp_path, "--run")


def test_a_read_only_place_and_a_file_are_refused_by_the_option_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--run: .*is a file"):
        space.refuse_unwritable(tmp_path / "file" / "run", "--run")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=r"trainer.default_root_dir: .*read-only"):
        space.refuse_unwritable(tmp_path / "new" / "run", "trainer.default_root_dir")


def _hold(folder, entered, leave):
    with space.held(folder):
        entered.set()
        leave.wait(20)


def test_two_trainings_do_not_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    entered, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, entered, leave))
    other.start()
    assert entered.wait(20)
    with pytest.raises(UserError, match="another process is training there"), space.held(tmp_path):
        pass
    leave.set()
    other.join()
    with space.held(tmp_path):
        child = context.Process(target=leave.wait, args=(20,))  # a loader that outlives its parent holds nothing
        child.start()
    child.join()


def test_files_have_the_permissions_of_the_umask_and_no_thread_sees_it_changed(tmp_path):
    before = os.umask(0o027)
    try:
        write_text_atomic(tmp_path / "a.json", "{}")
        assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
        seen = []
        watching = threading.Thread(target=lambda: seen.extend(_umasks(200)))
        watching.start()
        for number in range(50):
            write_text_atomic(tmp_path / f"{number}.json", "{}")
        watching.join()
        assert set(seen) == {0o640}
    finally:
        os.umask(before)


def _umasks(count: int):
    """The modes of new files, made while another thread writes."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            path = os.path.join(folder, str(number))
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))
            yield os.stat(path).st_mode & 0o777


def test_leftovers_of_a_killed_process_go_and_nothing_else(tmp_path):
    for name in (".last-0123456789ab.part.ckpt", "last.ckpt", ".lock", "part.ckpt"):
        (tmp_path / name).touch()
    (tmp_path / ".masks.part").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", ".masks.part", "last.ckpt", "part.ckpt"]


def test_a_run_without_a_checkpoint_is_begun_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {}")
    assert named_run(tmp_path / "run") == tmp_path / "run"
    with pytest.raises(UserError, match="leave --ckpt_path out"):
        find_checkpoint("last", tmp_path, "name", tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match="holds a run already"):
        named_run(tmp_path / "run")


def test_the_average_of_weights_follows_its_formula_and_starts_fast():
    network = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.BatchNorm1d(1))
    average = WeightAverage(network, 0.5)
    expected = network[0].weight.detach().clone().double()
    for step in range(1, 9):
        with torch.no_grad():
            network[0].weight.add_(0.1 * step)
        network[1].num_batches_tracked.fill_(step)
        average.update(network, step)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * network[0].weight.detach().double()
        assert torch.allclose(average.network[0].weight.double(), expected, atol=1e-6)
    assert average.network[1].num_batches_tracked == 8
    assert not any(parameter.requires_grad for parameter in average.network.parameters())


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.1"])
def test_an_average_that_cannot_be_is_refused(value, capsys):
    from visattn import fit

    with pytest.raises(UserError, match=r"model\.ema: must lie between 0 and 1"):
        fit.parse(resolve(["polyp_pranet"], ["--model.ema", value])[1]).build()


def test_half_precision_on_a_cpu_is_refused_before_anything_is_read(tmp_path, capsys):
    words = ["--trainer.precision", "16-mixed", "--trainer.accelerator", "cpu", "--run", str(tmp_path / "run")]
    assert main(["fit", "--config", "polyp_pranet", *words]) == 2
    assert "16-mixed needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # trains for an epoch
def test_memory_that_runs_out_in_training_ends_without_a_traceback(polyps, tmp_path, monkeypatch, capsys):
    def forward(self, images):
        if self.training and self.global_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return self.network(images)

    monkeypatch.setattr(SegmentationTask, "forward", forward)
    words = ["--data.root", str(polyps), "--run", str(tmp_path / "run"), "--model.network.backbone", "resnet10t"]
    words += ["--data.size", "32", "--data.batch_size", "2", "--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    assert main(["fit", "--config", "polyp_pranet", *words, "--trainer.precision", "32-true"]) == 2
    error = capsys.readouterr().err
    assert "Lower data.batch_size (2) or data.size (32), or set trainer.precision (32-true) to bf16-mixed" in error
    assert "Traceback" not in error
