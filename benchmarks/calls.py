"""The same calls of torch and of mlpext, by the name of the activation, and the ways of calling them."""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import mlpext.functional as MF
from harness import Case

# Where torch.nn.functional has no function of that name, only a deprecated one, or one without defaults. What
# torch lacks stands as people write it; mlpext._C_in_torch's squareplus is right at every input, and slower.
EAGER: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(TF.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "sine": lambda x: torch.sin(30.0 * x),
    "squareplus": lambda x: (x + torch.sqrt(x * x + 4.0)) / 2,
    "relu_squared": lambda x: torch.square(TF.relu(x)),  # as transformers has it
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # as CLIP has it
    "threshold": partial(TF.threshold, threshold=0.0, value=0.0),
}
MLPEXT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(MF.gelu, approximate="tanh"),
    "sine": partial(MF.sine, omega=30.0),
    "threshold": partial(MF.threshold, threshold=0.0, value=0.0),
}


def eager(name: str) -> Callable[[Tensor], Tensor]:
    return EAGER.get(name) or getattr(TF, name)


def ours(name: str) -> Callable[[Tensor], Tensor]:
    return MLPEXT.get(name) or getattr(MF, name)


def module(namespace, name: str) -> nn.Module:
    if name == "gelu_tanh":
        return namespace.GELU(approximate="tanh")
    if name == "threshold":
        return namespace.Threshold(0.0, 0.0)
    return next(
        getattr(namespace, word)() for word in dir(namespace) if word.lower() == name.replace("_", "")
    )


def modes(
    name: str, calls: dict[str, Callable[..., Tensor]], *inputs: Tensor, backward: bool = True
) -> Iterator[Case]:
    """A case for each way of calling: nothing needs a gradient, something does, and with the backward too."""
    plain = [x.detach() for x in inputs]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    frozen = {peer: copy.deepcopy(call) for peer, call in calls.items()}
    for call in frozen.values():
        if isinstance(call, nn.Module):
            call.requires_grad_(False)
    yield Case(f"{name}, no grad", {peer: partial(call, *plain) for peer, call in frozen.items()}, target=1)
    yield Case(f"{name}, forward", {peer: partial(call, *leaves) for peer, call in calls.items()}, target=1)
    if backward:
        steps = {peer: with_backward(call, leaves) for peer, call in calls.items()}
        yield Case(f"{name}, forward + backward", steps, target=1)


def with_backward(call: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    parameters = list(call.parameters()) if isinstance(call, nn.Module) else []
    wanted = [*inputs, *parameters]
    cotangent = torch.randn_like(call(*inputs))
    return lambda: torch.autograd.grad(call(*inputs), wanted, cotangent)


def bytes_kept(call: Callable[[], Tensor], known: Iterable[Tensor], output: bool = False) -> int:
    """What autograd holds for backward, without what is `known` (inputs, parameters: alive anyway), and with
    the result itself where `output` says so, which the next layer holds."""
    alive = {t.untyped_storage().data_ptr() for t in known}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in alive:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = call()
    if output:
        note(y)
    return sum(kept.values())
