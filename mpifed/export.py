"""`python -m mpifed export RUN [--out FILE]`: the final model of a run as safetensors."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mpifed.algorithms.base import Ensemble, Model
from mpifed.comm.inprocess import InProcess
from mpifed.errors import BadInput
from mpifed.federation.federation import Federation
from mpifed.job import load
from mpifed.storage.checkpoint import Checkpoints
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


def final_model(folder: RunFolder) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and a description, of a run's newest checkpoint: the evaluated model, or every client's own.

    Raises BadInput where the run has no checkpoint.
    """
    job = load(folder.job.read_text(encoding="utf-8"), ["device=cpu"], str(folder.job))
    comm = InProcess.alone()
    federation = Federation.build(job, comm)
    found = Checkpoints(folder.checkpoints, job.checkpoint.keep, comm, job.resume_sha256).newest()
    if found is None:
        raise BadInput(f"{folder.path} has no complete checkpoint to export")
    algorithm, env = federation.algorithm, federation.env
    about = {
        "algorithm": job.algorithm.name,
        "model": job.model.name,
        "round": str(found.round),
        "job_sha256": job.sha256,
    }
    tensors: dict[str, Tensor] = {}
    if algorithm.evaluates != "clients":
        predictor = algorithm.predictor(found.server(), env)
        if isinstance(predictor, Ensemble):
            for number, member in enumerate(predictor.members):
                tensors |= _prefixed(f"member_{number}", _named(env.model(), member))
        else:
            tensors |= _named(env.model(), predictor)
    if algorithm.evaluates == "server":
        return tensors, about
    for client in sorted(found.clients):
        parts = _named(env.model(client), algorithm.client_predictor(found.client(client)["state"], env, client))
        tensors |= _prefixed(f"client_{client}", parts)
    return tensors, about


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _named(model: Model, vectors: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return model.layout.views(vectors[0]) | model.buffer_layout.views(vectors[1])


def main(argv: Sequence[str]) -> int:
    """Export the model of the newest complete checkpoint; returns the exit code."""
    parser = argparse.ArgumentParser(prog="mpifed export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--out", metavar="FILE", type=Path, help="file to write (default: RUN/model.safetensors)")
    arguments = parser.parse_args(argv)
    folder = RunFolder.open(arguments.run)
    out = arguments.out or folder.path / "model.safetensors"

    tensors, metadata = final_model(folder)
    save_model(out, tensors, metadata)
    print(f"{out}: {len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} numbers")
    return 0
