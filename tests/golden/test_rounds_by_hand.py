"""Rounds of the algorithms on models of three parameters, with every number worked out by hand.

Three losses are used (`tests.toy`): softmax regression without input, whose gradient at b = 0 is (1/3, 1/3, 1/3) minus
the frequencies of the labels; <g, w>, whose gradient is g everywhere; and a/2 (w - e)^2, whose gradient is a (w - e).
"""

from __future__ import annotations

import pytest
import torch

from mpifed.algorithms.fedavg import FedAvg
from mpifed.algorithms.feddyn import FedDyn
from mpifed.algorithms.fedprox import FedProx
from mpifed.algorithms.scaffold import Scaffold
from mpifed.learning.local import local_training
from tests.toy import Prior, Quadratic, Simulation, Slope, ToyEnv, close, context, output_is_loss, quadratic

pytestmark = pytest.mark.golden
ZERO = [0.0, 0.0, 0.0]


# --- FedAvg -----------------------------------------------------------------------------------------------------------
def unequal_clients(algorithm: FedAvg) -> Simulation:
    """Client 0 has one sample of label 0, client 1 three: labels 1, 1, 2."""
    labels = [torch.tensor([0]), torch.tensor([1, 1, 2])]
    samples = [torch.zeros(len(y), 1) for y in labels]
    return Simulation(algorithm, Prior(ZERO), samples, labels, lr=0.3, batch_size=10)


def test_fedavg_weighs_clients_by_their_samples() -> None:
    """One step of lr 0.3 from b = 0, all samples in one batch.

    Client 0: gradient (1/3 - 1, 1/3, 1/3), so y_0 = (0.2, -0.1, -0.1).
    Client 1: gradient (1/3, 1/3 - 2/3, 1/3 - 1/3), so y_1 = (-0.1, 0.1, 0).
    Mean with weights 1 and 3: ((0.2 - 0.3)/4, (-0.1 + 0.3)/4, -0.1/4) = (-0.025, 0.05, -0.025).
    """
    simulation = unequal_clients(FedAvg())
    simulation.run([0, 1])
    close(simulation.server["model"], [-0.025, 0.05, -0.025])


def test_fedavg_uniform_with_a_server_step() -> None:
    """The clients' models of the test above, averaged equally: (0.05, 0, -0.05); half a server step goes half way."""
    simulation = unequal_clients(FedAvg(weighting="uniform", server_lr=0.5))
    simulation.run([0, 1])
    close(simulation.server["model"], [0.025, 0.0, -0.025])


def test_fedavg_divides_by_the_samples_of_the_round() -> None:
    """With client 1 alone the server takes its model whole, (-0.1, 0.1, 0), not 3/4 of it as the print would."""
    simulation = unequal_clients(FedAvg())
    simulation.run([1])
    close(simulation.server["model"], [-0.1, 0.1, 0.0])


# --- FedProx ----------------------------------------------------------------------------------------------------------
def test_fedprox_pulls_towards_the_received_model() -> None:
    """a = (1, 2, 4), e = (1, 1, -1), x = 0, lr = 0.1, mu = 0.5, two steps.

    Step 1, where the proximal gradient mu (w - x) is still zero: w = 0.1 a e = (0.1, 0.2, -0.4).
    Step 2: gradients a (w - e) + 0.5 w = (-0.9 + 0.05, 2 * -0.8 + 0.1, 4 * 0.6 - 0.2) = (-0.85, -1.5, 2.2),
    so w = (0.1 + 0.085, 0.2 + 0.15, -0.4 - 0.22) = (0.185, 0.35, -0.62).
    """
    simulation = Simulation(FedProx(mu=0.5), Quadratic(ZERO), [quadratic([1, 2, 4], [1, 1, -1])], lr=0.1, steps=2)
    simulation.run([0])
    close(simulation.server["model"], [0.185, 0.35, -0.62])


