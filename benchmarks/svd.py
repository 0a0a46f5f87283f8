"""The SVD codec beside truncation by `torch.linalg.svd`, over ResNet-18's layers, at equal rank and error.

usage:  python benchmarks/svd.py [--energy 0.95] [--rounds 3] [--steps 10] [--repetitions 5] [--optimizer sgd]
        python benchmarks/svd.py --ways [--energy 0.95] [--repetitions 5]

The matrices are updates of local training, because their spectra decide about ranks: ResNet-18 with the stem for small
images (11,173,962 parameters) on CIFAR-10, `steps` steps of SGD (learning rate 0.05) or Adam (0.001) with batches of 32
in each of `rounds` rounds; the update of the last round is what is compressed. Without CIFAR-10 under $MPIFED_DATA,
random images of ten classes take its place, and the output says so.

By hand: for each matrix `torch.linalg.svd(A, full_matrices=False)`, the smallest rank whose energy is above T, and its
factors (U_K, diag(sigma_K) V_K^T). The codec: `mpifed.codecs.lowrank.truncated` on all matrices of a shape together, as
the codec calls it. One thread; processor time, which other work on the machine disturbs least; medians of repetitions.
Required: the codec at least 5 times faster over all layers, ranks equal, and relative errors equal.

`--ways` compares instead, on matrices with singular values i^-decay, the three ways to find factors: the full
decomposition, the Gram matrix, and the range finder (`-` where it finds that an eighth of the ranks is too few).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mpifed.codecs.lowrank import RANGE_FINDER_SHARE, Factors, _by_gram, _by_range_finder, truncated
from mpifed.codecs.parts import parts
from mpifed.codecs.svd import Svd
from mpifed.data.source import Source
from mpifed.data.synthetic import Synthetic
from mpifed.data.vision import cifar10
from mpifed.errors import BadInput
from mpifed.models import build
from mpifed.models.flat import FlatModel
from mpifed.models.resnet import resnet18
from mpifed.types import DataSpec, Layout

REQUIRED = 5.0
"""Processor time by hand over that of the codec, all layers together."""


# --- updates ----------------------------------------------------------------------------------------------------------
def images() -> tuple[str, DataSpec, Tensor, Tensor]:
    """A name, and 4,096 training samples."""
    source: Source
    try:
        name, source = "CIFAR-10", cifar10()
    except BadInput:
        name, source = "random images", Synthetic(samples=4096, test_samples=10, input_shape=(3, 32, 32))
    x, y = source.take("train", torch.arange(4096).numpy())
    return name, source.spec, source.spec.standardise(x), y


def last_update(rounds: int, steps: int, optimizer: str) -> tuple[str, Tensor, Layout]:
    """What a client uploads in the last of these rounds."""
    name, spec, x, y = images()
    model = FlatModel(build(resnet18, {"stem": "cifar"}, spec, 0))
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(rounds):
        before = model.parameters.detach().clone()
        variables = list(model.module.parameters())
        made = torch.optim.SGD(variables, 0.05) if optimizer == "sgd" else torch.optim.Adam(variables, 0.001)
        for _ in range(steps):
            chosen = torch.randint(len(x), (32,), generator=generator)
            made.zero_grad()
            cross_entropy(model(x[chosen]), y[chosen]).backward()
            made.step()
    return name, model.parameters.detach() - before, model.layout


# --- two ways ---------------------------------------------------------------------------------------------------------
def by_hand(matrices: Tensor, energy: float) -> list[Factors | None]:
    """Full singular value decompositions, one matrix after another."""
    found: list[Factors | None] = []
    for matrix in matrices:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        energies = values.double().square().cumsum(0)
        rank = int((energies <= energy * energies[-1]).sum()) + 1
        worth = rank * sum(matrix.shape) < matrix.numel()
        found.append(Factors(left[:, :rank], values[:rank, None] * right[:rank]) if worth else None)
    return found


def timed(call: Callable[[], Any], repetitions: int) -> float:
    """Median of the processor time in milliseconds."""
    seconds = []
    for _ in range(repetitions):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return 1000 * statistics.median(seconds)


def error(matrices: Tensor, factors: list[Factors | None]) -> float:
    """The largest relative error of a matrix, in the Frobenius norm."""
    pairs = zip(matrices, factors, strict=True)
    return max(0.0 if f is None else float((f.left @ f.right - m).norm() / m.norm()) for m, f in pairs)


def ranks(factors: list[Factors | None]) -> str:
    """`85-140`, or `dense` where a matrix travels as it is."""
    known = sorted({factor.rank for factor in factors if factor is not None})
    words = ["dense"] * any(factor is None for factor in factors)
    return ", ".join([*(["-".join(map(str, dict.fromkeys([known[0], known[-1]])))] if known else []), *words])


def ways(energy: float, repetitions: int) -> None:
    """Print a line for each shape and spectrum."""
    print(f"singular values i^-decay, T = {energy}; CPU ms\n")
    print("| matrix | decay | rank | by range finder | torch.linalg.svd | Gram | range finder |")
    print("|---|---|---|---|---|---|---|")
    for rows, columns in ((512, 512), (512, 4608), (768, 768), (768, 3072), (1024, 4096)):
        generator = torch.Generator().manual_seed(0)
        left = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q
        for decay in (0.7, 1.0, 1.5):
            matrix = left * torch.arange(1.0, rows + 1) ** -decay @ right.T
            few = int(rows * RANGE_FINDER_SHARE)
            (exact,), found = _by_gram(matrix[None], energy, 1, rows), _by_range_finder(matrix, energy, 1, few)
            assert exact is not None
            times = [
                timed(lambda m=matrix: by_hand(m[None], energy), min(repetitions, 3)),
                timed(lambda m=matrix: _by_gram(m[None], energy, 1, len(m)), repetitions),
                timed(lambda m=matrix, few=few: _by_range_finder(m, energy, 1, few), repetitions),
            ]
            cells = [f"{rows} x {columns}", f"{decay}", f"{exact[0].shape[1]}"]
            cells += ["-" if found is None else f"{found[0].shape[1]}", *(f"{time:.1f}" for time in times)]
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--energy", type=float, default=0.95)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--optimizer", choices=["sgd", "adam"], default="sgd")
    parser.add_argument("--ways", action="store_true", help="compare ways to find factors instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.ways:
        ways(arguments.energy, arguments.repetitions)
        return 0
    name, update, layout = last_update(arguments.rounds, arguments.steps, arguments.optimizer)
    shapes: dict[tuple[int, int], list[Tensor]] = {}
    for part in parts((layout.size,), layout):
        if part.is_matrix:
            shapes.setdefault((part.rows, part.columns), []).append(part.of(update).view(part.rows, part.columns))

    print(f"{name}, {arguments.optimizer}, update of round {arguments.rounds}, T = {arguments.energy}; CPU ms\n")
    print("| matrix | how many | rank | error | torch.linalg.svd | codec | ratio |\n|---|---|---|---|---|---|---|")
    totals, equal = [0.0, 0.0], True
    for (rows, columns), group in sorted(shapes.items(), key=lambda item: -math.prod(item[0])):
        stack = torch.stack(group)
        reference, ours = by_hand(stack, arguments.energy), truncated(stack, arguments.energy)
        equal = equal and [f and f.rank for f in reference] == [f and f.rank for f in ours]
        equal = equal and abs(error(stack, reference) - error(stack, ours)) < 1e-4
        slow = timed(lambda stack=stack: by_hand(stack, arguments.energy), arguments.repetitions)
        fast = timed(lambda group=group: truncated(torch.stack(group), arguments.energy), arguments.repetitions)
        totals = [totals[0] + slow, totals[1] + fast]
        cells = [f"{rows} x {columns}", str(len(group)), ranks(ours), f"{error(stack, ours):.4f}"]
        cells += [f"{slow:.1f}", f"{fast:.1f}", f"{slow / fast:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    ratio = totals[0] / totals[1]
    print(f"| all | {sum(map(len, shapes.values()))} | | | {totals[0]:.1f} | {totals[1]:.1f} | **{ratio:.1f}** |")

    codec = Svd(arguments.energy)
    data, _ = codec.encode(update, layout, {}, 1.0)
    encode = timed(lambda: codec.encode(update, layout, {}, 1.0), arguments.repetitions)
    decode = timed(lambda: codec.decode(data, (layout.size,), update.dtype, layout), arguments.repetitions)
    print(f"\ncodec, all of it: encode {encode:.1f} ms, decode {decode:.1f} ms; {len(data) / (4 * layout.size):.1%} of")
    print(f"{4 * layout.size:,} bytes; equal ranks and errors: {'yes' if equal else 'NO'}")
    fine = equal and ratio >= REQUIRED
    print(f"required: {REQUIRED:g} times faster at equal ranks and errors: {'met' if fine else 'NOT MET'}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
