"""The tutorial's layer: its results, and its three differences from PyTorch's layer."""

import torch

from bn_lightning.norms import article


def test_training_step_equals_a_calculation_by_hand():
    layer = article.BatchNorm(num_features=1, num_dims=2)
    y = layer(torch.tensor([[1.0], [3.0]]))  # mean 2, variance 1
    torch.testing.assert_close(y, torch.tensor([[-1.0], [1.0]]), atol=1e-4, rtol=0)
    # The weight of the old value is 0.9. The variance is 2 / m = 1. PyTorch uses 2 / (m - 1) = 2.
    torch.testing.assert_close(layer.moving_mean, torch.tensor([[0.9 * 0 + 0.1 * 2]]))
    torch.testing.assert_close(layer.moving_var, torch.tensor([[0.9 * 1 + 0.1 * 1]]))


def test_mode_follows_is_grad_enabled_and_not_module_training():
    layer = article.BatchNorm(num_features=1, num_dims=2)
    x = torch.tensor([[1.0], [3.0]])
    with torch.no_grad():
        y = layer.train()(x)
    # The moving mean is 0, and the moving variance is 1.
    torch.testing.assert_close(y, x, atol=1e-4, rtol=0)
    assert layer.moving_mean.item() == 0
    # eval() has no effect: the mean of the batch is subtracted.
    assert layer.eval()(x).mean().abs() < 1e-6


def test_differs_from_pytorchs_layer_only_in_the_bias_of_the_moving_variance():
    torch.manual_seed(0)
    ours, theirs = article.BatchNorm(5, num_dims=4), torch.nn.BatchNorm2d(5, momentum=0.1)
    for _ in range(3):
        x = torch.randn(8, 5, 6, 4) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.moving_mean.flatten(), theirs.running_mean)
    m = 8 * 6 * 4
    # After 3 steps, the initial value 1 has the weight 0.9**3.
    from_batches = theirs.running_var - 0.9**3
    expected = 0.9**3 + from_batches * (m - 1) / m
    torch.testing.assert_close(ours.moving_var.flatten(), expected)


def test_moving_statistics_are_saved_in_a_checkpoint():
    layer = article.BatchNorm(3, num_dims=4)
    layer(torch.randn(4, 3, 2, 2))
    restored = article.BatchNorm(3, num_dims=4)
    restored.load_state_dict(layer.state_dict())
    assert set(layer.state_dict()) == {"gamma", "beta", "moving_mean", "moving_var"}
    torch.testing.assert_close(restored.moving_mean, layer.moving_mean)
    torch.testing.assert_close(restored.moving_var, layer.moving_var)
