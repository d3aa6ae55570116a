import math

import pytest
import torch

import amedlib
from amedlib.comparison import UNTRAINED, Untrained
from amedlib.recipes import best_start, default_training, noise_range


class Gaussian:
    """The exact denoiser of N(0, s^2), whose ODE has a closed solution."""

    sigma_min, sigma_max, shape = 0.01, 20.0, (3,)

    def __init__(self, s=0.5):
        self.s, self.calls = s, 0

    def __call__(self, x, t, labels=None):
        self.calls += 1
        return x * self.s**2 / (self.s**2 + torch.as_tensor(t) ** 2)

    def end(self, latents):
        ends = [math.sqrt(self.s**2 + t**2) for t in (self.sigma_min, self.sigma_max)]
        return latents.double() * self.sigma_max * ends[0] / ends[1]


class Mixture:
    """The exact denoiser of two narrow Gaussians."""

    shape = (3,)

    def __call__(self, x, t, labels=None):
        t2 = torch.as_tensor(t) ** 2
        means = torch.tensor([-0.7, 0.7])[:, None, None].expand(2, 1, 3).to(x)
        weight = (-(x - means).square().sum(2, keepdim=True) / (2 * (0.01 + t2))).softmax(0)
        return (weight * (0.01 * x + t2 * means) / (0.01 + t2)).sum(0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "five.safetensors"
    amedlib.train(Gaussian(), 5, (3,), path, progress=False)
    return amedlib.load_sampler(path)


@pytest.fixture(scope="module")
def found(trained):
    return amedlib.compare(Gaussian(), 5, trained={"ours": trained}, progress=False)


def test_errors_are_those_to_the_closed_solution(found):
    denoiser, latents = Gaussian(), amedlib.make_latents(range(32), (3,))
    for row in found.rows[:5]:
        x = row.sampler.sample(denoiser, latents).x
        exact = (x - denoiser.end(latents)).square().mean().sqrt().item()
        assert row.error == pytest.approx(exact, abs=3 * found.accuracy + 1e-9)


def test_every_solver_is_there_at_the_evaluations_asked_for(found):
    assert {row.nfe for row in found.rows} == {5}
    names = {row.name.split(",")[0] for row in found.rows}
    assert names == {*UNTRAINED, "ours"}
    errors = [row.error for row in found.rows]
    assert errors == sorted(errors)
    assert isinstance(found.best.sampler, Untrained)


def test_the_cost_that_is_said_is_the_one_that_is_paid(capsys):
    denoiser = Gaussian()
    found = amedlib.compare(denoiser, 3)
    said = int(capsys.readouterr().out.split("samplers, ")[1].split()[0])
    assert said == found.evaluations == denoiser.calls


def test_training_beats_the_best_untrained(tmp_path):
    path = tmp_path / "five.safetensors"
    amedlib.train(Mixture(), 5, (3,), path, progress=False)
    ours = {"ours": amedlib.load_sampler(path)}
    found = amedlib.compare(Mixture(), 5, trained=ours, progress=False)
    ratio, low, high = found.ratio("ours")
    assert low <= ratio <= high < 0.9
    assert "ours" in str(found)


def test_a_ratio_to_itself_is_one(found):
    name = found.best.name
    assert found.ratio(name) == (1.0, 1.0, 1.0)


def test_the_interval_of_a_ratio_covers_the_ratio_on_many_samples(trained):
    denoiser = Gaussian()
    many = amedlib.make_latents(range(10**6, 10**6 + 4000), (3,))
    few = [many[i : i + 40] for i in range(0, 4000, 40)]
    other = "iPNDM, polynomial"

    def ratios(latents):
        found = amedlib.compare(denoiser, 3, latents=latents, progress=False)
        return found.ratio("DEIS, polynomial", other)

    truth = ratios(many)[0]
    covered = sum(low <= truth <= high for _, low, high in map(ratios, few[:20]))
    assert covered >= 16  # of 20, at 95 %


def test_a_picture_shows_the_best(found):
    axes = found.plot(4)
    assert [text.get_text() for text in axes.get_yticklabels()][-1] == found.rows[0].name


def test_labels_go_with_their_samples():
    class Labelled(Gaussian):
        def __call__(self, x, t, labels=None):
            return super().__call__(x - labels[:, None], t) + labels[:, None]

    latents = torch.randn(6, 3)
    labels = torch.arange(6.0)
    whole = amedlib.compare(Labelled(), 3, latents=latents, labels=labels, progress=False)
    parts = amedlib.compare(Labelled(), 3, latents=latents, labels=labels, batch=4, progress=False)
    assert str(whole).splitlines()[:-1] == str(parts).splitlines()[:-1]


@pytest.mark.parametrize(
    "how, sentence",
    [
        ({"nfe": 0}, "nfe must be"),
        ({"shape": "x"}, "shape must be"),
        ({"latents": torch.ones(1, 3)}, "latents must be"),
        ({"labels": torch.ones(4)}, r"labels must be .* \[32, ...\] .*; \(4,\) was given"),
        ({"labels": [1, 2, 3]}, r"labels must be .* 32 strings .*; \[1, 2, 3\] was given"),
        ({"labels": {"a": torch.ones(4, 2)}}, r"labels must be .*; \(4, 2\) was given"),
        ({"sigma_min": 90.0}, "sigma_m"),
    ],
)
def test_bad_input_gets_a_sentence(how, sentence):
    denoiser = Gaussian()
    with pytest.raises(ValueError, match=sentence) as raised:
        amedlib.compare(denoiser, progress=False, **{"nfe": 5} | how)
    assert "\n" not in str(raised.value) and denoiser.calls == 0


def train(denoiser, path, **how):
    config = how.pop("config", 5)
    return amedlib.train(denoiser, config, (3,), path / "a.safetensors", progress=False, **how)


BY_STEPS = {
    "config": amedlib.Training("euler", recipe="paper", form="table", uses_bottleneck=False)
}


@pytest.mark.parametrize("how", [{}, BY_STEPS])
@pytest.mark.parametrize("labels", [torch.ones(4), [1, 2, 3], {"a": torch.ones(4, 2)}])
def test_labels_of_another_number_are_refused_before_training(tmp_path, how, labels):
    denoiser = Gaussian()
    with pytest.raises(ValueError, match="labels must be None, a tensor") as raised:
        train(denoiser, tmp_path, labels=lambda seeds: labels, **how)
    assert "\n" not in str(raised.value) and denoiser.calls == 0
    with pytest.raises(ValueError, match="labels must be None or a callable of seeds"):
        amedlib.training.Trainer(denoiser, *BY_STEPS.values(), (3,), labels=labels)


def test_a_network_that_is_not_a_number_is_said(tmp_path):
    def broken(x, t, labels=None):
        return x * math.nan

    with pytest.raises(ValueError, match="NaN or inf arose in step 1 of 32"):
        amedlib.compare(broken, 5, (3,), progress=False)
    with pytest.raises(ValueError, match="NaN or inf arose in step 1 of"):
        train(broken, tmp_path)
    with pytest.raises(ValueError, match="loss of batch 0, step 0, must be finite; nan"):
        train(broken, tmp_path, **BY_STEPS)


class Linear(torch.nn.Linear):
    """A network in half precision that takes what it is given."""

    def forward(self, x, t, labels=None):
        return super().forward(x.to(self.weight.dtype)).to(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_cpu_is_refused(tmp_path, dtype):
    denoiser = Linear(3, 3).to(dtype)
    calls = (
        lambda: solve(denoiser),
        lambda: amedlib.compare(denoiser, 5, (3,), progress=False),
        lambda: train(denoiser, tmp_path),
        lambda: train(denoiser, tmp_path, **BY_STEPS),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"weights of Linear must be in float32 .*{dtype} was"):
            call()


def solve(denoiser):
    times, solver = amedlib.make_schedule(), amedlib.make_solver("euler")
    return amedlib.sample(denoiser, torch.ones(2, 3), times, solver)


def test_training_begins_where_the_untrained_solver_is_best(tmp_path):
    """From order 4, which is far off on a rough model, eight passes did not reach order 2."""

    class Rough(Mixture):
        def __call__(self, x, t, labels=None):
            return super().__call__(x, t) + 0.3 * torch.sin(9 * torch.as_tensor(t).log())

    denoiser, path = Rough(), tmp_path / "a.safetensors"
    first = train(denoiser, tmp_path, evaluations=1).trained_for
    config = default_training(denoiser, 5)
    started, made = best_start(denoiser, config, (3,))
    assert first == started

    def error(training):
        trainer = amedlib.training.Trainer(denoiser, training, (3,))
        return next(trainer.losses(*trainer._inputs(trainer.seeds(0))))[0].item()

    assert error(started) < error(config)
    assert int(amedlib.files.load_tensors(path)[1]["evaluations"]) > made
    again = train(lambda *_: pytest.fail("evaluated"), tmp_path)  # the file says how it began
    assert again.trained_for == first


def test_memory_that_does_not_suffice_halves_the_batch():
    class Small(Gaussian):
        def __call__(self, x, t, labels=None):
            if len(x) > 10:
                raise torch.OutOfMemoryError("too many")
            return super().__call__(x, t)

    found = amedlib.compare(Small(), 3, progress=False)
    assert len(found.best.errors) == 32


def test_a_budget_ends_training_and_leaves_a_sampler(tmp_path):
    path = tmp_path / "few.safetensors"
    amedlib.train(Gaussian(), 5, (3,), path, progress=False, evaluations=100)
    few = amedlib.files.load_tensors(path)
    assert len(few[0]["log"]) == 1 < default_training(Gaussian(), 5).passes
    assert int(few[1]["evaluations"]) > 100
    assert amedlib.load_sampler(path).nfe == 5
    with pytest.raises(ValueError, match="seconds must be"):
        amedlib.train(Gaussian(), 5, (3,), tmp_path / "x", seconds=0)


@pytest.mark.parametrize("shape", [(4,), (2, 5), (1, 4, 4), (2, 3, 4, 4)])
def test_any_trailing_shape_is_trained_for(shape, tmp_path):
    path = tmp_path / "any.safetensors"
    amedlib.train(Gaussian(), 3, shape, path, progress=False, evaluations=1)
    latents = amedlib.make_latents(range(2), shape)
    assert amedlib.load_sampler(path).sample(Gaussian(), latents).x.shape == (2, *shape)


def test_the_range_is_the_denoisers_own_where_it_has_one():
    assert noise_range(Gaussian()) == {"sigma_min": 0.01, "sigma_max": 20.0}
    assert noise_range(lambda x: x) == {"sigma_min": 0.002, "sigma_max": 80.0}
    assert noise_range(Gaussian(), sigma_max=5.0)["sigma_max"] == 5.0


def test_guidance_counts_twice():
    class Guided(Gaussian):
        evaluations_per_call = 2

    found = amedlib.compare(Guided(), 6, progress=False)
    assert {row.nfe for row in found.rows} == {6}
    with pytest.raises(ValueError, match="nfe must be"):
        default_training(Guided(), 5)
