"""OpenAI's networks against a second reading of their architecture, guidance against mathematics.

The reading below has OpenAI's parameter names and computes in float64; its parameters are random,
those that training starts from zero included.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import nn

from amedlib import make_latents, make_schedule, make_solver, sample
from amedlib.denoisers.adm import (
    SIGMAS,
    GuidedDenoiser,
    adm_classifier,
    adm_denoiser,
    cm_denoiser,
    sigma_range,
    timestep,
)
from amedlib.denoisers.edm import VPPrecond, build
from amedlib.denoisers.exact import GaussianDenoiser, GaussianMixtureDenoiser
from amedlib.training import Trainer, Training

# --- the second reading -------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, cin, cout, emb, scale_shift, resample=None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        conv = nn.Conv2d(cin, cout, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(32, cin), nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, cout * (1 + scale_shift)))
        conv = nn.Conv2d(cout, cout, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, cout), nn.SiLU(), nn.Dropout(0.1), conv)
        self.skip_connection = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def resampled(self, x):
        if self.resample == "up":
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if self.resample == "down":
            x = (x[:, :, ::2] + x[:, :, 1::2]) / 2
            return (x[..., ::2] + x[..., 1::2]) / 2
        return x

    def forward(self, x, emb):
        norm, act, conv = self.in_layers
        h = conv(self.resampled(act(norm(x))))
        from_emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = from_emb.tensor_split(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + from_emb)
        return self.skip_connection(self.resampled(x)) + h


def attend(qkv, heads, order):
    """Multi-head attention on [B, 3 C, N]: "heads" splits heads before q, k, v, "qkv" after."""
    c, out = qkv.shape[1] // (3 * heads), []
    for h in range(heads):
        if order == "heads":
            q, k, v = qkv[:, 3 * c * h : 3 * c * (h + 1)].split(c, 1)
        else:
            q, k, v = (part[:, c * h : c * (h + 1)] for part in qkv.chunk(3, 1))
        weights = (q.transpose(1, 2) @ k / math.sqrt(c)).softmax(-1)
        out.append(torch.einsum("bts,bcs->bct", weights, v))
    return torch.cat(out, 1)


class Attention(nn.Module):
    def __init__(self, channels, order, dims):
        super().__init__()
        self.heads, self.order = channels // 64, order
        conv = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
        self.norm = nn.GroupNorm(32, channels)
        self.qkv, self.proj_out = conv(channels, 3 * channels, 1), conv(channels, channels, 1)

    def forward(self, x, emb):
        h = self.norm(x)
        one_dimensional = self.qkv.weight.ndim == 3
        qkv = self.qkv(h.flatten(2) if one_dimensional else h).flatten(2)
        h = attend(qkv, self.heads, self.order)
        h = self.proj_out(h if one_dimensional else h.reshape(x.shape))
        return x + h.reshape(x.shape)


class Pool(nn.Module):
    def __init__(self, size, channels, outputs):
        super().__init__()
        self.heads = channels // 64
        self.positional_embedding = nn.Parameter(torch.empty(channels, size * size + 1))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, outputs, 1)

    def forward(self, x):
        x = x.flatten(2)
        x = torch.cat([x.mean(2)[..., None], x], 2) + self.positional_embedding[None]
        return self.c_proj(attend(self.qkv_proj(x), self.heads, "qkv"))[:, :, 0]


class Reference(nn.Module):
    """UNetModel or, with ``pools``, EncoderUNetModel; attention at the listed resolutions."""

    def __init__(
        self, size, channels, out, mult, blocks, attention, classes, scale_shift, order, dims, pools
    ):
        super().__init__()
        self.channels, emb = channels, 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Embedding(classes, emb) if classes else None

        def residual(cin, cout, resample=None):
            return Residual(cin, cout, emb, scale_shift, resample)

        ch, res = channels * mult[0], size
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, ch, 3, padding=1)])])
        kept = [ch]
        for level, m in enumerate(mult):
            for _ in range(blocks):
                layers = [residual(ch, m * channels)]
                ch = m * channels
                if res in attention:
                    layers.append(Attention(ch, order, dims))
                self.input_blocks.append(nn.ModuleList(layers))
                kept.append(ch)
            if level + 1 < len(mult):
                self.input_blocks.append(nn.ModuleList([residual(ch, ch, "down")]))
                kept.append(ch)
                res //= 2
        self.middle_block = nn.ModuleList(
            [residual(ch, ch), Attention(ch, order, dims), residual(ch, ch)]
        )
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))) if not pools else ():
            for i in range(blocks + 1):
                layers = [residual(ch + kept.pop(), m * channels)]
                ch = m * channels
                if res in attention:
                    layers.append(Attention(ch, order, dims))
                if level and i == blocks:
                    layers.append(residual(ch, ch, "up"))
                    res *= 2
                self.output_blocks.append(nn.ModuleList(layers))
        last = Pool(res, ch, out) if pools else nn.Conv2d(ch, out, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(), last)

    def forward(self, x, t, classes=None):
        """Returns the output and that of the middle block; t [B], classes [B]."""
        half = self.channels // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=x.dtype) / half)
        phase = t[:, None] * frequencies
        emb = self.time_embed(torch.cat([phase.cos(), phase.sin()], 1))
        if self.label_emb is not None:
            emb = emb + self.label_emb(classes)
        kept = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, emb)
            kept.append(x)
        for layer in self.middle_block:
            x = layer(x, emb)
        middle = x
        for block in self.output_blocks:
            x = torch.cat([x, kept.pop()], 1)
            for layer in block:
                x = layer(x, emb)
        return self.out(x), middle


# A tall small network: channel counts change both ways, attention with 4 and with 2 heads.
SMALL = {
    "img_resolution": 16,
    "model_channels": 128,
    "channel_mult": (1, 2, 1),
    "num_blocks": 1,
    "attn_resolutions": (8,),
}
TINY = SMALL | {"img_resolution": 8, "channel_mult": (1, 1), "attn_resolutions": (4,)}


def reference(
    shape=SMALL, out=3, classes=0, scale_shift=True, order="heads", dims=1, pools=False, seed=0
):
    """A network of the second reading with random parameters, and its state dict in float32."""
    size, *rest = shape.values()
    net = Reference(size, rest[0], out, *rest[1:], classes, scale_shift, order, dims, pools)
    generator = torch.manual_seed(seed)
    for p in net.parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 4
        p.data = torch.randn(p.shape, generator=generator) / math.sqrt(fan_in)
    state = {name: p.detach().clone() for name, p in net.named_parameters()}
    return net.double().eval().requires_grad_(False), state


def noisy(size=16, batch=2, seed=1):
    """Images, noise levels, classes and one-hot labels."""
    generator = torch.manual_seed(seed)
    x = torch.randn(batch, 3, size, size, dtype=torch.float64, generator=generator)
    sigma = torch.tensor([0.3, 7.0], dtype=torch.float64)[:batch].reshape(-1, 1, 1, 1)
    classes = torch.tensor([3, 0])[:batch]
    return x * (0.25 + sigma**2).sqrt(), sigma, classes, F.one_hot(classes, 5).double()


def error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


# --- networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "classes", "scale_shift", "order"),
    [(SMALL, 0, False, "qkv"), (TINY, 5, True, "qkv"), (TINY, 0, False, "heads")],
)
def test_consistency_models_denoiser(shape, classes, scale_shift, order):
    theirs, state = reference(shape, classes=classes, scale_shift=scale_shift, order=order, dims=2)
    changes = {"label_dim": classes, "adaptive_scale": scale_shift}
    ours = cm_denoiser(state, order, **shape, **changes).double()
    x, sigma, y, labels = noisy(shape["img_resolution"])
    total = sigma**2 + 0.25
    t = 1000 * 0.25 * (sigma + 1e-44).log().flatten()
    out, middle = theirs(x / total.sqrt(), t, y)
    expected = 0.25 / total * x + 0.5 * sigma / total.sqrt() * out
    denoised, bottleneck = ours(x, sigma, labels if classes else None, return_bottleneck=True)
    assert error(denoised, expected) < 1e-12
    assert error(bottleneck, middle) < 1e-12
    assert error(0.25 / total * x, expected) > 0.1  # the network takes part
    assert ours.gives_bottleneck and ours.bottleneck_size == bottleneck.shape[2:]
    assert (ours.sigma_min, ours.sigma_max) == (0.002, 80.0)


@pytest.mark.parametrize(
    ("shape", "classes", "order", "learn_sigma", "time_map"),
    [
        (SMALL, 5, "heads", True, "release"),
        (TINY, 0, "heads", True, "levels"),
        (TINY, 5, "qkv", False, "levels"),
    ],
)
def test_adm_denoiser(shape, classes, order, learn_sigma, time_map):
    theirs, state = reference(shape, 6 if learn_sigma else 3, classes, order=order)
    ours = adm_denoiser(state, time_map, order, learn_sigma, **shape, label_dim=classes).double()
    x, sigma, y, labels = noisy(shape["img_resolution"])
    t = timestep(sigma, time_map).flatten()
    out, middle = theirs(x / (1 + sigma**2).sqrt(), t, y)
    denoised, bottleneck = ours(x, sigma, labels if classes else None, return_bottleneck=True)
    assert error(denoised, x - sigma * out[:, :3]) < 1e-12
    assert error(bottleneck, middle) < 1e-12
    assert error(x, x - sigma * out[:, :3]) > 0.1
    assert (ours.sigma_min, ours.sigma_max) == sigma_range(time_map)
    assert make_schedule("discrete", 4, ours.sigma_min, ours.sigma_max, sigmas=ours.sigmas)[1] > 1


def test_a_wrong_attention_order_shows():
    _, state = reference(TINY, order="qkv", dims=2, scale_shift=False)
    x, sigma, _, _ = noisy(8)
    right, wrong = (
        cm_denoiser(state, order, **TINY).double()(x, sigma) for order in ("qkv", "heads")
    )
    assert error(wrong, right) > 1e-3


@pytest.mark.parametrize(("shape", "order"), [(SMALL, "heads"), (TINY, "qkv")])
def test_classifier(shape, order):
    theirs, state = reference(shape, out=5, order=order, pools=True)
    ours = adm_classifier(state, "levels", order, **shape, label_dim=5).double()
    x, sigma, _, _ = noisy(shape["img_resolution"])
    expected, _ = theirs(x / (1 + sigma**2).sqrt(), timestep(sigma, "levels").flatten())
    assert error(ours(x, sigma), expected) < 1e-12
    one_level = torch.cat([ours(x[:1], 0.3), ours(x[1:], torch.tensor(7.0))])
    assert error(one_level, expected) < 1e-12
    assert expected.std(0).min() > 1e-3


def test_the_constants_of_the_checkpoints():
    """With the default architecture the networks have the published sizes."""
    mult, attention = (1, 1, 2, 2, 4, 4), (32, 16, 8)

    def parameters(load, channels, out, classes, scale_shift, order, dims, pools):
        with torch.device("meta"):  # shapes without memory
            net = Reference(
                256, channels, out, mult, 2, attention, classes, scale_shift, order, dims, pools
            )
            state = {name: p.detach() for name, p in net.named_parameters()}
            assert load(state).model.bottleneck_size == (8, 8)
        return sum(p.numel() for p in state.values())

    bedroom = parameters(cm_denoiser, 256, 3, 0, False, "qkv", 2, False)
    # edm_bedroom256_ema.pt has 2,105,395,349 bytes: 4 per parameter, and the names
    assert 0 < 2_105_395_349 - 4 * bedroom < 300_000
    # Dhariwal and Nichol (2021): 554 million parameters, and 54 million of the classifier
    assert round(parameters(adm_denoiser, 256, 6, 1000, True, "heads", 1, False) / 1e6) == 554
    assert round(parameters(adm_classifier, 128, 1000, 0, True, "heads", 1, True) / 1e6) == 54


# --- state dicts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_state():
    return reference(TINY, out=6, classes=5)[1]


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


def test_loaded_networks_are_frozen_and_single_precision(tiny_state):
    half = {name: value.half() for name, value in tiny_state.items()}
    net = adm_denoiser(half, **TINY, label_dim=5)
    assert not net.training
    assert {(p.dtype, p.requires_grad) for p in net.parameters()} == {(torch.float32, False)}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda s: without(s, "out.0.bias"), {}, r"without 'out.0.bias' \(1 are missing\)"),
        (lambda s: s | {"ema": 0}, {}, r"with 'ema' \(1 are unknown\)"),
        (lambda s: {"model": s}, {}, "are missing.* and with 'model'"),
        (lambda s: "model.pt", {}, "state must be a dictionary of tensors; 'str'"),
        (lambda s: s, {"label_dim": 4}, r"label_emb.weight must be \[4, 512\]; \[5, 512\]"),
        (lambda s: s, {"label_dim": 0}, "with 'label_emb.weight'"),
        (lambda s: s, {"learn_sigma": False}, r"shape of out.2.weight must be \[3, 128, 3, 3\]"),
        (lambda s: s, {"adaptive_scale": False}, "shape of .*emb_layers.1.weight must be"),
        (lambda s: s, {"num_blocks": 2}, "are missing"),
        (lambda s: s, {"attention_order": "new"}, "attention_order must be one of 'heads', 'qkv'"),
        (lambda s: s, {"time_map": "vp"}, "time_map must be one of 'release', 'levels'"),
        (lambda s: s, {"model_channels": 64}, "must be a multiple of 64 and at least 128; 64"),
        (lambda s: s, {"width": 64}, "name of a change to the architecture must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_state, change, options, message):
    with pytest.raises(ValueError, match=message):
        adm_denoiser(change(tiny_state), **({"label_dim": 5} | TINY | options))


def test_classifier_refuses():
    state = reference(TINY, out=5, pools=True)[1]
    with pytest.raises(ValueError, match="time_map must be one of"):
        adm_classifier(state, "vp", **TINY, label_dim=5)
    with pytest.raises(ValueError, match="shape of out.2.positional_embedding"):
        adm_classifier(state, **(TINY | {"img_resolution": 16, "attn_resolutions": (8,)}))
    with pytest.raises(ValueError, match="and with 'out.2.bias'"):
        adm_classifier(reference(TINY)[1], **TINY)


def test_a_conditional_network_needs_labels(tiny_state):
    net = adm_denoiser(tiny_state, **TINY, label_dim=5)
    with pytest.raises(ValueError, match=r"labels must be of shape \[2, 5\] for this class-cond"):
        net(torch.zeros(2, 3, 8, 8), 1.0)


# --- time ---------------------------------------------------------------------------------------


def test_timesteps_of_the_levels():
    sigmas = torch.tensor(SIGMAS)
    alpha_bar, expected = 1.0, []
    for i in range(1000):
        alpha_bar *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        expected.append(math.sqrt((1 - alpha_bar) / alpha_bar))
    torch.testing.assert_close(sigmas, torch.tensor(expected, dtype=torch.float64))
    numbers = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(timestep(sigmas, "levels"), numbers, rtol=0, atol=1e-8)
    fine = torch.logspace(-2.2, 2.3, 20_000, dtype=torch.float64)
    assert (timestep(fine, "levels").diff() > 0).all()
    # the schedule "discrete" goes down in equal steps of this time
    low, high = sigma_range("levels")
    times = make_schedule("discrete", 38, low, high, sigmas=SIGMAS)
    expected = torch.linspace(999, 0, 38, dtype=torch.float64)
    torch.testing.assert_close(timestep(times, "levels"), expected, atol=1e-8, rtol=0)


def test_timesteps_of_the_release():
    low, high = sigma_range("release")
    kwargs = {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "num_blocks": 1}
    vp = build("VPPrecond", kwargs | {"epsilon_t": 1e-3})
    assert isinstance(vp, VPPrecond)
    assert (low, high) == pytest.approx((vp.sigma_min, vp.sigma_max), rel=1e-12)
    assert (low, high) == pytest.approx((0.0104860, 152.16697), rel=1e-5)
    sigma = torch.logspace(-2, 2.1, 50, dtype=torch.float64)
    torch.testing.assert_close(timestep(sigma), vp.scalings(sigma)[3])
    # "time_uniform" over this range is uniform in this time
    times = make_schedule("time_uniform", 10, low, high)
    torch.testing.assert_close(
        timestep(times), 999 * torch.linspace(1, 1e-3, 10, dtype=torch.float64)
    )
    # how far the two maps are apart, in steps: most at the two ends, below 1 at the lower one
    ends = torch.tensor([low, high], dtype=torch.float64)
    apart = timestep(ends) - timestep(ends, "levels")
    assert 0.5 < apart[0] < 1 and 3 < apart[1] < 5


@pytest.mark.parametrize("time_map", ["release", "levels"])
def test_the_time_is_differentiable(time_map):
    sigma = torch.tensor([0.0123, 0.5, 33.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: timestep(s, time_map), sigma, eps=1e-7)
    with fwad.dual_level():
        dual = fwad.make_dual(sigma.detach(), torch.ones(3, dtype=torch.float64))
        forward = fwad.unpack_dual(timestep(dual, time_map)).tangent
    (reverse,) = torch.autograd.grad(timestep(sigma, time_map).sum(), sigma)
    torch.testing.assert_close(forward, reverse)


def test_ranges_refuse():
    with pytest.raises(ValueError, match="time_map must be one of"):
        sigma_range("vp")


# --- guidance -----------------------------------------------------------------------------------


class Mixture:
    """Four Gaussians, two per class: the denoiser of all, of one class, and the true classifier."""

    def __init__(self, seed=0):
        g = torch.manual_seed(seed)
        self.means = torch.randn(4, 1, 2, 3, dtype=torch.float64, generator=g)
        self.stds = 0.2 + torch.rand(4, 1, 2, 3, dtype=torch.float64, generator=g)
        self.weights = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
        self.denoiser = GaussianMixtureDenoiser(self.means, self.stds, self.weights)

    def of_class(self, c):
        part = slice(2 * c, 2 * c + 2)
        weights = self.weights[part] / self.weights[part].sum()
        return GaussianMixtureDenoiser(self.means[part], self.stds[part], weights)

    def classifier(self, x, t):
        scale = (self.stds**2 + t.reshape(-1, 1, 1, 1, 1) ** 2).sqrt()
        density = torch.distributions.Normal(self.means, scale).log_prob(x[:, None])
        joint = density.flatten(2).sum(2) + self.weights.log()
        return joint.unflatten(1, (2, 2)).logsumexp(2) + 7.0  # logits have no fixed zero


@pytest.fixture
def mixture():
    return Mixture()


def mixture_input(batch=3, seed=4):
    g = torch.manual_seed(seed)
    t = torch.tensor([0.05, 0.6, 4.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    return torch.randn(batch, 1, 2, 3, dtype=torch.float64, generator=g) * (1 + t), t


def one_hot(classes, count=2):
    return F.one_hot(torch.tensor(classes), count).double()


def test_true_guidance_gives_the_conditional_denoiser(mixture):
    guided = GuidedDenoiser(mixture.denoiser, mixture.classifier, 1.0, clip=False)
    x, t = mixture_input()
    for c in (0, 1):
        expected = mixture.of_class(c)(x, t)
        with torch.no_grad():
            got = guided(x, t, one_hot([c] * 3))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert error(mixture.denoiser(x, t), expected) > 0.05
        clipped = GuidedDenoiser(mixture.denoiser, mixture.classifier, 1.0)(x, t, one_hot([c] * 3))
        torch.testing.assert_close(clipped, expected.clamp(-1, 1), rtol=1e-12, atol=1e-12)
    mixed = guided(x, 0.6, one_hot([1, 0, 1]))
    torch.testing.assert_close(mixed[1:2], mixture.of_class(0)(x[1:2], 0.6), rtol=1e-12, atol=1e-12)


def test_linear_classifier_in_closed_form():
    g = torch.manual_seed(0)
    mean, w = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=g)
    base = GaussianDenoiser(mean, torch.full_like(mean, 0.5))
    # p(1 | x) is the logistic function of w.x / t, so grad log p(1 | x) = (1 - p) w / t

    def classifier(x, t):
        return torch.stack([0 * t.flatten(), (w * x / t).sum((1, 2, 3))], 1)

    guided = GuidedDenoiser(base, classifier, 2.5, clip=False)
    x, t = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=g), torch.full((3, 1, 1, 1), 1.5)
    p = torch.sigmoid((w * x / 1.5).sum((1, 2, 3), keepdim=True))
    expected = base(x, 1.5) + 2.5 * 1.5**2 * (1 - p) * w / 1.5
    torch.testing.assert_close(guided(x, t, one_hot([1] * 3)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("classes", [5, 0])
def test_guided_adm_as_dhariwal_and_nichol_write_it(classes):
    """eps' = eps - s sqrt(1 - alpha_bar) grad log p(y | x_t) at x_t = sqrt(alpha_bar) x."""
    net, state = reference(TINY, out=6, classes=classes)
    judge, judge_state = reference(TINY, out=5, pools=True, seed=8)
    base = adm_denoiser(state, **TINY, label_dim=classes)
    classifier = adm_classifier(judge_state, **TINY, label_dim=5)
    guided = GuidedDenoiser(base, classifier, 3.0, clip=False).double()
    x, sigma, y, labels = noisy(8)
    alpha_bar = 1 / (1 + sigma**2)
    x_t = (alpha_bar.sqrt() * x).requires_grad_()
    t = timestep(sigma).flatten()
    log_p = judge(x_t, t)[0].log_softmax(1)[torch.arange(2), y].sum()
    (gradient,) = torch.autograd.grad(log_p, x_t)
    eps = net(x_t.detach(), t, y)[0][:, :3] - 3.0 * (1 - alpha_bar).sqrt() * gradient
    expected = (x_t.detach() - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    with torch.no_grad():
        denoised, bottleneck = guided(x, sigma, labels, return_bottleneck=True)
    assert error(denoised, expected) < 1e-11
    unguided = base(x, sigma, labels if classes else None)
    assert error(denoised - unguided, expected - unguided) < 1e-9
    assert error(unguided, expected) > 1e-3
    assert bottleneck.shape[2:] == guided.bottleneck_size == (4, 4)
    single = guided.float()(x, sigma, labels)
    assert single.dtype == torch.float32 and error(single.double(), expected) < 1e-4


def test_derivative_of_the_guided_denoiser_is_exact(mixture):
    guided = GuidedDenoiser(mixture.denoiser, mixture.classifier, 1.7, clip=False)
    x, t = mixture_input()
    x, t = x.requires_grad_(), t.requires_grad_()
    labels = one_hot([0, 1, 1])
    assert torch.autograd.gradcheck(lambda x, t: guided(x, t, labels), (x, t))
    fixed = x.detach()
    assert torch.autograd.gradcheck(lambda t: guided(fixed, t, labels), t)
    with torch.no_grad():
        assert not guided(x, t, labels).requires_grad
    assert not guided(fixed, t.detach(), labels).requires_grad  # no graph where none is asked for


def test_one_call_is_one_evaluation(mixture):
    guided = GuidedDenoiser(mixture.denoiser, mixture.classifier, 1.0, clip=False)
    times = make_schedule("polynomial", 6, 0.01, 10.0)
    latents, labels = make_latents(range(4), (1, 2, 3)), one_hot([0, 1, 1, 0])
    out = sample(guided, latents, times, make_solver("heun"), labels=labels)
    assert out.nfe == 10
    alone = sample(mixture.of_class(1), latents, times, make_solver("heun"))
    torch.testing.assert_close(out.x[1:3], alone.x[1:3], rtol=1e-9, atol=1e-9)


def test_guidance_refuses(mixture):
    guided = GuidedDenoiser(mixture.denoiser, mixture.classifier, 1.0)
    x, t = mixture_input()
    with pytest.raises(ValueError, match="labels must be one-hot classes.*None was given"):
        guided(x, t)
    with pytest.raises(ValueError, match=r"labels must be of shape \[3, 2\]; \(3, 4\)"):
        guided(x, t, one_hot([0, 1, 1], 4))
    for scale in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale must be a number of at least 0"):
            GuidedDenoiser(mixture.denoiser, mixture.classifier, scale)
    with fwad.dual_level(), pytest.raises(ValueError, match="gradient must be 'reverse'"):
        guided(fwad.make_dual(x, torch.ones_like(x)), t, one_hot([0, 1, 1]))
    assert not guided.gives_bottleneck


def test_a_predictor_trains_on_a_guided_network():
    base = adm_denoiser(reference(TINY, out=6, classes=5)[1], **TINY, label_dim=5)
    classifier = adm_classifier(reference(TINY, out=5, pools=True)[1], **TINY, label_dim=5)
    guided = GuidedDenoiser(base, classifier, 2.0)
    frozen = {name: p.clone() for name, p in guided.named_parameters()}
    low, high = sigma_range()
    config = Training(
        "dpmpp",
        schedule="time_uniform",
        num_steps=3,
        sigma_min=low,
        sigma_max=high,
        afs=False,
        images=4,
        batch=2,
    )
    labels = one_hot([3, 0], 5)
    trainer = Trainer(guided, config, (3, 8, 8), labels=lambda seeds: labels)
    before = {name: p.clone() for name, p in trainer.predictor.named_parameters()}
    trainer.step()
    trainer.step()
    assert [len(rows) for rows in trainer.log] == [2, 2]
    assert all(math.isfinite(loss) and loss > 0 for rows in trainer.log for loss, _, _ in rows)
    moved = [n for n, p in trainer.predictor.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > 1
    assert all(torch.equal(p, frozen[name]) for name, p in guided.named_parameters())

    forward = Trainer(guided, replace(config, gradient="forward"), (3, 8, 8))
    latents = make_latents(trainer.seeds(0), (3, 8, 8))
    with pytest.raises(ValueError, match="gradient must be 'reverse'"):
        next(forward.losses(latents, labels))
