"""The networks against recorded outputs of EDM (``golden/edm_*.npz``) and against calculus."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD

from amedlib.denoisers.edm import build

GOLDEN = sorted((Path(__file__).parent / "golden").glob("edm_*.npz"))
DDPMPP = {
    "img_resolution": 8,
    "img_channels": 2,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
NCSNPP = DDPMPP | {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "decoder_type": "skip",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
SKIP = DDPMPP | {"encoder_type": "skip", "decoder_type": "skip", "label_dim": 3}
ADM = {
    "img_resolution": 8,
    "img_channels": 2,
    "label_dim": 3,
    "model_type": "DhariwalUNet",
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}


def recorded(path):
    data = np.load(path, allow_pickle=False)
    net = build(str(data["precond_class"]), json.loads(str(data["init_kwargs"]))).eval()
    state = {k[6:]: torch.from_numpy(data[k]) for k in data if k.startswith("state/")}
    net.load_state_dict(state, strict=True)
    return net, {k: torch.from_numpy(data[k]) for k in data if data[k].dtype == np.float32}, data


def worst(got, expected):
    """Largest relative error of a sample."""
    error = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return error.max().item()


def lively(precond, kwargs, seed=0):
    """A network whose zero-initialised layers are random too, so that every path counts."""
    torch.manual_seed(seed)
    net = build(precond, kwargs).eval().double()
    for p in net.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.2)
    return net.requires_grad_(False)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_recorded_outputs(path):
    net, arrays, data = recorded(path)
    labels = arrays.get("labels")
    sigma = arrays["sigma"]
    with torch.inference_mode():
        denoised, bottleneck = net(arrays["x"], sigma, labels, return_bottleneck=True)
        assert worst(denoised, arrays["D"]) < 2e-5
        assert worst(bottleneck, arrays["bottleneck"]) < 2e-5
        assert worst(bottleneck.mean(1), arrays["bottleneck_mean"]) < 2e-5
        assert bottleneck.shape[2:] == net.bottleneck_size
        assert worst(net.scalings(sigma)[3][:, None], arrays["c_noise"][:, None]) < 2e-5
        if labels is not None:
            assert worst(net(arrays["x"], sigma), arrays["D_nolabel"]) < 2e-5
        if "D_augment" in arrays:
            augmented = net(arrays["x"], sigma, augment_labels=arrays["augment_labels"])
            assert worst(augmented, arrays["D_augment"]) < 2e-5
            assert worst(augmented, arrays["D"]) > 1e-3  # the labels do matter
    assert [n for n, _ in net.named_buffers()] == json.loads(str(data["buffer_names"]))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_float64_is_float64_throughout(path):
    net, arrays, data = recorded(path)
    with torch.inference_mode():
        single = net(arrays["x"], arrays["sigma"], arrays.get("labels"))
        net.double()
        double = net(arrays["x"], arrays["sigma"], arrays.get("labels"))
        assert single.dtype == torch.float32 and double.dtype == torch.float64
        # the recorded difference of the two precisions has the same size as ours
        noise = data["f32_rel_noise"].max()
        assert worst(arrays["D"], double) == pytest.approx(noise, rel=0.05)


@pytest.mark.parametrize("kwargs", [DDPMPP, NCSNPP, SKIP, ADM])
def test_noise_level_as_number_tensor_or_per_sample(kwargs):
    net = lively("EDMPrecond", kwargs)
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=torch.manual_seed(1))
    expected = net(x, torch.full((3, 1, 1, 1), 0.7, dtype=torch.float64))
    for sigma in (0.7, torch.tensor(0.7, dtype=torch.float64)):
        torch.testing.assert_close(net(x, sigma), expected, rtol=1e-12, atol=1e-12)
    levels = torch.tensor([0.1, 0.7, 9.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    mixed = net(x, levels)
    torch.testing.assert_close(mixed[1], expected[1], rtol=1e-12, atol=1e-12)
    alone = torch.cat([net(x[i : i + 1], levels[i].item()) for i in range(3)])
    torch.testing.assert_close(mixed, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("precond", "kwargs"),
    [("EDMPrecond", DDPMPP), ("VEPrecond", NCSNPP), ("VPPrecond", SKIP), ("EDMPrecond", ADM)],
)
def test_forward_mode_equals_reverse_mode(precond, kwargs):
    net = lively(precond, kwargs)
    g = torch.manual_seed(2)
    x, dx, dy = torch.randn(3, 2, 2, 8, 8, dtype=torch.float64, generator=g)
    sigma = torch.tensor([0.3, 2.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    dsigma = torch.tensor([1.0, -0.5], dtype=torch.float64).reshape(-1, 1, 1, 1)
    with fwAD.dual_level():
        dual = net(fwAD.make_dual(x, dx), fwAD.make_dual(sigma, dsigma))
        forward = (fwAD.unpack_dual(dual).tangent * dy).sum()
    x, sigma = x.requires_grad_(), sigma.requires_grad_()
    gx, gsigma = torch.autograd.grad((net(x, sigma) * dy).sum(), (x, sigma))
    reverse = (gx * dx).sum() + (gsigma * dsigma).sum()
    assert forward.item() == pytest.approx(reverse.item(), rel=1e-10)


def test_operations_are_visible_to_a_function_mode():
    """A mode can replace the linear operations, as forward-mode training does."""
    seen = set()

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.add(func)
            return func(*args, **(kwargs or {}))

    with Record():
        lively("EDMPrecond", DDPMPP)(torch.zeros(1, 2, 8, 8), 1.0)
    functional = torch.nn.functional
    assert {functional.linear, functional.group_norm, functional.silu} <= seen
    assert functional.conv2d in seen


def test_labels_in_training_are_dropped_at_random():
    net = lively("EDMPrecond", ADM | {"label_dropout": 0.5, "dropout": 0.0})
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.manual_seed(3)).expand(
        32, -1, -1, -1
    )
    labels = torch.eye(3, dtype=torch.float64)[:1].expand(32, -1)
    labelled, unlabelled = net(x[:1], 1.0, labels[:1]), net(x[:1], 1.0)
    assert worst(labelled, unlabelled) > 1e-6
    torch.manual_seed(4)
    trained = net.train()(x, 1.0, labels)
    is_labelled = ((trained - labelled).flatten(1).norm(dim=1)) < 1e-9
    is_unlabelled = ((trained - unlabelled).flatten(1).norm(dim=1)) < 1e-9
    assert (is_labelled | is_unlabelled).all()
    assert 6 < is_labelled.sum() < 26
    torch.testing.assert_close(net.eval()(x, 1.0, labels)[:1], labelled, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kwargs", "name", "bound"),
    [
        # xavier_uniform: sqrt(6 / (fan_in + fan_out)), scaled by 1, 1e-5 and sqrt(0.2)
        (DDPMPP, "model.map_layer1.weight", math.sqrt(6 / 512)),
        (DDPMPP, "model.enc.8x8_block0.conv0.weight", math.sqrt(6 / (128 * 9))),
        (DDPMPP, "model.enc.8x8_block0.conv1.weight", 1e-5 * math.sqrt(6 / (128 * 9))),
        (DDPMPP, "model.enc.8x8_block0.conv0.bias", 0.0),
        (DDPMPP, "model.dec.8x8_aux_conv.weight", 1e-5 * math.sqrt(6 / (66 * 9))),
        (DDPMPP, "model.enc.4x4_block0.qkv.weight", math.sqrt(0.2 * 6 / (128 * 4))),
        # kaiming_uniform scaled by sqrt(1/3): 1 / sqrt(fan_in), biases too; some layers zero
        (ADM, "model.map_layer0.weight", math.sqrt(1 / 32)),
        (ADM, "model.map_layer0.bias", math.sqrt(1 / 32)),
        (ADM, "model.enc.8x8_block0.conv0.weight", math.sqrt(1 / (32 * 9))),
        (ADM, "model.enc.8x8_block0.conv1.weight", 0.0),
        (ADM, "model.enc.4x4_block0.proj.bias", 0.0),
        (ADM, "model.out_conv.weight", 0.0),
    ],
)
def test_initial_values(kwargs, name, bound):
    torch.manual_seed(0)
    kwargs = kwargs | {"model_channels": 64} if kwargs is DDPMPP else kwargs
    value = build("EDMPrecond", kwargs).get_parameter(name)
    assert value.abs().max().item() <= bound
    if bound:  # uniform: the largest of many reaches the bound, the deviation is bound / sqrt(3)
        assert value.abs().max().item() > 0.9 * bound
        assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_label_and_frequency_initialisation_is_normal():
    torch.manual_seed(0)
    labels = build("EDMPrecond", ADM | {"label_dim": 40}).model.map_label.weight
    # kaiming_normal scaled by sqrt(label_dim): standard deviation 1
    assert labels.std().item() == pytest.approx(1.0, rel=0.05)
    assert labels.abs().max().item() > 3
    freqs = build("EDMPrecond", NCSNPP | {"channel_mult_noise": 200}).model.map_noise.freqs
    assert freqs.std().item() == pytest.approx(16.0, rel=0.1)


@pytest.mark.parametrize(
    ("precond", "change", "message"),
    [
        ("Precond", {}, "precond_class must be one of 'EDMPrecond'"),
        ("EDMPrecond", {"model_type": "UNet"}, "model_type must be one of"),
        ("EDMPrecond", {"widths": 3}, "argument name for SongUNet must be one of"),
        ("EDMPrecond", {"embedding_type": "sine"}, "embedding_type must be one of"),
        ("EDMPrecond", {"encoder_type": "deep"}, "encoder_type must be one of"),
        ("EDMPrecond", {"decoder_type": "residual"}, "decoder_type must be one of"),
        ("EDMPrecond", {"img_resolution": 7}, "img_resolution must be a multiple of 2"),
        ("EDMPrecond", {"channel_mult": [1, 0]}, "channel_mult must be a list of positive"),
        ("EDMPrecond", {"model_channels": 10}, "channel count of a layer"),
        ("EDMPrecond", {"num_blocks": 0}, "num_blocks must be an integer >= 1"),
        ("EDMPrecond", {"img_channels": 0}, "img_channels must be an integer >= 1"),
        ("EDMPrecond", {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ("EDMPrecond", {"label_dropout": -0.1}, "label_dropout must be in"),
        ("EDMPrecond", {"sigma_data": 0}, "sigma_data must be positive"),
        ("VEPrecond", {"sigma_min": 200}, "sigma_min must be in"),
        ("VPPrecond", {"epsilon_t": 0}, "epsilon_t must be in"),
        ("VPPrecond", {"beta_d": -1}, "beta_d must be positive"),
    ],
)
def test_build_refuses(precond, change, message):
    with pytest.raises(ValueError, match=message):
        build(precond, DDPMPP | change)


def test_build_needs_the_image_size():
    with pytest.raises(ValueError, match="given with img_resolution"):
        build("EDMPrecond", {"img_channels": 1, "model_type": "SongUNet"})


def test_call_refuses():
    x = torch.zeros(3, 2, 8, 8)
    net = build("EDMPrecond", DDPMPP | {"label_dim": 5}).eval()
    with pytest.raises(ValueError, match="sigma must be one number or one per image"):
        net(x, torch.ones(2))
    with pytest.raises(ValueError, match=r"labels must be of shape \[3, 5\]"):
        net(x, 1.0, torch.zeros(3))
    with pytest.raises(ValueError, match="labels must be None"):
        build("EDMPrecond", DDPMPP).eval()(x, 1.0, torch.zeros(3, 5))
