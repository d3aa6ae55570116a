"""What a pipeline of the diffusers library tells its network, found by listening to it.

Every pipeline prepares its conditioning in its own way: one or several text encoders, sizes and
crops, places in the image, a scale of guidance as an input. So the pipeline is called for one step,
and what its network hears besides x is kept: what is heard is right by construction.
"""

import inspect

import torch

from amedlib.checks import require

# Arguments of networks that all samples share: places in the image and in the text.
SHARED = ("img_ids", "txt_ids")
# What pipelines are asked for first, and something to ask for.
EXAMPLES = {"prompt": [""], "class_labels": [0], "batch_size": 1}
# Other networks, and corrections of the result, that D could not express.
OTHER_NETWORKS = ("controlnet", "transformer_2", "unet_2")
CORRECTIONS = ("guidance_rescale", "pag_scale")


class _Heard(Exception):
    """The pipeline has told its network enough."""


def _listen(pipeline, network, arguments: dict, enough: int | None = None):
    """What a pipeline tells its network in its first step: (calls, time step, latents).

    It ends when the step is to be taken or, with ``enough``, when so many calls are made.
    """
    calls, stepped = [], (None, None)
    signature = inspect.signature(network.forward)

    def heard(module, args, options):
        calls.append(dict(signature.bind(*args, **options).arguments))
        if len(calls) == enough:
            raise _Heard

    def step(model_output, timestep, sample, **options):
        nonlocal stepped
        stepped = timestep, sample
        raise _Heard

    hook = network.register_forward_pre_hook(heard, with_kwargs=True)
    bar = dict(getattr(pipeline, "_progress_bar_config", {}))
    ours = hasattr(pipeline.scheduler, "model_scheduler")  # of `to_diffusers`: one number only
    count = pipeline.scheduler.num_inference_steps if ours else 2
    pipeline.set_progress_bar_config(**bar | {"disable": True})
    pipeline.scheduler.step = step
    try:  # a generator of its own, so that nobody else's random numbers are used up
        pipeline(**{"num_inference_steps": count, "generator": torch.Generator()} | arguments)
    except _Heard:
        pass
    finally:
        hook.remove()
        pipeline.set_progress_bar_config(**bar)
        del pipeline.scheduler.step
    return calls, *stepped


def _half(told: dict, k: int, rows: int) -> dict:
    """The k-th half of what a network is told for two batches at once, of ``rows`` together."""
    halves = {}
    for name, value in told.items():
        if isinstance(value, dict):
            value = _half(value, k, rows)
        elif torch.is_tensor(value) and name not in SHARED and value.ndim and len(value) == rows:
            value = value.chunk(2)[k]
        halves[name] = value
    return halves


def network_of(pipeline):
    """The one network that a pipeline samples from.

    Raises:
        ValueError: there are several, or none.
    """
    name = type(pipeline).__name__
    for part in OTHER_NETWORKS:
        require(getattr(pipeline, part, None) is None, part, "one", f"None in {name}")
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    require(network is not None, "pipeline", name, "one with a unet or a transformer")
    return network


