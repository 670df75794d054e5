"""Runs `tests/far/` in a process of its own, as it gives torch a device that is not there.

By hand: SPECA_FAR=1 python -m pytest tests/far
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch can be given no device"
)
def test_on_a_device_of_its_own() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/far"]
    done = subprocess.run(
        command, check=False, cwd=ROOT, env={**os.environ, "SPECA_FAR": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
