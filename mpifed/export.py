"""`python -m mpifed export RUN [--out FILE]`: the final model of a run as safetensors."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mpifed.errors import BadInput
from mpifed.storage.run_folder import RunFolder, replacing


def save_model(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors to a safetensors file, whole or not at all; an existing file is replaced.

    Args:
        tensors: any shapes and devices; views of one flat vector are written each on its own.
        metadata: strings for the file's header.

    Raises `BadInput` naming `--out` where the file cannot be written.
    """
    path = Path(path)
    separate = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    try:
        with replacing(path) as draft:
            save_file(separate, draft, metadata=dict(metadata))
    except (OSError, SafetensorError) as error:
        raise BadInput(f"--out: cannot write {path} ({error}); choose another file") from None


def main(argv: Sequence[str]) -> int:
    """Export the model of the newest complete checkpoint; returns the exit code."""
    parser = argparse.ArgumentParser(prog="mpifed export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--out", metavar="FILE", type=Path, help="file to write (default: RUN/model.safetensors)")
    arguments = parser.parse_args(argv)
    folder = RunFolder.open(arguments.run)
    out = arguments.out or folder.path / "model.safetensors"

    from mpifed.engine import final_model  # after the arguments are known to be good: this loads MPI

    tensors, metadata = final_model(folder)
    save_model(out, tensors, metadata)
    print(f"{out}: {len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} numbers")
    return 0
