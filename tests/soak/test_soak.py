# SPDX-License-Identifier: Apache-2.0
"""The soak for a few seconds, or for as many as PROFLINK_SOAK_SECONDS says; see `__main__`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ground_truth import needs_sampler

SECONDS = float(os.environ.get("PROFLINK_SOAK_SECONDS", "10"))


@needs_sampler
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("engine", ["sweep", "cpu_timer"])
def test_nothing_goes_wrong(engine: str) -> None:
    command = [sys.executable, "-m", "tests.soak", "--seconds", str(SECONDS / 2)]
    done = subprocess.run(
        [*command, "--engine", engine],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    seen = json.loads(done.stdout)
    assert not seen["faults"], json.dumps(seen, indent=1)
    assert done.returncode == 0
    # A judge that saw nothing has found nothing wrong.
    assert min(seen["seen"][key] for key in ("labels", "lines", "pairs", "samples")) > 100, seen
