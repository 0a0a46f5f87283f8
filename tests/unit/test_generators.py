"""Generators: sizes against published numbers, shapes, that labels and noise both matter, what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpifed.models import initialise
from mpifed.models.flat import FlatModel
from mpifed.models.generators import faug_discriminator, faug_generator, image_generator, latent_generator

NOISE, CLASSES, BATCH = 16, 10, 12
IMAGES = [(3, 32, 32), (1, 28, 28), (1, 8, 8), (3, 8, 12)]

Generator = Callable[[], nn.Module]
GENERATORS: list[tuple[Generator, tuple[int, ...]]] = [
    (lambda: latent_generator(NOISE, CLASSES, 24, 5), (5,)),
    (lambda: latent_generator(NOISE, CLASSES, 24, 5, embedding=True), (5,)),
    *[(lambda shape=shape: image_generator(NOISE, CLASSES, shape, channels=8), shape) for shape in IMAGES],  # type: ignore[misc]
    *[(lambda shape=shape: faug_generator(NOISE, CLASSES, shape), shape) for shape in IMAGES],  # type: ignore[misc]
]


def given(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, NOISE, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)


# --- published sizes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("noise", "classes", "hidden", "latent", "embedding", "parameters", "statistics"),
    [
        # MNIST: (32 + 10)*256 + 256 + 2*256 + 256*32 + 32; a mean and a variance for each hidden unit
        (32, 10, 256, 32, False, 19_744, 512),
        (64, 10, 256, 32, False, 27_936, 512),
        (32, 10, 128, 32, False, 9_888, 256),
        (32, 10, 64, 32, False, 4_960, 128),
        (16, 10, 64, 32, False, 3_936, 128),
        # EMNIST letters: (32 + 26)*256 + 256 + 2*256 + 256*32 + 32
        (32, 26, 256, 32, False, 23_840, 512),
        (64, 26, 256, 32, False, 32_032, 512),
        (32, 26, 128, 32, False, 11_936, 256),
        (16, 26, 128, 32, False, 9_888, 256),
        (32, 26, 64, 32, False, 5_984, 128),
        # CelebA: (32 + 2)*128 + 128 + 2*128 + 128*32 + 32
        (32, 2, 128, 32, False, 8_864, 256),
        # an embedding of 10*32 in place of the ten columns of the one-hot label
        (32, 10, 256, 32, True, 25_696, 512),
    ],
)
def test_sizes_of_the_latent_generator(
    noise: int, classes: int, hidden: int, latent: int, embedding: bool, parameters: int, statistics: int
) -> None:
    model = FlatModel(latent_generator(noise, classes, hidden, latent, embedding=embedding))
    assert (model.layout.size, model.buffer_layout.size) == (parameters, statistics)


@pytest.mark.parametrize(("noise", "classes", "parameters"), [(100, 10, 682_499), (256, 100, 1_690_115)])
def test_sizes_of_the_image_generator(noise: int, classes: int, parameters: int) -> None:
    """With s = 64*8*8: (noise + 1 + classes + 1)*s, norm 256, conv 128*128*9 + 128, norm 256, conv 128*64*9 + 64,
    norm 128, conv 64*3*9 + 3. Running statistics 2*(128 + 128 + 64 + 3), and one counter each: 650 elements."""
    module = image_generator(noise, classes, (3, 32, 32))
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    assert sum(buffer.numel() for buffer in module.buffers()) == 650


def test_faug_counts_what_the_paper_counts() -> None:
    """100*256 + 256 + 256*512 + 512 + 512*1024 + 1024 + 1024*784 + 784 and four numbers per normalised unit, trained or
    running: 1,486,352 + 4*1,792. The embedding of the label, 10*100, is not in the published number."""
    model = FlatModel(faug_generator(100, 10, (1, 28, 28)))
    assert model.layout.size + model.buffer_layout.size - 1_000 == 1_493_520


def test_size_of_the_discriminator() -> None:
    """Embedding 10*784, 784*512 + 512, twice 512*512 + 512, 512 + 1."""
    assert FlatModel(faug_discriminator(10, (1, 28, 28))).layout.size == 7_840 + 401_920 + 2 * 262_656 + 513


# --- what they do -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("generator", "shape"), GENERATORS)
def test_shape_dtype_and_seed(generator: Generator, shape: tuple[int, ...]) -> None:
    noise, labels = given()
    first, second, other = (initialise(generator, seed)(noise, labels) for seed in (1, 1, 2))
    assert first.shape == (BATCH, *shape) and first.dtype == torch.float32
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize(("generator", "shape"), GENERATORS)
def test_noise_and_label_both_matter(generator: Generator, shape: tuple[int, ...]) -> None:
    module = initialise(generator, 1).eval()
    noise, labels = given()
    sample = module(noise, labels)
    for changed in (module(noise + 1, labels), module(noise, (labels + 1) % CLASSES)):
        assert (changed - sample).flatten(1).abs().amax(dim=1).min() > 0


@pytest.mark.parametrize(("generator", "shape"), GENERATORS)
def test_every_parameter_has_a_gradient(generator: Generator, shape: tuple[int, ...]) -> None:
    module = initialise(generator, 1)
    samples = module(given()[0], torch.arange(BATCH) % CLASSES)
    weights = torch.randn(samples.shape, generator=torch.Generator().manual_seed(1))
    (samples * weights).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if parameter.ndim > 1:  # a bias right before a batch normalisation moves nothing
            assert parameter.grad.abs().max() > 0, name


def test_latent_generator_by_hand() -> None:
    """One unit each: noise 2 and label 1 of two give 3*2 + 5*0 + 7*1 = 13, normalised in evaluation mode by mean 1 and
    variance 4 to 6 (1 + eps is far below the tolerance), times 2 and plus 1. A label of 0 gives 11 -> 5 -> 11."""
    module = latent_generator(1, 2, 1, 1).eval()
    with torch.no_grad():
        module.get_parameter("linear1.weight").copy_(torch.tensor([[3.0, 5.0, 7.0]]))
        module.get_parameter("linear1.bias").zero_()
        module.get_buffer("norm1.running_mean").fill_(1.0)
        module.get_buffer("norm1.running_var").fill_(4.0)
        module.get_parameter("linear2.weight").fill_(2.0)
        module.get_parameter("linear2.bias").fill_(1.0)
        made = module(torch.full((2, 1), 2.0), torch.tensor([1, 0]))
    torch.testing.assert_close(made, torch.tensor([[13.0], [11.0]]), rtol=1e-5, atol=0)


def test_images_are_standardised() -> None:
    """The last batch normalisation has no weights: mean 0 and variance 1 in every channel of a training batch."""
    noise, labels = given()
    images = initialise(lambda: image_generator(NOISE, CLASSES, (3, 8, 8)), 1)(noise, labels)
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (images.var(dim=(0, 2, 3), unbiased=False) - 1).abs().max() < 1e-3


def test_faug_pixels_are_bounded() -> None:
    assert faug_generator(NOISE, CLASSES, (1, 28, 28))(*given()).abs().max() <= 1


@pytest.mark.parametrize("shape", [(1, 30, 28), (1, 28, 30), (28, 28)])
def test_images_in_multiples_of_four(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        image_generator(NOISE, CLASSES, shape)  # type: ignore[arg-type]


def test_discriminator_learns_which_label() -> None:
    """Real images are all -0.5 or all 0.5 by their label; it learns to refuse the same images with the other label."""
    module = initialise(lambda: faug_discriminator(2, (1, 4, 4)), 0)
    labels = torch.arange(64) % 2
    images = (labels.float() - 0.5).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    wrong = -images

    def answers() -> torch.Tensor:
        return torch.cat([module(images, labels), module(wrong, labels)])

    truth = torch.cat([torch.ones(64), torch.zeros(64)])
    parameters = list(module.parameters())
    module.eval()
    for _ in range(40):
        loss = functional.binary_cross_entropy_with_logits(answers(), truth)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= 1e-3 * gradient.sign()
    assert answers().shape == (128,)
    assert ((answers() > 0) == truth.bool()).all()
