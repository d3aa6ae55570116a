"""Models of the diffusers library as D(x; t): a pipeline, or a network with its scheduler."""

import inspect
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch
import torch.autograd.forward_ad as fwad
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from amedlib.checks import is_number, require
from amedlib.compute import check_precision
from amedlib.denoisers.diffusers_pipelines import SHARED, Told, network_of
from amedlib.denoisers.diffusers_schedulers import convention, scheduler_times

# Networks whose time runs from 0 to 1; their pipelines divide by the number of levels.
UNIT_TIME = ("Flux", "QwenImage", "Chroma")


class DiffusersDenoiser(nn.Module):
    """D(x; t) of a network of diffusers; made by ``from_diffusers``.

    Attributes:
        network: the network, with weights in a precision of its own.
        autoencoder: of a pipeline for latents, else ``None``.
        scheduler: the scheduler whose convention it follows.
        sigmas: noise levels that it was trained on [levels], ascending float64, for
            ``make_schedule("discrete", sigmas=denoiser.sigmas, ...)``; ``None`` where continuous.
        sigma_min, sigma_max: the scheduler's range.
        shape: of a sample, without the batch; ``None`` where the network does not say it.
        gives_bottleneck: whether it is a U-Net on images; the bottleneck is its middle block's
            output.
        bottleneck_size: (h, w) of that for samples of ``shape``, where there is one.
        evaluations_per_call: 2 with classifier-free guidance, else 1.
    """

    def __init__(self, network, scheduler, told: Callable, shape, guidance_scale, time_scale):
        super().__init__()
        self.autoencoder = None
        self.convention = convention(scheduler)
        self.network, self.scheduler = network, scheduler
        self.sigmas, (self.sigma_min, self.sigma_max) = self.convention[-2:]
        self.told, self.shape, self.time_scale = told, shape, time_scale
        self.guidance_scale = guidance_scale
        self.evaluations_per_call = 1 if guidance_scale is None else 2
        middle = getattr(network, "mid_block", None)
        self.gives_bottleneck = middle is not None and shape is not None and len(shape) == 3
        if self.gives_bottleneck:
            halvings = sum(bool(getattr(each, "downsamplers", 0)) for each in network.down_blocks)
            self.bottleneck_size = tuple(-(-side // 2**halvings) for side in shape[1:])

    def forward(self, x, t, labels=None, return_bottleneck=False):
        """The denoised sample D(x; t), in the dtype of x.

        Args:
            x: [B, ...].
            t: noise level, a positive number or one per sample [B, 1, ...].
            labels: what the samples shall be, see ``from_diffusers``.
            return_bottleneck: return (D, bottleneck [B, Ch, h, w]), with guidance that of the
                conditional evaluation.

        Raises:
            ValueError: t or labels do not fit to the batch.
        """
        sigma = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
        if len(sigma) not in (1, len(x)):
            require(False, "t", tuple(sigma.shape), f"one number or one per sample ({len(x)})")
        dtype = self.network.dtype
        told = [_spread(each, x, dtype) for each in self.told(labels, len(x))]
        alpha = self.convention.alpha(sigma)
        scaled = (alpha * x).to(dtype)
        time_step = self.time_scale * self.convention.time_step(sigma.flatten())
        time_step = time_step.float().expand(len(x))

        def predicted(told):
            out = self.network(scaled, timestep=time_step, return_dict=False, **told)[0]
            return out[:, : x.shape[1]].to(x.dtype)  # learned variances come last

        seen = []
        # Of the attention kernels, only this one can be differentiated in forward mode.
        dual = fwad.unpack_dual(scaled).tangent is not None
        with sdpa_kernel(SDPBackend.MATH) if dual else nullcontext():
            with _outputs_of(self.network.mid_block, seen) if return_bottleneck else nullcontext():
                out = predicted(told[0])
            if self.guidance_scale is not None:
                unconditional = predicted(told[1])
                out = unconditional + self.guidance_scale * (out - unconditional)
        denoised = self.convention.denoised(x, sigma, out)
        return (denoised, seen[0]) if return_bottleneck else denoised

    @torch.no_grad()
    def decode(self, x: torch.Tensor, batch: int = 4) -> torch.Tensor:
        """Images [B, C, H, W] in [-1, 1] of final latents x [B, c, h, w], ``batch`` at a time.

        Raises:
            ValueError: the model has no autoencoder of this kind; its pipeline decodes the latents.
        """
        config = getattr(self.autoencoder, "config", {})
        simple = "scaling_factor" in config and not config.get("latents_mean") and x.ndim == 4
        what = f"{type(self.autoencoder).__name__} for {tuple(x.shape)}"
        require(simple, "autoencoder", what, "a pipeline's for latents [B, c, h, w]")
        z = x / config["scaling_factor"] + (config.get("shift_factor") or 0)
        parts = z.to(self.autoencoder.dtype).split(batch)
        return torch.cat([self.autoencoder.decode(z).sample for z in parts]).clamp(-1, 1)

    def scheduler_times(self, num_inference_steps: int, **options) -> torch.Tensor:
        """The scheduler's own times, see ``diffusers_schedulers.scheduler_times``."""
        return scheduler_times(self.scheduler, num_inference_steps, **options)


@contextmanager
def _outputs_of(layer, seen: list):
    hook = layer.register_forward_hook(lambda *call: seen.append(call[-1]))
    try:
        yield
    finally:
        hook.remove()


def _spread(told: dict, x, dtype) -> dict:
    """The arguments of the network for the batch x; what is given once holds for all samples."""
    spread = {}
    for name, value in told.items():
        if isinstance(value, dict):
            value = _spread(value, x, dtype)
        elif torch.is_tensor(value):
            value = value.to(x.device)
            if name not in SHARED and value.ndim:
                allowed = f"for a batch of {len(x)} samples, or of 1 for all"
                require(len(value) in (1, len(x)), name, tuple(value.shape), allowed)
                value = value.expand(len(x), *value.shape[1:])
                value = value.to(dtype) if value.is_floating_point() else value
        spread[name] = value
    return spread


def from_diffusers(
    model, scheduler=None, *, guidance_scale=None, unconditional=None, **conditioning
) -> DiffusersDenoiser:
    """A model of diffusers as a denoiser for ``sample``, in its convention x = x_0 + sigma n.

    **A pipeline** is called for one step, and what it tells its network besides x and the time is
    kept, so that all is as there, classifier-free guidance included. ``conditioning`` are arguments
    of its call that all samples share, such as ``prompt="a cat"`` or ``height=512``. Labels are a
    list of prompts, or of classes, one for each sample. For another list than the last one the
    pipeline is called again, which encodes it and, only where guidance takes two calls of the
    network, makes the first of them; that evaluation is not counted.

    **A network with its scheduler** gets ``conditioning`` as arguments, tensors for B samples or
    for one that stands for all. Labels are a tensor [B, ...] for ``encoder_hidden_states`` or, in
    networks without that argument, ``class_labels`` (numbers [B] or one-hot [B, classes]); or a
    dictionary of arguments.

    Args:
        model: a pipeline (text to image, video or sound, classes to image, or unconditional), or a
            network, such as ``UNet2DModel`` or ``SD3Transformer2DModel``. It is put into evaluation
            mode.
        scheduler: of the network; for a pipeline its own unless given.
        guidance_scale: w of classifier-free guidance (Ho and Salimans, 2022, arXiv:2207.12598),
            D = D_uncond + w (D_cond - D_uncond), with two evaluations per call. Unless given, a
            pipeline has its default, and a network no guidance.
        unconditional: a dictionary of the arguments by which the unconditional evaluation of a
            network differs.
        conditioning: see above.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: the model cannot be written as D, or an argument does not fit to it; the
            sentence says why.
    """
    diffusers = library()
    pipeline = isinstance(model, diffusers.DiffusionPipeline)
    known = pipeline or isinstance(model, diffusers.ModelMixin)
    require(known, "model", type(model).__name__, "a pipeline or a network of diffusers")
    scheduler = model.scheduler if pipeline and scheduler is None else scheduler
    scheduler = getattr(scheduler, "model_scheduler", scheduler)  # of `to_diffusers`
    known = isinstance(scheduler, diffusers.SchedulerMixin)
    require(known, "scheduler", type(scheduler).__name__, "a scheduler of diffusers")
    convention(scheduler)  # refuses what it does not know, before work starts
    known = guidance_scale is None or is_number(guidance_scale)
    require(known, "guidance_scale", guidance_scale, "a number")
    network = network_of(model) if pipeline else model
    _check(network)
    if pipeline:
        require(unconditional is None, "unconditional", unconditional, "None for a pipeline")
        if guidance_scale is not None:
            conditioning["guidance_scale"] = guidance_scale
        told = Told(model, network.eval(), conditioning)
        shape, guidance_scale, time_scale = told.shape, told.guidance_scale, told.time_scale
    else:
        both = (guidance_scale is None) == (unconditional is None)
        require(both, "unconditional", unconditional, "given exactly where guidance_scale is")
        told, shape = _arguments(network, conditioning, unconditional), _shape(network)
        unit = type(network).__name__.startswith(UNIT_TIME)
        time_scale = 1 / scheduler.config["num_train_timesteps"] if unit else 1.0
    denoiser = DiffusersDenoiser(network, scheduler, told, shape, guidance_scale, time_scale)
    denoiser.autoencoder = getattr(model, "vae", None) or getattr(model, "vqvae", None)
    return denoiser.eval()


def library():
    """The package diffusers."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            "Models of diffusers need its package: pip install 'amedlib[diffusers]'."
        ) from error
    return diffusers


def _check(network) -> None:
    name = type(network).__name__
    known = "timestep" in inspect.signature(network.forward).parameters
    require(known, "network", name, "one with an argument timestep")
    check_precision(network)


def _arguments(network, conditioning: dict, unconditional: dict | None) -> Callable:
    """What a network is told for labels and a batch, as ``Told`` does for a pipeline's."""
    parameters = inspect.signature(network.forward).parameters
    x, *needed = [name for name, each in parameters.items() if each.default is each.empty]
    label = next((n for n in ("encoder_hidden_states", "class_labels") if n in parameters), None)

    def check(given):
        allowed = f"an argument of {type(network).__name__} besides {x!r} and the time"
        for name in given:
            own = name in parameters and name not in (x, "timestep")
            require(own, "conditioning", name, allowed)

    def told(labels, count):
        own = {} if labels is None else labels
        if torch.is_tensor(labels):
            fits = label is not None and len(labels) == count
            allowed = f"one for each of {count} samples" if label else "None for this network"
            require(fits, "labels", tuple(labels.shape), allowed)
            one_hot = label == "class_labels" and labels.ndim == 2
            own = {label: labels.argmax(1) if one_hot else labels}
        require(isinstance(own, dict), "labels", labels, "a tensor or a dictionary of tensors")
        check(own)
        own = conditioning | own
        for name in needed:
            given = name in own or name == "timestep"
            require(given, name, None, f"given to {type(network).__name__}, for all or as labels")
        return [own] if unconditional is None else [own, own | unconditional]

    check(conditioning | (unconditional or {}))
    return told


def _shape(network) -> tuple[int, ...] | None:
    """The shape of a sample of a network on images, where its configuration states it."""
    size = network.config.get("sample_size")
    if not size or "2D" not in type(network).__name__:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return network.config["in_channels"], *sides