def test_fedprox_gradient_comes_before_momentum() -> None:
    """The same client with momentum 0.5: v_1 = (-1, -2, 4), w_1 = (0.1, 0.2, -0.4), g_2 = (-0.85, -1.5, 2.2) as above;

    v_2 = 0.5 v_1 + g_2 = (-1.35, -2.5, 4.2), w_2 = w_1 - 0.1 v_2 = (0.235, 0.45, -0.82).
    """
    simulation = Simulation(
        FedProx(mu=0.5), Quadratic(ZERO), [quadratic([1, 2, 4], [1, 1, -1])], lr=0.1, steps=2, momentum=0.5
    )
    simulation.run([0])
    close(simulation.server["model"], [0.235, 0.45, -0.82])


def test_fedprox_pulls_towards_the_model_of_this_round() -> None:
    """Not towards zero, nor the first model. Gradient g = (10, -20, 0) everywhere, x = (1, 2, 3), lr 0.1, mu 0.5.

    Two steps: w = x - 0.1 g, then w = x - 0.1 g - 0.1 (g - 0.05 g) = x - 0.195 g; the next round begins there and does
    the same: x - 0.39 g.
    """
    g = torch.tensor([[10.0, -20.0, 0.0]])
    simulation = Simulation(FedProx(mu=0.5), Slope([1.0, 2.0, 3.0]), [g], lr=0.1, steps=2)
    simulation.run([0])
    close(simulation.server["model"], [-0.95, 5.9, 3.0])
    simulation.run([0])
    close(simulation.server["model"], [-2.9, 9.8, 3.0])


# --- SCAFFOLD ---------------------------------------------------------------------------------------------------------
G = torch.tensor([[[3.0, 0.0, 0.0]], [[0.0, 6.0, 0.0]], [[0.0, 3.0, 12.0]]])
"""The gradients of three clients, one sample each."""


def test_displacement_with_momentum() -> None:
    """K = 5, momentum 0.9, lr 0.1: velocities 1, 1.9, 2.71, 3.439, 4.0951, together 13.1441; displacement 1.31441.

    The closed form agrees: (5 - 0.9 (1 - 0.59049) / 0.1) / 0.1 = (5 - 3.68559) / 0.1 = 13.1441.
    """
    env = ToyEnv(Slope(ZERO), 1)
    ctx = context(env, G[0], steps=5, momentum=0.9, lr=0.1)
    ctx.model.load(torch.zeros(3))
    trained = local_training(ctx, loss=output_is_loss)
    assert trained.displacement == pytest.approx(1.31441, rel=1e-12)
    close(ctx.model.parameters.detach(), [-3 * 1.31441, 0, 0], 1e-5)


@pytest.mark.parametrize("option", ["I", "II"])
@pytest.mark.parametrize(("momentum", "displacement"), [(0.0, 0.5), (0.9, 1.31441)])
def test_scaffold_two_rounds_of_two_clients_in_three(
    option: str,
    momentum: float,
    displacement: float,
) -> None:
    """Constant gradients g_0 = (3, 0, 0), g_1 = (0, 6, 0), g_2 = (0, 3, 12); K = 5 steps of lr 0.1, D = displacement.

    Where the gradient does not move, both options give c_i = g_i: Option I by definition, Option II because
    y - x = -D (g_i - c_i + c), so c_i - c - (y - x)/D = g_i. With momentum that holds only if D accounts for it.

    Round 1, clients 0 and 1, all control variates zero: x = -D (g_0 + g_1)/2 = -D (1.5, 3, 0);
    c_0 = g_0, c_1 = g_1, c_2 = 0, c = (g_0 + g_1)/3 = (1, 2, 0): a third of the sum, though two clients answered.
    Round 2, clients 1 and 2: client 1 steps along g_1 - c_1 + c = (1, 2, 0), client 2 along g_2 - 0 + c = (1, 5, 12);
    their mean is (1, 3.5, 6), so x = -D (2.5, 6.5, 6); c_2 = g_2, c = (g_0 + g_1 + g_2)/3 = (1, 3, 4).
    """
    algorithm = Scaffold(option=option)  # type: ignore[arg-type]
    simulation = Simulation(algorithm, Slope(ZERO), list(G), lr=0.1, steps=5, momentum=momentum)
    simulation.run([0, 1])
    close(simulation.server["model"], [-1.5 * displacement, -3 * displacement, 0], 1e-5)
    close(simulation.server["control"], [1, 2, 0], 1e-5)
    close(simulation.states[0]["control"], [3, 0, 0], 1e-5)
    close(simulation.states[1]["control"], [0, 6, 0], 1e-5)
    close(simulation.states[2]["control"], ZERO)

    simulation.run([1, 2])
    close(simulation.server["model"], [-2.5 * displacement, -6.5 * displacement, -6 * displacement], 1e-4)
    close(simulation.server["control"], [1, 3, 4], 1e-5)
    close(simulation.states[1]["control"], [0, 6, 0], 1e-5)
    close(simulation.states[2]["control"], [0, 3, 12], 1e-5)


