"""stable-baselines3 and torchrl."""

import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from torch import nn
from torchrl.modules import MLP

import mlpext


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", [mlpext.nn.Tanh, nn.Tanh], ids=["ours", "native"])
def test_ppo_on_cartpole(activation, tmp_path):
    agent = PPO("MlpPolicy", "CartPole-v1", seed=0, n_steps=512, policy_kwargs={"activation_fn": activation})
    _, report = mlpext.fuse(agent.policy, inplace=True, report=True)
    body = agent.policy.mlp_extractor
    pair = [mlpext.nn.LinearActivation, mlpext.fusion.FusedActivation]
    for net in (body.policy_net, body.value_net):
        assert [type(layer) for layer in net] == pair * 2, report
    agent.learn(10_000)
    mean, _ = evaluate_policy(agent, agent.get_env(), n_eval_episodes=10)
    assert mean > 100  # 22 untrained, 500 at most

    agent.save(tmp_path / "agent")
    native = PPO.load(tmp_path / "agent", custom_objects={"policy_kwargs": {"activation_fn": nn.Tanh}})
    observation = torch.randn(7, 4)
    actions = [each.policy.get_distribution(observation).distribution.logits for each in (agent, native)]
    torch.testing.assert_close(*actions)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ELU, mlpext.nn.SiLU])
def test_torchrl_mlp(activation, fused):
    model = MLP(4, 2, num_cells=[32, 32], activation_class=activation)
    net = fused(model, 2)
    x = torch.randn(8, 4)
    torch.testing.assert_close(net(x), model(x))


def test_tensordict_module(fused):
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule

    # The wrapper may call any method of its module by name, so that fuse() of the wrapper leaves it alone.
    model, keys = MLP(4, 2, num_cells=[32]), {"in_keys": ["observation"], "out_keys": ["action"]}
    data = TensorDict({"observation": torch.randn(8, 4)}, [8])
    expected = TensorDictModule(model, **keys)(data.clone())["action"]
    for net in (TensorDictModule(fused(model), **keys), mlpext.fuse(TensorDictModule(model, **keys))):
        torch.testing.assert_close(net(data.clone())["action"], expected)
