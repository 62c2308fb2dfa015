"""What else the machine was doing, and how fast its clocks ran: read before and after a measurement."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

_GPU_COLUMNS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_throttle_reasons.active")


def machine_state() -> dict[str, Any]:
    """``load`` (processes that want to run, mean of a minute), ``cpu_mhz`` (mean of the cores), ``gpus``.

    What cannot be read is left out.
    """
    state: dict[str, Any] = {"load": round(os.getloadavg()[0], 2)}
    if clocks := _cpu_clocks():
        state["cpu_mhz"] = round(sum(clocks) / len(clocks))
    if gpus := _gpus():
        state["gpus"] = gpus
    return state


def _cpu_clocks() -> list[float]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]


def _gpus() -> list[dict[str, str]]:
    """Clocks, temperature, power and throttling of each NVIDIA GPU, as nvidia-smi prints them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = [program, f"--query-gpu={','.join(_GPU_COLUMNS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(_GPU_COLUMNS, row, strict=False)) for row in rows]