class Told:
    """What a pipeline's network is told besides x and the time, for labels of a batch.

    Called with labels and the size of the batch, it returns one dictionary of arguments or, with
    guidance, two: the conditional and the unconditional one.

    Args:
        pipeline, network: of diffusers.
        conditioning: arguments of the pipeline's call that all samples share.

    Attributes:
        guidance_scale: of classifier-free guidance; ``None`` where there is none.
        time_scale: what multiplies the scheduler's time steps.
        shape: of the latents, without the batch.

    Raises:
        ValueError: the pipeline does more than guide one network, or an argument is not its own.
    """

    def __init__(self, pipeline, network, conditioning: dict):
        self.pipeline, self.network, self.conditioning = pipeline, network, conditioning
        self.options = inspect.signature(pipeline.__call__).parameters
        self.names = list(inspect.signature(network.forward).parameters)
        self.first = next(iter(self.options))
        self._check()
        fixed = self.first == "batch_size" or {self.first, "prompt_embeds"} & conditioning.keys()
        self.free = not fixed  # then labels say what the samples are
        require(not self.free or self.first in EXAMPLES, self.first, None, "given")
        example = conditioning | ({self.first: EXAMPLES[self.first]} if self.free else {})
        calls, time_step, latents = _listen(pipeline, network, example)
        require(latents is not None, "pipeline", type(pipeline).__name__, "one that takes steps")
        self.calls, self.shape = len(calls), tuple(latents.shape[1:])
        self.time_scale = self._time_scale(calls[0], time_step)
        told = self._separated(calls, example)
        self.latest = example.get(self.first), told  # the labels, and what is told for them
        self.guidance_scale = self._guidance_scale() if len(told) == 2 else None

    def _check(self):
        name = type(self.pipeline).__name__
        for option in CORRECTIONS:
            default = getattr(self.options.get(option), "default", 0)
            value = self.conditioning.get(option, default)
            require(not value, option, value, "0, because D has no such correction")
        for option in self.conditioning:
            own = option in self.options and option != "batch_size"
            own = own and not option.endswith("_per_prompt")
            require(own, "conditioning", option, f"an argument of {name} that counts no samples")

    def _time_scale(self, call, time_step):
        heard = float(torch.as_tensor(call["timestep"]).flatten()[0])
        ratio = heard / float(time_step)
        scales = 1.0, 1 / self.pipeline.scheduler.config["num_train_timesteps"]
        scale = min(scales, key=lambda scale: abs(ratio / scale - 1))
        fits = abs(ratio / scale - 1) < 0.01  # it may be in half precision
        allowed = f"the scheduler's {float(time_step):g}, or its fraction of all"
        require(fits, f"time step of the network of {type(self.pipeline).__name__}", heard, allowed)
        return scale

    def _guidance_scale(self):
        name = "guidance_scale"
        if self.calls == 2 and "true_cfg_scale" in self.options:
            name = "true_cfg_scale"  # the other one is an input of the network
        return float(self.conditioning.get(name, self.options[name].default))

    def _separated(self, calls, arguments):
        """The dictionaries: pipelines guide by two calls, or by one for two batches."""
        given = arguments.get(self.first, arguments.get("prompt_embeds"))
        count = len(given) if isinstance(given, list | tuple | torch.Tensor) else 1
        shapes = [tuple(call[self.names[0]].shape) for call in calls]
        rows = [shape[0] for shape in shapes]
        allowed = f"[{count} or {2 * count}, {', '.join(map(str, self.shape))}]"
        fits = rows in ([count], [2 * count], [count] * 2)
        fits = fits and all(shape[1:] == self.shape for shape in shapes)
        require(fits, f"what the network of {type(self.pipeline).__name__} gets", shapes, allowed)
        besides = {self.names[0], "timestep", "return_dict"}
        told = [{k: v for k, v in call.items() if k not in besides} for call in calls]
        if rows == [2 * count]:
            conditional = 0 if self.first == "class_labels" else 1  # which of the two halves
            told = [_half(told[0], k, rows[0]) for k in (conditional, 1 - conditional)]
        return told

    def __call__(self, labels, count: int) -> list[dict]:
        """What the network is told for a batch of ``count`` samples.

        Raises:
            ValueError: the labels do not fit to the batch.
        """
        if not self.free:
            allowed = "None where conditioning or the model says what all samples are"
            require(labels is None, "labels", labels, allowed)
            return self.latest[1]
        if torch.is_tensor(labels):
            labels = (labels.argmax(1) if labels.ndim == 2 else labels).tolist()
        valid = isinstance(labels, list | tuple) and len(labels) == count
        require(valid, "labels", labels, f"a list of {count}, one {self.first!r} for each sample")
        if self.latest[0] != list(labels):
            arguments = self.conditioning | {self.first: list(labels)}
            calls, *_ = _listen(self.pipeline, self.network, arguments, self.calls)
            self.latest = list(labels), self._separated(calls, arguments)
        return self.latest[1]
