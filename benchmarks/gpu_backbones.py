"""Times backbones on GPUs in bfloat16, eager and compiled, beside their official formulations and timm's networks.

    python benchmarks/gpu_backbones.py --output OUT                        # the networks below, on every GPU there is
    python benchmarks/gpu_backbones.py --output OUT va_nat_mini resnet50   # some of them
    python benchmarks/gpu_backbones.py --output OUT --device cpu --batch 2 --size 64 resnet18   # a rehearsal

Writes OUT/backbones.json and OUT/backbones.md, and prints the latter. Official formulations are those of
`backbone_cases/*.py`, with our weights; outputs are compared in float32 before anything is timed.

Every network has a process of its own, so that what one does wrong costs only its own row, where it is said. First all
of them build, compare and compile at the same time; then each measures, alone on its GPU. A network that is not
compiled after `--compile-seconds` starts again and measures without.

Images/s are medians of samples of several calls in a row between CUDA events, ours and the official formulation in
turn. A training step is loss, gradients and SGD. Memory is what the allocator hands out during a call at most, beside
weights. GFLOP are those that an image's forward pass executes in products and convolutions, a multiply-add as two.
"""

import argparse
import copy
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from attention import cases
from backbones import BESIDE, CASES, apart, operations, prepare
from torch import Tensor, nn

# The slowest to compile come first.
NETWORKS = (
    "va_agent_cswin_t",
    "va_maxvit_tiny_rw_256",
    "va_maxvit_tiny_tf_224",
    "va_nat_mini",
    "va_dinat_mini",
    "va_dinat_s_tiny",
    "va_halonet50ts",
    "va_agent_swin_t",
    "va_biformer_tiny",
    "va_medvit_tiny",
    "va_medvit_dina_tiny",
    "va_agent_deit_t",
    "va_agent_pvt_t",
    "va_pyramid_small",
    "va_partialnet_s",
    "va_mobilenetv2_ela_l",
    "va_resnet50_ela_l",
    *BESIDE,
)
CLOSE, LOOSE = 1e-3, 0.1  # outputs apart at most, as a share of the largest value: in float32, and compiled in bfloat16
PATIENCE = 120  # seconds that one network may measure
Call = Callable[[], object]
Record = dict[str, Any]


def saved(path: Path, record: Record) -> None:
    """Write `record` whole or not at all."""
    path.with_suffix(".part").write_text(json.dumps(record, indent=1))
    path.with_suffix(".part").replace(path)


def said(error: BaseException) -> str:
    """One line about an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:150]}"


class Calls:
    """Forward passes and training steps of networks on one batch.

    Args:
        device: Where.
        batch: Images.
        size: Their side in pixels.
    """

    def __init__(self, device: torch.device, batch: int, size: int) -> None:
        self.device = device
        self.x = torch.randn(batch, 3, size, size, device=device)
        self.labels = torch.arange(batch, device=device) % 10

    def forward(self, model: nn.Module, network: nn.Module) -> Call:
        """Calls of `model`, which is `network` or compiled from it, in evaluation."""

        def run() -> Tensor:
            network.eval()
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
                return model(self.x)

        return run

    def step(self, model: nn.Module, network: nn.Module) -> Call:
        """Training steps of `model`, which is `network` or compiled from it."""
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-6)

        def run() -> None:
            network.train()
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = nn.functional.cross_entropy(model(self.x), self.labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def both(self, model: nn.Module, network: nn.Module) -> dict[str, Call]:
        """Forward pass and training step."""
        return {"forward": self.forward(model, network), "step": self.step(model, network)}

    def sample(self, call: Call, times: int) -> float:
        """Seconds of one of `times` calls in a row."""
        if self.device.type == "cpu":
            start = time.perf_counter()
            for _ in range(times):
                call()
            return (time.perf_counter() - start) / times
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        for _ in range(times):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / times

    def seconds(self, calls: dict[str, Call], runs: int) -> dict[str, float]:
        """Medians of samples that last about a twentieth of a second, taken in turn."""
        times = {}
        for name, call in calls.items():
            self.sample(call, 3)
            times[name] = min(20, max(2, round(0.05 / self.sample(call, 1))))
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(runs):
            for name, call in calls.items():
                taken[name].append(self.sample(call, times[name]))
        return {name: statistics.median(values) for name, values in taken.items()}

    def memory(self, call: Call) -> float | None:
        """GiB that a call takes at most; None on the CPU, where it is not counted."""
        if self.device.type == "cpu":
            return None
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def free(self) -> None:
        """Give unused memory back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def first_calls(calls: Calls, ready: dict[str, Call]) -> None:
    """Compile; memory that others hold at the moment is waited for."""
    for call in ready.values():
        for patience in (10, 20, 40, 0):
            try:
                call()
                break
            except torch.OutOfMemoryError:
                calls.free()
                if not patience:
                    raise
                time.sleep(patience)
    calls.free()


