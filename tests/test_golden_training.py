"""Training equals that of the official implementation, through vectors recorded from it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_golden import GOLDEN, denoiser_of, load

from amedlib.training import Trainer, Training

TOLERANCE = 1e-8


class Mixture:
    """The exact denoiser of the recorded runs; its bottleneck is the denoised image."""

    gives_bottleneck = True
    bottleneck_size = (8, 8)

    def __init__(self):
        self.denoise = denoiser_of(load("gmm_baselines.npz"))

    def __call__(self, x, t, labels=None, return_bottleneck=False):
        denoised = self.denoise(x, t)
        return (denoised, denoised) if return_bottleneck else denoised


def cases():
    with np.load(GOLDEN / "training.npz") as archive:
        return json.loads(str(archive["cases"]))


def configuration(case) -> Training:
    """The recorded case; what it does not name is left to the recipe of the release."""
    same = ("solver", "teacher", "m", "afs", "schedule", "rho", "num_steps", "batch")
    scales = ("scale_dir", "scale_time", "learning_rate")
    options = dict(case["options"])
    if case["solver"] == "dpmpp":
        options["thresholding"] = True
    return Training(
        **{name: case[name] for name in (*same, *scales)},
        options=options,
        images=case["batch"] * case["batches"],
        recipe="release",
    )


def weights(data, case, when) -> dict[str, torch.Tensor]:
    start = f"{case['case']}/{when}/"
    return {
        name.removeprefix(start): torch.from_numpy(value)
        for name, value in data.items()
        if name.startswith(start)
    }


def trained(data, case):
    """The trainer after the recorded batches, its losses, and its predictions by name."""
    trainer = Trainer(Mixture(), configuration(case), (1, 8, 8))
    trainer.predictor.double().load_state_dict(weights(data, case, "start"))
    predicted = []
    trainer.predictor.register_forward_hook(lambda module, given, out: predicted.append(out))
    losses = []
    for latents in torch.from_numpy(data["latents"]):
        for loss, _ in trainer.losses(latents):
            trainer.optimizer.zero_grad()
            loss.backward()
            trainer.optimizer.step()
            losses.append(loss.item())
    names = [name for name in ("r", "scale_dir", "scale_time") if f"{case['case']}/{name}" in data]
    return trainer, losses, {name: [getattr(out, name) for out in predicted] for name in names}


def differences(data, case) -> dict[str, float]:
    """Largest differences from the record, of losses and weights relative to their largest."""
    trainer, losses, predicted = trained(data, case)

    def relative(ours, theirs):
        return float((ours - theirs).abs().max() / theirs.abs().max())

    recorded = torch.from_numpy(data[f"{case['case']}/losses"])
    assert len(losses) == case["updates"] == len(recorded)
    found = {"losses": relative(torch.tensor(losses, dtype=torch.float64), recorded)}
    for name, values in predicted.items():
        rows = torch.stack([value.detach().flatten().expand(case["batch"]) for value in values])
        found[name] = float((rows - torch.from_numpy(data[f"{case['case']}/{name}"])).abs().max())
    ended, state = weights(data, case, "end"), trainer.predictor.state_dict()
    assert state.keys() == ended.keys()
    found["weights"] = max(relative(state[name], value) for name, value in ended.items())
    return found


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case['case']}-{case['solver']}")
def test_training_is_that_of_the_release(case):
    found = differences(load("training.npz"), case)
    assert {"losses", "r", "weights"} < found.keys()
    assert max(found.values()) < TOLERANCE, found


def test_training_from_the_student_would_be_noticed():
    """The paper's text goes on from the student's own state, the released code does not."""
    data, case = load("training.npz"), cases()[0]
    config = replace(configuration(case), start="student")
    trainer = Trainer(Mixture(), config, (1, 8, 8))
    trainer.predictor.double().load_state_dict(weights(data, case, "start"))
    losses = [loss.item() for loss, _ in trainer.losses(torch.from_numpy(data["latents"][0]))]
    assert abs(losses[1] / data["c0/losses"][1] - 1) > 1e-3
