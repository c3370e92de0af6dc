import subprocess
import sys

from visattn.memory import free_bytes, peak_bytes

PARENT = """
import subprocess, sys
held = bytearray(400 << 20)
held[::4096] = b"x" * len(held[::4096])
subprocess.run([sys.executable, "-c", "from visattn.memory import peak_bytes; print(peak_bytes())"], check=True)
"""


def test_memory_of_the_parent_is_not_counted():
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(done.stdout) < 200 << 20


def test_what_is_taken_raises_the_peak():
    before = peak_bytes()
    held = bytearray(before + (64 << 20))
    held[::4096] = b"x" * len(held[::4096])
    assert peak_bytes() - before > 48 << 20
    assert free_bytes() > 1 << 20