def test_scaffold_options_differ_where_the_gradient_moves() -> None:
    """a = (1, 2, 4), e = (1, 1, -1), x = 0, two steps of lr 0.1.

    Option I: the gradient at x, -a e = (-1, -2, 4).
    Option II: the mean of the two gradients on the way: step 1 (-1, -2, 4), w = (0.1, 0.2, -0.4), step 2
    (-0.9, -1.6, 2.4); mean (-0.95, -1.8, 3.2). The model is the same, w = (0.19, 0.36, -0.64), and so c = c_0 (N = 1).
    """
    for option, control in (("I", [-1.0, -2.0, 4.0]), ("II", [-0.95, -1.8, 3.2])):
        algorithm = Scaffold(option=option)  # type: ignore[arg-type]
        simulation = Simulation(algorithm, Quadratic(ZERO), [quadratic([1, 2, 4], [1, 1, -1])], lr=0.1, steps=2)
        simulation.run([0])
        close(simulation.server["model"], [0.19, 0.36, -0.64])
        close(simulation.states[0]["control"], control, 1e-5)
        close(simulation.server["control"], control, 1e-5)


def test_scaffold_uses_the_step_size_of_the_round() -> None:
    """lr 0.1, halved every round: K lr is 0.5 in round 1 and 0.25 in round 2, and c_i is g_i after both.

    With the first round's 0.5 in the second, c_0 would be c_0 - c + (g_0 - c_0 + c)/2 = 1.5 instead of 3.
    """
    simulation = Simulation(Scaffold(), Slope(ZERO), list(G), lr=0.1, steps=5, lr_schedule="exponential", lr_decay=0.5)
    simulation.run([0, 1, 2])
    simulation.run([0, 1, 2])
    for state, gradient in zip(simulation.states, G, strict=True):
        close(state["control"], gradient[0].tolist(), 1e-5)
    close(simulation.server["model"], [-0.75, -0.75 * 3, -0.75 * 4], 1e-5)  # both rounds along the mean (1, 3, 4)


def test_scaffold_divides_by_the_steps_that_each_client_took() -> None:
    """Two epochs in batches of one: client 0 with one sample makes 2 steps, client 1 with three makes 6, and c_i is g_i
    for both. With one number of steps for all, 2 say, client 1 would have 3 g_1."""
    samples = [G[0], G[1].repeat(3, 1)]
    simulation = Simulation(Scaffold(), Slope(ZERO), samples, lr=0.1, epochs=2, batch_size=1)
    simulation.run([0, 1])
    close(simulation.states[0]["control"], [3, 0, 0], 1e-5)
    close(simulation.states[1]["control"], [0, 6, 0], 1e-5)


