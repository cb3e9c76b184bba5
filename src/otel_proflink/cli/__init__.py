# SPDX-License-Identifier: Apache-2.0
"""The ``proflink`` command: one module for each of its commands."""
