"""FD and FedDistill with every number worked out by hand.

`Prior` puts out its three parameters b as the logits of every sample: gradient of cross-entropy softmax(b) minus the
label's one-hot vector, and of half the squared distance b minus the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mpifed.algorithms.fd import FD
from mpifed.algorithms.feddistill import FedDistill
from mpifed.learning import label_outputs
from mpifed.learning.label_outputs import LabelOutputs, Teacher, divergence
from tests.toy import Prior, Simulation, ToyEnv, close

pytestmark = pytest.mark.golden
ZERO = [0.0, 0.0, 0.0]


# --- the server's tables ----------------------------------------------------------------------------------------------
OUTPUTS = torch.tensor(
    [
        [[0.8, 0.1, 0.1], ZERO, [0.2, 0.2, 0.6]],  # device 0 has no sample of label 1,
        [[0.6, 0.4, 0.0], [0.1, 0.9, 0.0], ZERO],  # devices 1 and 2 none of label 2
        [[0.4, 0.1, 0.5], [0.3, 0.5, 0.2], ZERO],
    ]
)
COUNTS = torch.tensor([[1, 0, 4], [3, 1, 0], [1, 5, 0]], dtype=torch.int32)


@dataclass
class Given:
    """Uploads written down."""

    clients: Sequence[int]
    fields: dict[str, Tensor]

    def each(self, field: str) -> list[Tensor]:
        return list(self.fields[field])


def teachers(algorithm: FD, devices: Sequence[int] = (0, 1, 2)) -> tuple[Tensor, Tensor]:
    """`teacher` `[4, 3, 3]` and `holders` `[4, 3]` that each of four devices has after the round of `devices`.

    By way of each device's own part of the sums where these are broadcast.
    """
    fields = {"outputs": OUTPUTS[list(devices)]} | ({"counts": COUNTS[list(devices)]} if algorithm.sends_counts else {})
    env: Any = ToyEnv(Prior(ZERO), clients=4)
    uploads: Any = Given(devices, fields)
    server = algorithm.ensemble(env, {}, uploads, 1)
    _, teach = algorithm.phases(env)
    rows = []
    for client in range(4):
        down = {
            name: value[client] if teach.down(1)[name].to == "each" else value
            for name, value in teach.download(server, 1).items()
        }
        state = {"model": torch.zeros(3), "buffers": torch.zeros(0)}
        if algorithm.broadcasts_sums and client in devices:
            state |= {name: values[devices.index(client)] for name, values in fields.items()}
        rows.append(teach.client(state, down, None)[0])  # type: ignore[arg-type]
    return tuple(torch.stack([row[name] for row in rows]) for name in ("teacher", "holders"))  # type: ignore[return-value]


@pytest.mark.parametrize("exchange", ["unicast", "broadcast"])
def test_a_device_is_taught_the_mean_of_the_other_holders(exchange: Any) -> None:
    """Label 0, held by all: device 0 gets ((0.6, 0.4, 0) + (0.4, 0.1, 0.5))/2, device 1 the mean of 0 and 2, and so on.

    Label 1: device 0 the mean of 1 and 2, device 1 what 2 has, and the reverse. Label 2: nobody else holds it, so
    nothing for device 0; the others get its row. Device 3 was absent: it would get the mean of all holders.
    """
    rows, holders = teachers(FD(exchange=exchange))
    assert holders.tolist() == [[2, 2, 0], [2, 1, 1], [2, 1, 1], [3, 2, 1]]
    close(rows[0, :2], [[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]])
    assert torch.equal(rows[0, 2], torch.zeros(3))
    close(rows[1], [[0.6, 0.1, 0.3], [0.3, 0.5, 0.2], [0.2, 0.2, 0.6]])
    close(rows[2], [[0.7, 0.25, 0.05], [0.1, 0.9, 0.0], [0.2, 0.2, 0.6]])
    close(rows[3], [[0.6, 0.2, 0.2], [0.2, 0.7, 0.1], [0.2, 0.2, 0.6]])


def test_the_paper_divides_by_all_others() -> None:
    """M - 1 = 2 whoever holds the label: rows that one other device holds are half of what they were, and a label that
    nobody else holds has a row of zeros. No counts crossed, so zeros are what tells it."""
    rows, holders = teachers(FD(variant="paper"))
    close(rows[0], [[0.5, 0.25, 0.25], [0.2, 0.7, 0.1], ZERO])
    close(rows[1], [[0.6, 0.1, 0.3], [0.15, 0.25, 0.1], [0.1, 0.1, 0.3]])
    assert holders[:3].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    with_counts, others = teachers(FD(variant="paper", counts=True))
    assert torch.equal(with_counts, rows) and others[:3].tolist() == [[2, 2, 2]] * 3


def test_weighting_by_count() -> None:
    """Device 0, label 0: (3 (0.6, 0.4, 0) + 1 (0.4, 0.1, 0.5))/4; label 1: (1 (0.1, 0.9, 0) + 5 (0.3, 0.5, 0.2))/6."""
    rows, holders = teachers(FD(weighting="count"))
    close(rows[0, :2], [[0.55, 0.325, 0.125], [1.6 / 6, 3.4 / 6, 1.0 / 6]])
    assert holders[0].tolist() == [4, 6, 0]


def test_the_global_mean_includes_oneself() -> None:
    """The same rows for all: label 0 the mean of three, label 1 that of its two holders, label 2 its only row."""
    rows, _ = teachers(FD(teacher="global_mean"))
    for device in range(4):
        close(rows[device], [[0.6, 0.2, 0.2], [0.2, 0.7, 0.1], [0.2, 0.2, 0.6]])
    rows, _ = teachers(FD(teacher="global_mean", denominator="m_minus_1"))
    close(rows[0, 1], [0.4 / 3, 1.4 / 3, 0.2 / 3])


@pytest.mark.parametrize(
    "switches", [{}, {"variant": "paper"}, {"weighting": "count"}, {"variant": "paper", "counts": True}]
)
def test_a_broadcast_of_the_sums_teaches_the_same_bits(switches: dict[str, Any]) -> None:
    for devices in ((0, 1, 2), (0, 2), (1,)):
        one = teachers(FD(**switches), devices)
        other = teachers(FD(exchange="broadcast", **switches), devices)
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1] > 0, other[1] > 0) or "counts" not in switches


def test_two_devices_teach_each_other_and_one_alone_is_not_taught() -> None:
    rows, _ = teachers(FD(), (1, 2))
    torch.testing.assert_close(rows[1], OUTPUTS[2])
    torch.testing.assert_close(rows[2], OUTPUTS[1])
    for variant in ("recommended", "paper"):
        rows, holders = teachers(FD(variant=variant), (1,))  # type: ignore[arg-type]
        assert not rows[1].any() and not holders[1].any()


# --- rounds -----------------------------------------------------------------------------------------------------------
def samples(*labels: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Clients with these labels; `Prior` looks at no input."""
    return [torch.zeros(len(mine), 1) for mine in labels], [torch.tensor(mine) for mine in labels]


