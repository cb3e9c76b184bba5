# SPDX-License-Identifier: Apache-2.0
"""The Flask application with OpenTelemetry set up in its own code."""

from __future__ import annotations

from flask_app import app
from opentelemetry import trace
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.sdk.trace import TracerProvider

from otel_proflink import ProflinkInstrumentor

trace.set_tracer_provider(TracerProvider())
ProflinkInstrumentor().instrument()
FlaskInstrumentor().instrument_app(app)

__all__ = ["app"]