def work(name: str, arguments: argparse.Namespace) -> Iterator[Record]:
    """What a network's process finds out, a record after each step; it measures once its standard input says so."""
    record: Record = {"name": name, "notes": []}
    options, official = next(
        ((case[1], case[2]) for case in cases([], CASES) if case[0] == name), ({"drop_path_rate": 0.0}, None)
    )
    device = torch.device(arguments.device)
    network = timm.create_model(name, **options)
    prepare(network)
    size = arguments.size or network.default_cfg["input_size"][-1]
    record |= {"size": size, "batch": arguments.batch}
    record["parameters"] = sum(each.numel() for each in network.parameters())
    networks = {"ours": network.to(device)}
    calls = Calls(device, arguments.batch, size)
    record["flop"] = operations(network.eval(), calls.x)
    if official is not None:
        try:
            theirs = official(copy.deepcopy(network).cpu()).to(device)
            with torch.no_grad():
                record["apart"] = apart(network.eval()(calls.x[:2]), theirs.eval()(calls.x[:2]))
            if record["apart"] < CLOSE:
                networks["official"] = theirs
            else:
                record["notes"].append(f"outputs differ by {record['apart']:.1e}: official not timed")
        except Exception as error:  # ours is timed all the same
            record["notes"].append(f"official: {said(error)}")
    yield record

    compiled: dict[str, nn.Module] = {}
    # The official one as an extra: it takes as long again.
    wanted = [] if arguments.eager else ["ours", "official"] if arguments.compile_official else ["ours"]
    for key in [key for key in wanted if key in networks]:
        start = time.perf_counter()
        try:
            # A rehearsal traces only: the CPU's compiler takes minutes and says nothing about the GPU's.
            backend = "inductor" if device.type == "cuda" else "aot_eager"
            compiled[key] = torch.compile(networks[key], backend=backend, dynamic=False)
            ready = calls.both(compiled[key], networks[key])
            first_calls(calls, ready)
            difference = apart(ready["forward"](), calls.forward(networks[key], networks[key])())
            record[f"{key} compiled apart"] = difference
            if not difference < LOOSE:
                record["notes"].append(f"{key} compiled: outputs differ by {difference:.1e}")
        except Exception as error:  # whatever the compiler raises belongs into the row
            compiled.pop(key, None)
            record["notes"].append(f"{key} not compiled: {said(error)}")
        record[f"{key} compile seconds"] = time.perf_counter() - start
    calls.free()
    record["ready"] = True
    yield record

    sys.stdin.readline()
    for suffix, models in (("", networks), (" compiled", compiled)):
        for kind in ("forward", "step"):
            ready = {f"{key}{suffix} {kind}": calls.both(model, networks[key])[kind] for key, model in models.items()}
            for key, taken in calls.seconds(ready, arguments.runs).items():
                record[key] = arguments.batch / taken
            for key, call in ready.items():
                record[f"{key} GiB"] = calls.memory(call)
            yield record


def worker(arguments: argparse.Namespace) -> None:
    """The process of one network."""
    (name,) = arguments.networks
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # for the comparison in float32
    path, record = arguments.output / f"{name}.json", {"name": name, "notes": []}
    try:
        for record in work(name, arguments):
            saved(path, record)
    except Exception as error:  # the row says what failed
        record["notes"].append(said(error))
        saved(path, record | {"failed": True})
        raise


