# SPDX-License-Identifier: Apache-2.0
"""What otel-proflink costs: paired A/B measurements. See `docs/benchmarks.md`."""
