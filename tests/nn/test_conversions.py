"""Networks and layers of other classes, both ways."""

import pytest
import torch
from torch.nn import Dropout, Flatten, Identity, Linear, Sequential, Tanh

import mlpext
from mlpext.nn import MLP, GatedLinear, Maxout


def layers(*hidden, bias=True, last=()):
    sizes = [5, *[7] * len(hidden), 3]
    modules = []
    for i, activation in enumerate(hidden):
        modules += [Linear(sizes[i], sizes[i + 1], bias), *activation]
    return Sequential(*modules, Linear(sizes[-2], sizes[-1], bias), *last)


SEQUENTIALS = {
    "tanh": lambda: layers([Tanh()], [Tanh()]),
    "every kind": lambda: layers(
        [torch.nn.ELU(0.5)], [torch.nn.GELU("tanh")], [mlpext.nn.Sine(3.0)], [], last=[torch.nn.Softplus(2)]
    ),
    "no bias": lambda: layers([torch.nn.LeakyReLU(0.1, inplace=True)], bias=False),
    "one layer": lambda: layers(),
    "dropout": lambda: layers([Tanh(), Dropout(0.3)], [torch.nn.ReLU(), Dropout(0.3)]),
    "double": lambda: layers([Tanh()]).double(),
    "identity": lambda: layers([Tanh(), Identity()]),
    "maxout": lambda: Sequential(Maxout(5, 4, 3), Linear(4, 3), Tanh()),
    "gated": lambda: Sequential(GatedLinear(5, 4, "elu", alpha=0.5), Linear(4, 3), Tanh()),
}


@pytest.mark.parametrize("name", SEQUENTIALS)
def test_from_sequential_and_back(name):
    torch.manual_seed(0)
    theirs = SEQUENTIALS[name]()
    ours = MLP.from_sequential(theirs)
    back = ours.to_sequential()
    x = torch.randn(11, 5, dtype=next(theirs.parameters()).dtype)
    for network in (theirs, ours, back):
        network.eval()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(back(x), theirs(x))
    assert isinstance(ours, MLP) and ours.dropout == (0.3 if name == "dropout" else 0)
    keys = [f"{i}.{kind}" for i in range(len(ours)) for kind in ("weight", "bias")]
    assert [*ours.state_dict()] == [key for key in keys if name != "no bias" or key.endswith("weight")]
    for a, b in zip(theirs.parameters(), back.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    modules = [module for module in theirs if not isinstance(module, Identity)]
    assert [repr(module) for module in back] == [repr(m).replace(", inplace=True", "") for m in modules]


@pytest.mark.native
def test_an_mlp_that_comes_of_layers_trains_natively():
    torch.manual_seed(0)
    network = MLP.from_sequential(layers([Tanh()]))
    x, d = torch.randn(64, 5), torch.randn(64, 3)
    history = mlpext.training.fit(network, x, d, epochs=5, lr=0.05, engine="native", progress=False)
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize(
    "modules, message",
    [
        ([], "there is no Linear layer"),
        ([Flatten(), Linear(4, 2)], r"layers\[0\]: Flatten.*give the network flat inputs"),
        ([Tanh(), Linear(4, 2)], r"layers\[0\]: Tanh\(\) has no place"),
        ([Linear(4, 4), Tanh(), Tanh(), Linear(4, 2)], r"layers\[2\]: Tanh\(\) has no place"),
        ([Linear(4, 4), torch.nn.BatchNorm1d(4), Linear(4, 2)], r"layers\[1\]: BatchNorm1d.* has no place"),
        ([Linear(4, 4), Dropout(0.1), Linear(4, 4), Linear(4, 2)], r"dropout of \[0.1\], expected the same"),
        ([Linear(4, 4), Dropout(0.1), Linear(4, 4), Dropout(0.2), Linear(4, 2)], r"dropout of \[0.1, 0.2\]"),
    ],
)
def test_what_is_no_mlp(modules, message):
    with pytest.raises(ValueError, match=message):
        MLP.from_sequential(Sequential(*modules))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_maxout_of_chainer_and_of_keras(bias):
    x = torch.randn(9, 5)
    weight, b = torch.randn(4, 3, 5), torch.randn(4, 3) if bias else None  # 4 outputs, 3 pieces, 5 inputs
    z = torch.einsum("opi,ni->nop", weight, x) + (0 if b is None else b)
    chainer = Maxout.from_interleaved(weight, b)
    keras = Maxout.from_interleaved(
        weight.permute(1, 2, 0), None if b is None else b.t(), axes="pieces in out"
    )
    for layer in (chainer, keras):
        torch.testing.assert_close(layer(x), z.amax(-1))
        assert layer.weight.is_contiguous() and layer.weight.data_ptr() != weight.data_ptr()


def test_axes_that_do_not_fit():
    weight = torch.randn(4, 3, 5)
    with pytest.raises(ValueError, match="axes: 'out pieces', expected"):
        Maxout.from_interleaved(weight, axes="out pieces")
    for wrong in ((weight, torch.randn(3, 4)), (weight[0], None)):
        with pytest.raises(ValueError, match="do not have the axes 'out pieces in'"):
            Maxout.from_interleaved(*wrong)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_torch_jit_script_names_what_it_takes():
    for ours in (MLP([5, 7, 3]), Sequential(Maxout(5, 4)), mlpext.nn.GatedMLP(5, 7)):
        with pytest.raises(RuntimeError, match="script what MLP.to_sequential or .* torch.jit.trace"):
            torch.jit.script(ours)
    network, x = MLP([5, 7, 3], "tanh"), torch.randn(2, 5)
    torch.testing.assert_close(torch.jit.script(network.to_sequential())(x), network(x))