class Process:
    """A network's process.

    Args:
        name: The network.
        gpu: Which one.
        arguments: Of the command line.
        eager: Whether it leaves compiling out.
    """

    def __init__(self, name: str, gpu: int, arguments: argparse.Namespace, eager: bool) -> None:
        self.name, self.gpu = name, gpu
        self.path: Path = arguments.output / f"{name}.json"
        self.path.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--worker", "--output", str(arguments.output), name]
        for key in ("device", "batch", "runs", "size"):
            value = getattr(arguments, key)
            command += [] if value is None else [f"--{key}", str(value)]
        command += ["--eager"] * eager + ["--compile-official"] * arguments.compile_official
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        if arguments.device == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible[0] else str(gpu)
        with (arguments.output / f"{name}.log").open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, env=environment
            )

    def record(self) -> Record:
        """What it has found out."""
        if not self.path.exists():
            return {"name": self.name, "notes": []}
        found: Record = json.loads(self.path.read_text())
        return found

    def waiting(self) -> bool:
        """Whether it may measure, or has ended."""
        return self.process.poll() is not None or bool(self.record().get("ready"))

    def end(self) -> None:
        """Stop it."""
        self.process.kill()
        self.process.wait()

    def measure(self) -> Record:
        """Let it measure, and wait for that."""
        notes = []
        if self.process.poll() is None:
            try:
                self.process.communicate("go\n", timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                self.end()
                notes.append(f"stopped after measuring for {PATIENCE} s")
        record = self.record()
        if self.process.returncode and not record.get("failed") and not notes:
            notes.append(f"ended with {self.process.returncode}, see {self.name}.log")
        record["notes"] += notes
        print(f"{self.name}: {'; '.join(record['notes']) or 'measured'}", file=sys.stderr, flush=True)
        return record


def prepared(names: list[str], gpus: int, arguments: argparse.Namespace) -> list[Process]:
    """Processes of all networks, ready to measure."""
    start, parallel = time.monotonic(), arguments.parallel or os.cpu_count() or 1
    left, running, ready = list(enumerate(names)), [], []
    while (left or running) and time.monotonic() - start < arguments.compile_seconds:
        while left and len(running) < parallel:
            number, name = left.pop(0)
            running.append(Process(name, number % gpus, arguments, arguments.eager))
        for process in [each for each in running if each.waiting()]:
            running.remove(process)
            ready.append(process)
            print(f"{process.name}: ready, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        time.sleep(0.5)
    late = [(process.name, process.gpu) for process in running] + [(name, number % gpus) for number, name in left]
    for process in running:
        process.end()
    again = [Process(name, gpu, arguments, True) for name, gpu in late]
    while not all(process.waiting() for process in again):
        time.sleep(0.5)
    return ready + again


def measured(processes: list[Process], late: str) -> list[Record]:
    """Let the processes of each GPU measure one after another."""
    gpus = sorted({process.gpu for process in processes})

    def each(gpu: int) -> list[Record]:
        return [process.measure() for process in processes if process.gpu == gpu]

    with ThreadPoolExecutor(len(gpus)) as pool:
        records = [record for found in pool.map(each, gpus) for record in found]
    for record in records:
        if late and "ours compile seconds" not in record and record.get("ready"):
            record["notes"].append(late)
    return records


def pair(record: Record, key: str, shape: str) -> str:
    """Forward pass and training step of one formulation, as a cell."""
    found = [record.get(f"{key} {kind}") for kind in ("forward", "step")]
    memory = [record.get(f"{key} {kind} GiB") for kind in ("forward", "step")]
    if found == [None, None]:
        return "-"
    cell = " \\| ".join("-" if value is None else format(value, shape) for value in found)
    if any(value is not None for value in memory):
        cell += "; " + " \\| ".join("-" if value is None else f"{value:.2f}" for value in memory)
    return cell


def ratios(record: Record, suffix: str) -> str:
    """Ours over the official formulation, forward pass and training step."""
    cells = []
    for kind in ("forward", "step"):
        ours, theirs = (record.get(f"{key}{suffix} {kind}") for key in ("ours", "official"))
        cells.append(f"{ours / theirs:.2f}x" if ours and theirs else "-")
    return "" if cells == ["-", "-"] else " \\| ".join(cells)


def table(records: list[Record], facts: list[str]) -> str:
    """The records as a table in Markdown."""
    official = any("official compiled forward" in record for record in records)
    head = ["network", "pixels", "M params", "GFLOP", "eager", "compiled", "official, eager", "ours / official, eager"]
    head += ["official, compiled", "ours / official, compiled"] if official else []
    lines = [", ".join(facts), ""]
    lines += ["Cells: images/s forward \\| training step; GiB likewise.", ""]
    lines += ["| " + " | ".join([*head, "notes"]) + " |", "|---" * (len(head) + 1) + "|"]
    for record in records:
        cells = [record["name"], str(record.get("size", "")), f"{record.get('parameters', 0) / 1e6:.1f}"]
        cells += [
            f"{record.get('flop', 0) / 1e9:.1f}",
            pair(record, "ours", ".0f"),
            pair(record, "ours compiled", ".0f"),
        ]
        cells += [pair(record, "official", ".0f"), ratios(record, "")]
        cells += [pair(record, "official compiled", ".0f"), ratios(record, " compiled")] if official else []
        notes = "; ".join(record["notes"]).replace("|", "/")
        lines.append("| " + " | ".join([*cells, notes]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="names in timm's registry; those of this file if none is given")
    parser.add_argument("--output", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, help="side of the images in pixels; default: what the network is made for")
    parser.add_argument("--runs", type=int, default=9, help="samples of a median")
    parser.add_argument("--compile-seconds", type=float, default=300)
    parser.add_argument("--parallel", type=int, help="networks compiled at the same time; default: as many as cores")
    parser.add_argument("--compile-official", action="store_true", help="compile the official formulations, too")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("a CUDA device is needed; --device cpu rehearses")
    arguments.output.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count() if arguments.device == "cuda" else 1
    names = arguments.networks or list(NETWORKS)
    start = time.monotonic()
    processes = prepared(names, gpus, arguments)
    records = measured(processes, "" if arguments.eager else f"not compiled in {arguments.compile_seconds:.0f} s")
    records.sort(key=lambda record: names.index(record["name"]))
    where = f"{gpus} x {torch.cuda.get_device_name()}" if arguments.device == "cuda" else "CPU, a rehearsal"
    facts = [str(datetime.date.today()), where, f"torch {torch.__version__}", f"timm {timm.__version__}"]
    facts += ["bfloat16 autocast", f"batch {arguments.batch}", f"{time.monotonic() - start:.0f} s in all"]
    text = table(records, facts)
    saved(arguments.output / "backbones.json", {"facts": facts, "networks": records})
    (arguments.output / "backbones.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