def test_outputs_are_those_of_the_moving_model() -> None:
    """One sample of label 0, two steps of lr 0.3. b = 0 puts out 1/3 each; its gradient is (-2/3, 1/3, 1/3), so
    b = (0.2, -0.1, -0.1): e^0.2 = 1.2214028, e^-0.1 = 0.9048374, p = (0.4029599, 0.2985201, 0.2985201). The row is the
    mean of both, and not what the model puts out after its last step. Device 1, with label 1, is taught it."""
    simulation = Simulation(FD(), Prior(ZERO), *samples([0], [1]), lr=0.3, steps=2)
    simulation.run([0, 1])
    close(simulation.states[1]["teacher"][0], [0.3681466, 0.3159267, 0.3159267])
    assert simulation.states[1]["holders"].tolist() == [1, 0, 0]
    assert simulation.server == {}


def two_rounds() -> Simulation:
    simulation = Simulation(FD(weight=0.5), Prior(ZERO), *samples([0], [0, 1]), lr=0.3, batch_size=10)
    simulation.run([0, 1])
    return simulation


def test_the_first_round_is_training_alone() -> None:
    """Device 0: (0.2, -0.1, -0.1). Device 1: gradient 1/3 - (1/2, 1/2, 0), so b = (0.05, 0.05, -0.1)."""
    simulation = two_rounds()
    close(simulation.states[0]["model"], [0.2, -0.1, -0.1])
    close(simulation.states[1]["model"], [0.05, 0.05, -0.1])


