"""What every GPU benchmark records beside its figures, and how it shows them."""

import datetime
import json
import platform

import numpy as np


def about(ops):
    """Date, GPU, driver and versions."""
    cupy = ops.device.cupy
    return {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "gpu": ops.device.name,
            "driver": cupy.cuda.runtime.driverGetVersion(), "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
            "cupy": cupy.__version__, "numpy": np.__version__, "python": platform.python_version()}


def save(path, result):
    if path:
        with open(path, "w") as file:
            json.dump(result, file, indent=1)


def table(rows):
    """Rows of dicts as a Markdown table, numbers to four digits."""
    heads = list(rows[0]) if rows else []
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        lines.append("| " + " | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()) + " |")
    return "\n".join(lines)
