"""HDF5 on a file system: can a file be written, and does a second process see that a first one has it open?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np


def versions() -> str:
    """Of h5py and of the HDF5 library that it uses."""
    return f"h5py {h5py.version.version}, HDF5 {h5py.version.hdf5_version}"


def opens_twice(path: Path) -> bool:
    """Write `path`, and whether another process may open it for writing meanwhile. Raises OSError where that fails."""
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(1000)
        file.flush()
        program = "import sys, h5py; h5py.File(sys.argv[1], 'r+').close()"
        second = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    return second.returncode == 0
