import torch

from bn_lightning.norms import article


def test_training_by_hand():
    layer = article.BatchNorm(num_features=1, num_dims=2)
    y = layer(torch.tensor([[1.0], [3.0]]))  # mean 2, variance 1
    torch.testing.assert_close(y, torch.tensor([[-1.0], [1.0]]), atol=1e-4, rtol=0)
    # 0.9 of the old is kept; the variance is divided by m = 2, where torch's layer would take 2, divided by m - 1.
    torch.testing.assert_close(layer.moving_mean, torch.tensor([[0.9 * 0 + 0.1 * 2]]))
    torch.testing.assert_close(layer.moving_var, torch.tensor([[0.9 * 1 + 0.1 * 1]]))


def test_mode_follows_whether_gradients_are_recorded():
    layer = article.BatchNorm(num_features=1, num_dims=2)
    x = torch.tensor([[1.0], [3.0]])
    with torch.no_grad():
        torch.testing.assert_close(
            layer.train()(x), x, atol=1e-4, rtol=0
        )  # moving mean 0 and variance 1
    assert layer.moving_mean.item() == 0
    assert (
        layer.eval()(x).mean().abs() < 1e-6
    )  # eval() is not looked at: the batch's own mean is taken off


def test_is_torchs_layer_but_for_the_bias_of_the_variance():
    torch.manual_seed(0)
    ours, theirs = article.BatchNorm(5, num_dims=4), torch.nn.BatchNorm2d(5, momentum=0.1)
    for _ in range(3):
        x = torch.randn(8, 5, 6, 4) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.moving_mean.flatten(), theirs.running_mean)
    m = 8 * 6 * 4
    moved = theirs.running_var - 0.9**3  # less what is left of the first value
    torch.testing.assert_close(ours.moving_var.flatten(), 0.9**3 + moved * (m - 1) / m)


def test_moving_statistics_are_in_a_checkpoint():
    layer = article.BatchNorm(3, num_dims=4)
    layer(torch.randn(4, 3, 2, 2))
    restored = article.BatchNorm(3, num_dims=4)
    restored.load_state_dict(layer.state_dict())
    assert set(layer.state_dict()) == {"gamma", "beta", "moving_mean", "moving_var"}
    torch.testing.assert_close(restored.moving_mean, layer.moving_mean)
    torch.testing.assert_close(restored.moving_var, layer.moving_var)
