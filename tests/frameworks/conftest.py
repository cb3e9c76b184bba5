# SPDX-License-Identifier: Apache-2.0
"""Real frameworks in real servers, with OpenTelemetry's own instrumentation of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ground_truth import SAMPLED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and not SAMPLED:
            item.add_marker(pytest.mark.skip(reason="this Python is linked, not sampled"))
