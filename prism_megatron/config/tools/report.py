"""The configuration of ``tools/report.py``."""

from __future__ import annotations

from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class ReportConfig:
    """Make a run's summary.json and report.html again from its files, or watch its table."""

    run: tyro.conf.Positional[str] = ""
    """the run's folder"""
    follow: bool = False
    """print the table, and every step as the run plays it, until it ends; nothing is written"""
