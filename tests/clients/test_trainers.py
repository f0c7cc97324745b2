"""Lightning and skorch."""

import copy

import lightning
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn

import mlpext

digits = load_digits()
x = torch.tensor(digits.data / 16, dtype=torch.float32)
y = torch.tensor(digits.target)


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), 1e-2)


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path, fused):
    model = Digits()
    twin = copy.deepcopy(model)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 64)
    for net in (mlpext.fuse(model, inplace=True), twin):
        torch.manual_seed(0)
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(net, data)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        assert (net.eval()(x).argmax(1) == y).float().mean() > 0.9
    assert type(model.net[0]) is mlpext.nn.LinearActivation
    torch.testing.assert_close(model(x), twin(x), rtol=1e-3, atol=1e-3)
    # A checkpoint of the native model into the fused one.
    model.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"])
    torch.testing.assert_close(model(x), twin(x))


def test_what_a_lightning_module_does_beside_forward():
    """Lightning's own methods call no layer; those of the model may."""

    class Direct(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(64, 10), nn.Tanh()

        def forward(self, x):
            return self.act(self.fc(x))

    class Features(Direct):
        def validation_step(self, batch, _):
            return self.fc(batch[0])

    assert type(mlpext.fuse(Direct()).fc) is mlpext.nn.LinearActivation
    net, report = mlpext.fuse(Features(), report=True)
    assert type(net.fc) is mlpext.nn.Linear
    assert (
        report[0].reason
        == "by mlpext.nn.Linear: Features.validation_step uses fc in a way that cannot be followed"
    )


def test_skorch(tmp_path):
    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    scores = []
    for make in (Net, lambda: mlpext.fuse(Net())):
        torch.manual_seed(0)
        net = NeuralNetClassifier(
            make, criterion=nn.CrossEntropyLoss, max_epochs=10, lr=0.1, verbose=0, train_split=None
        )
        net.fit(x.numpy(), np.array(digits.target))
        net.save_params(f_params=tmp_path / "params.pt")
        scores.append(net.score(x.numpy(), np.array(digits.target)))
    assert scores[0] > 0.9 and abs(scores[0] - scores[1]) < 0.01
    assert type(net.module_[0]) is mlpext.nn.LinearActivation
