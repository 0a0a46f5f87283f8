"""A model's parameters as named views of one flat vector.

Sending a model is then sending one buffer, an optimiser's step is one operation on one tensor, and so is a correction
of the gradient (FedProx, SCAFFOLD, FedDyn).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mpifed.errors import BadInput
from mpifed.types import Layout


class FlatModel:
    """A module whose trainable parameters are views of `parameters`, and their gradients views of `gradient`.

    - `parameters`: leaf, float32 `[d]`, with `gradient` `[d]` as its `.grad`, so that an optimiser over
      `[model.parameters]` steps the whole model. `layout` names its parts in the order of `named_parameters()`;
      a tensor that several layers share is there once.
    - `buffers`: float32 `[b]`, named by `buffer_layout`: all that is part of the model and not trained, that is frozen
      parameters (`requires_grad=False` when wrapped; in `parameters`, weight decay would shrink them), then
      persistent floating-point buffers such as the running statistics of batch normalisation.
    - Integer and non-persistent buffers stay in the module and are never sent. Integers (batch normalisation counts its
      batches in one) begin anew with every `load`.

    One step is `zero_gradient()`, forward, `backward()`, optimiser. Not the optimiser's `zero_grad`, which would put
    the gradients of the step after outside of `gradient`; and not `backward(create_graph=True)`, for the same reason.
    Or, without the two passes over the vector that setting to zero and adding to it cost: `drop_gradient()`, forward,
    `backward()`, an optimiser over the parts that is given `gradients()`; and `gather_gradient()` before it where
    `gradient` is needed.
    A parameter that takes no part in the loss has a zero gradient here, not none: weight decay applies to it.

    The module is put on its device before it is wrapped. Raises `BadInput` if a parameter or floating-point buffer is
    not float32, or if nothing is trainable.
    """

    def __init__(self, module: nn.Module) -> None:
        named_parameters = dict(module.named_parameters())
        trained = {name: p for name, p in named_parameters.items() if p.requires_grad}
        persistent = module.state_dict().keys()
        fixed = {name: p for name, p in named_parameters.items() if not p.requires_grad} | {
            name: buffer
            for name, buffer in module.named_buffers()
            if name in persistent and (buffer.is_floating_point() or buffer.is_complex())
        }
        for name, tensor in (trained | fixed).items():
            if tensor.dtype != torch.float32:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise BadInput(f"model.name: '{name}' of {type(module).__name__} is {dtype}; make it float32.")
        if not trained:
            raise BadInput(f"model.name: {type(module).__name__} has no trainable parameter; choose another model.")

        self.module = module
        device = next(iter(trained.values())).device
        self.layout, vector = _flatten(trained, device)
        self.buffer_layout, self.buffers = _flatten(fixed, device)
        self.parameters: Tensor = nn.Parameter(vector)
        self.gradient = torch.zeros_like(vector)
        gradients = self.layout.views(self.gradient)
        self._gradients = [(trained[name], gradients[name]) for name in trained]
        # `.data` lets the module keep its own Parameter objects, and shared ones shared.
        for name, view in self.layout.views(vector).items():
            trained[name].data = view
        for name, view in self.buffer_layout.views(self.buffers).items():
            fixed[name].data = view
        self._counters = [(buffer, buffer.clone()) for buffer in module.buffers() if not buffer.is_floating_point()]
        self.zero_gradient()

    def load(self, parameters: Tensor, buffers: Tensor | None = None) -> None:
        """Copy `parameters` `[d]`, and `buffers` `[b]` if given, into the model; `ValueError` if a size is wrong.

        Not between a forward and its backward, which would then use the new values.
        """
        for what, given, own in (("parameters", parameters, self.parameters), ("buffers", buffers, self.buffers)):
            if given is not None and given.shape != own.shape:
                raise ValueError(f"{what} of shape {tuple(given.shape)} for a model with {tuple(own.shape)}")
        with torch.no_grad():
            self.parameters.copy_(parameters)
            if buffers is not None:
                self.buffers.copy_(buffers)
            for counter, initial in self._counters:  # or what one client counted would reach the next one on its rank
                counter.copy_(initial)

    def zero_gradient(self) -> None:
        """Set `gradient` to zero, and make every `.grad` a view of it again where something replaced it."""
        self.gradient.zero_()
        self.parameters.grad = self.gradient
        for parameter, view in self._gradients:
            if parameter.grad is not view:
                parameter.grad = view

    def drop_gradient(self) -> None:
        """Forget the gradients: the next `backward()` keeps them where it computes them, and `gradient` is stale."""
        for parameter, _ in self._gradients:
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients of all parameters, wherever they are, in the order and the shapes of `layout`."""
        return [view.zero_() if p.grad is None else p.grad for p, view in self._gradients]

    def gather_gradient(self) -> None:
        """Bring the gradients into `gradient`, of which every `.grad` is a view again."""
        for (parameter, view), gradient in zip(self._gradients, self.gradients(), strict=True):
            if gradient is not view:
                view.copy_(gradient)
            parameter.grad = view

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs `[batch, *input_shape]` on the model's device -> logits `[batch, classes]`."""
        return self.module(x)

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return self.module.training

    def train(self, mode: bool = True) -> None:
        """Training mode: batch normalisation uses, and updates its statistics by, the batch; dropout drops."""
        self.module.train(mode)

    def eval(self) -> None:
        """Evaluation mode."""
        self.module.eval()


def _flatten(tensors: Mapping[str, Tensor], device: torch.device) -> tuple[Layout, Tensor]:
    """Where each of the tensors is in one vector, and that vector, a copy of them."""
    layout = Layout(tuple(tensors), tuple(tuple(tensor.shape) for tensor in tensors.values()))
    vector = torch.empty(layout.size, device=device)
    for name, view in layout.views(vector).items():
        view.copy_(tensors[name].detach())
    return layout, vector