def test_the_second_round_is_taught_label_by_label() -> None:
    """gamma = 0.5; both were taught row 0 = 1/3 each, and device 1 nothing about label 1, which it alone holds.

    Device 0: p = (0.4029599, 0.2985201, 0.2985201); gradient p - e_0 + 0.5 (p - 1/3) = (-0.5622268, 0.2811134, same),
    b = (0.2 + 0.1686680, -0.1 - 0.0843340, same).
    Device 1: e^0.05 = 1.0512711, p = (0.3495638, 0.3495638, 0.3008724); p - (1/2, 1/2, 0) = (-0.1504362, same,
    0.3008724). One sample of two has a teacher: 0.5 * 1/2 (p - 1/3) = (0.0040576, same, -0.0081152). Gradient
    (-0.1463786, same, 0.2927572), b = (0.05 + 0.0439136, same, -0.1 - 0.0878272).
    """
    simulation = two_rounds()
    simulation.run([0, 1])
    close(simulation.states[0]["model"], [0.3686680, -0.1843340, -0.1843340])
    close(simulation.states[1]["model"], [0.0939136, 0.0939136, -0.1878272])


def test_an_absent_device_keeps_its_last_teacher() -> None:
    simulation = Simulation(FD(), Prior(ZERO), *samples([0], [0, 1], [1]), lr=0.3, steps=1)
    simulation.run([0, 1])
    before, model = simulation.states[1]["teacher"], simulation.states[1]["model"]
    assert "teacher" not in simulation.states[2]
    simulation.run([0, 2])
    assert torch.equal(simulation.states[1]["teacher"], before) and torch.equal(simulation.states[1]["model"], model)
    assert simulation.states[0]["holders"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("denominator", "values"), [("m_minus_1", [0.5714286, 0.5714286, 0.4]), ("holders", [1.0, 1.0, 1.0])]
)
def test_fixed_points_with_missing_labels(
    denominator: Any, values: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half squared distances to label and teacher, of raw outputs; M = 3, lambda = 1.5; two devices hold label 0, one
    label 1. Where h of M hold a label, equal outputs f of its class rest at f (1 + lambda) = 1 + lambda t, t being the
    teacher's: (h - 1)/(M - 1) f to the letter, so f = 1/(1 + lambda - lambda (h - 1)/(M - 1)): 1/1.75 = 0.5714 for
    h = 2, 1/2.5 = 0.4 for h = 1. The mean of the other holders is f itself, so f = 1; without one there is no pull."""
    squared = label_outputs.F

    class Squared:
        """`torch.nn.functional` whose cross-entropy is half the squared distance to the one-hot label."""

        def __getattr__(self, name: str) -> Any:
            return getattr(squared, name)

        @staticmethod
        def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
            return (logits - functional.one_hot(labels, 3)).square().sum(dim=1).mean() / 2

    monkeypatch.setattr(label_outputs, "F", Squared())
    algorithm = FD(weight=1.5, average="logits", loss="mse", denominator=denominator)
    simulation = Simulation(algorithm, Prior(ZERO), *samples([0, 0], [0], [1]), lr=0.2, epochs=1)
    for _ in range(150):
        simulation.run([0, 1, 2])
    close(
        torch.stack([state["model"][label] for state, label in zip(simulation.states, (0, 0, 1), strict=True)]), values
    )


def test_including_oneself_is_a_smaller_weight() -> None:
    """f - mean of all M = (M - 1)/M (f - mean of the others): with squared distances, and oneself at one's current
    outputs, leave-one-out with lambda has the gradient of the global mean with lambda M/(M - 1). Three devices."""
    outputs = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    labels, known = torch.tensor([0]), torch.ones(3, dtype=torch.bool)

    def gradient(weight: float, teacher: Tensor) -> Tensor:
        mine = outputs[:1].clone().requires_grad_()
        distance = divergence(mine, labels, Teacher(teacher.expand(3, 3), known), "logits", "mse")
        return torch.autograd.grad(weight * distance, mine)[0]

    others, everybody = outputs[1:].mean(dim=0), outputs.mean(dim=0)
    torch.testing.assert_close(gradient(0.7, others), gradient(0.7 * 3 / 2, everybody))


@pytest.mark.parametrize("output", ["probs", "logits"])
def test_kl_has_the_gradient_of_ce_and_vanishes_at_the_teacher(output: Any) -> None:
    rows = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0], ZERO])
    rows = rows.softmax(dim=1) if output == "probs" else rows
    teacher = Teacher(rows, torch.tensor([True, True, False]))
    logits, labels = torch.tensor([[1.0, 0.5, 0.0], [0.0, 3.0, 1.0], [5.0, 0.0, 0.0]]).requires_grad_(), torch.arange(3)
    gradients = [
        torch.autograd.grad(divergence(logits, labels, teacher, output, kind), logits)[0] for kind in ("ce", "kl")
    ]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][2].any()  # label 2 has no teacher
    at_teacher = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0], ZERO])
    assert float(divergence(at_teacher, labels, teacher, output, "kl")) == pytest.approx(0, abs=1e-6)


def test_a_teachers_rounding_error_below_zero_is_no_nan() -> None:
    teacher = Teacher(torch.tensor([[1.0, -6e-8, 0.0]] * 3), torch.ones(3, dtype=torch.bool))
    assert torch.isfinite(divergence(torch.randn(3, 3), torch.arange(3), teacher, "probs", "kl"))


# --- FedDistill -------------------------------------------------------------------------------------------------------
START = [1.0, 0.0, -1.0]


def test_feddistill_official_dilutes() -> None:
    """One step from logits (1, 0, -1). Client 0, two samples of label 0, counts begin at one: 2 (1, 0, -1)/3. Client 1,
    one of label 1: (1, 0, -1)/2. The mean over both clients, whoever has the label: halves of these, and zeros."""
    simulation = Simulation(FedDistill(), Prior(START), *samples([0, 0], [1]), lr=0.3, batch_size=10)
    simulation.run([0, 1])
    close(simulation.server["logits"], [[1 / 3, 0, -1 / 3], [1 / 4, 0, -1 / 4], ZERO])


def test_feddistill_recommended_does_not() -> None:
    simulation = Simulation(
        FedDistill(variant="recommended"), Prior(START), *samples([0, 0], [1]), lr=0.3, batch_size=10
    )
    simulation.run([0, 1])
    close(simulation.server["logits"], [START, START, ZERO])
    assert simulation.server["holders"].tolist() == [1, 1, 0]


def test_feddistill_averages_over_all_rounds_or_the_last() -> None:
    """lr so small that nothing moves, first (1, 0, -1), then the model is replaced by (3, 0, 0): over both rounds
    (2 (1, 0, -1) + 2 (3, 0, 0))/(1 + 4); over the last one, from a count of 1, 2 (3, 0, 0)/3."""
    for memory, row in (("run", [8 / 5, 0, -2 / 5]), ("round", [2.0, 0.0, 0.0])):
        algorithm = FedDistill(memory=memory)  # type: ignore[arg-type]
        simulation = Simulation(algorithm, Prior(START), *samples([0, 0]), lr=1e-8, batch_size=10)
        simulation.run([0])
        simulation.states[0] = simulation.states[0] | {"model": torch.tensor([3.0, 0.0, 0.0])}
        simulation.run([0])
        close(simulation.server["logits"][0], row)


def test_feddistill_teaches_from_the_second_round_on() -> None:
    """One sample of label 0 and lr 0.3 from b = 0; the mean logits are 0, so the target is 1/3 each.

    Round 1: b = (0.2, -0.1, -0.1), p = (0.4029599, 0.2985201, 0.2985201). Round 2: gradient of CE + 1.0 KL is
    p - e_0 + (p - 1/3) = (-0.5274135, 0.2637068, same): b = (0.3582241, -0.1791120, same).
    """
    simulation = Simulation(FedDistill(), Prior(ZERO), *samples([0]), lr=0.3)
    simulation.run([0])
    close(simulation.states[0]["model"], [0.2, -0.1, -0.1])
    simulation.run([0])
    close(simulation.states[0]["model"], [0.3582241, -0.1791120, -0.1791120])


def test_sums_are_of_counts_and_not_of_batches() -> None:
    """Labels 0, 0, 1 in one batch and 0 in another: row 0 is the mean of three outputs, and keeps no graph of them."""
    seen = LabelOutputs.none_yet("logits", 3, torch.device("cpu"))
    seen.add(torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [0, 5.0, 0]], requires_grad=True), torch.tensor([0, 0, 1]))
    assert not seen.sums.requires_grad
    seen.add(torch.tensor([[6.0, 0, 3.0]]), torch.tensor([0]))
    close(seen.mean(), [[3.0, 0, 1.0], [0, 5.0, 0], ZERO])
    close(seen.mean(first_count=1), [[9 / 4, 0, 3 / 4], [0, 5 / 2, 0], ZERO])
