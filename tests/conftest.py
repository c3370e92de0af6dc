import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real labelled images named by VISATTN_REAL_DATA; the test is skipped without it."""
    folder = os.environ.get("VISATTN_REAL_DATA")
    if not folder:
        pytest.skip("VISATTN_REAL_DATA is not set")
    return Path(folder)
