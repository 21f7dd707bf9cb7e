# SPDX-License-Identifier: MIT
"""Measurements, one file per topic: `python -m bench --help`, from the repository root."""