# --- FedDyn -----------------------------------------------------------------------------------------------------------
def test_feddyn_three_rounds_of_one_client_in_two() -> None:
    """alpha = 0.1, one step of lr 0.5 a round, so that the quadratic term is zero where the gradient is taken.

    The second parameter of each client is the first one's mirror image, the third is flat: curvature 0.
    Client 0: a = 1, e = 2. Client 1: a = 2, e = -1. Written for the first parameter:
    Round 1, client 0 at x = 0: gradient -2, y = 1, lambda_0 = 1; mean of all lambda 1/2; x = 1 + 1/2 = 1.5.
    Round 2, client 1 at 1.5: gradient 2 * 2.5 = 5, y = -1, lambda_1 = -2.5; mean of lambda (1 - 2.5)/2 = -0.75;
        x = -1 - 0.75 = -1.75.
    Round 3, client 0 at -1.75: gradient -3.75 + 0.1 * lambda_0 = -3.65, y = -1.75 + 1.825 = 0.075,
        lambda_0 = 1 + 1.825 = 2.825; mean (2.825 - 2.5)/2 = 0.1625; x = 0.075 + 0.1625 = 0.2375.
    """
    clients = [quadratic([1, 1, 0], [2, -2, 0]), quadratic([2, 2, 0], [-1, 1, 0])]
    simulation = Simulation(FedDyn(alpha=0.1), Quadratic(ZERO), clients, lr=0.5, steps=1)
    for client, model, memory, active in ((0, 1.5, 0.5, 1.0), (1, -1.75, -0.75, -1.0), (0, 0.2375, 0.1625, 0.075)):
        simulation.run([client])
        close(simulation.server["model"], [model, -model, 0])
        close(simulation.server["memory"], [memory, -memory, 0])
        close(simulation.server["active"], [active, -active, 0])
        # The server's h = -alpha * memory is the mean of all g_k = -alpha * lambda_k.
        close(simulation.mean_of_clients("memory"), [memory, -memory, 0])
    close(simulation.states[0]["memory"], [2.825, -2.825, 0])
    close(simulation.states[1]["memory"], [-2.5, 2.5, 0])


def test_feddyn_regularises_with_the_square_of_the_distance() -> None:
    """Flat losses (a = 0) and a client whose memory is lambda = (2, -4, 0): its objective is alpha <lambda, w> +
    alpha/2 |w - x|^2, gradient alpha (w - x + lambda).

    alpha = 0.5, lr = 1, x = 0. Step 1: w = -0.5 lambda = (-1, 2, 0). Step 2: w - 0.5 (w + lambda) =
    (-1 - 0.5 * 1, 2 + 0.5 * 2, 0) = (-1.5, 3, 0). Without the square it would be a step of fixed length.
    """
    simulation = Simulation(FedDyn(alpha=0.5), Quadratic(ZERO), [quadratic(ZERO, ZERO)], lr=1.0, steps=2)
    simulation.states[0] = {"memory": torch.tensor([2.0, -4.0, 0.0])}
    simulation.run([0])
    close(simulation.server["active"], [-1.5, 3.0, 0.0])


def test_feddyn_adaptive_alpha() -> None:
    """alpha_k = alpha / (n_k over the mean): client 0 has one sample, client 1 three, mean 2; alpha = 0.3.

    alpha_0 = 0.3 / 0.5 = 0.6, alpha_1 = 0.3 / 1.5 = 0.2. Flat losses, memories (1, 1, 1), lr 1, one step from x = 0:
    y_k = -alpha_k (1, 1, 1), so the plain mean of the models is -(0.6 + 0.2)/2 = -0.4.
    """
    flat = quadratic(ZERO, ZERO)
    simulation = Simulation(
        FedDyn(alpha=0.3, adaptive=True), Quadratic(ZERO), [flat, flat.repeat(3, 1, 1)], lr=1.0, steps=1
    )
    simulation.states = [{"memory": torch.ones(3)}, {"memory": torch.ones(3)}]
    simulation.run([0, 1])
    close(simulation.server["active"], [-0.4, -0.4, -0.4])
