"""Training of g_phi: gradients against each other and against finite differences; resumption."""

from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as fwad
from toys import TinyNet

from amedlib.denoisers import edm
from amedlib.forward_mode import forward_derivative
from amedlib.freedoms import LearnedTable
from amedlib.intermediate import Predictor, TimeWise
from amedlib.sampling import Sampler, make_classes, make_latents, sample
from amedlib.solvers import make_solver
from amedlib.training import (
    Trainer,
    Training,
    load_predictor,
    squared_l2,
    train,
)

SHAPE = (1, 8, 8)
STUDENTS = [
    ("amed", {}),
    ("euler", {}),
    ("dpm2", {}),
    ("ipndm", {"order": 3}),
    ("deis", {"order": 3, "mode": "rhoab"}),
    ("dpmpp", {"order": 2, "thresholding": False}),
    ("unipc", {"order": 2, "thresholding": False}),
]

TABLE = {"recipe": "paper", "form": "table", "uses_bottleneck": False}


def gradients(config, net):
    """The predictor's gradient after each step of one batch, without updates."""
    trainer = Trainer(net, config, SHAPE)
    trainer.predictor.double()
    result = []
    for loss, _ in trainer.losses(make_latents(trainer.seeds(0), trainer.shape)):
        trainer.optimizer.zero_grad()
        loss.backward()
        result.append(
            torch.cat(
                [p.grad.flatten() for p in trainer.predictor.parameters() if p.grad is not None]
            )
        )
    return result


@pytest.mark.parametrize("solver, options", STUDENTS)
@pytest.mark.parametrize("recipe", ["paper", "release", "table"])
def test_forward_mode_equals_reverse_mode(solver, options, recipe):
    config = Training(
        solver=solver,
        options=options,
        **TABLE if recipe == "table" else {"recipe": recipe},
        scale_time=0.2 if recipe == "release" else 0.0,
        num_steps=4,
        batch=5,
        images=5,
    )
    net = TinyNet()
    reverse = gradients(config, net)
    forward = gradients(replace(config, gradient="forward"), net)
    assert len(reverse) == 3
    for a, b in zip(reverse, forward, strict=True):
        assert a.norm() > 0
        assert (a - b).norm() / a.norm() < 1e-8


@pytest.mark.parametrize(
    "model",
    [
        {"model_type": "SongUNet", "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]},
        {"model_type": "SongUNet", "attn_resolutions": [4]},
        {"model_type": "DhariwalUNet", "attn_resolutions": [4]},
    ],
)
def test_forward_derivative_of_the_networks(model):
    """<g, J v> is the same in forward mode and, as <J^T g, v>, in reverse mode."""
    small = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
    net = edm.build("EDMPrecond", {"img_resolution": 8, "img_channels": 1, **small, **model})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # at the start some layers are zero
        for parameter in net.double().eval().requires_grad_(False).parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / 5
    x, dx, g = torch.randn(3, 4, 1, 8, 8, generator=generator).double()
    t, dt = torch.rand(2, 4, 1, 1, 1, generator=generator).double() + 0.5
    with fwad.dual_level():
        denoised, derivative = forward_derivative(net, x, t, dx, dt)
    inputs = x.requires_grad_(), t.requires_grad_()
    same = net(*inputs)
    torch.testing.assert_close(denoised, same.detach(), rtol=1e-12, atol=1e-12)
    by_x, by_t = torch.autograd.grad(same, inputs, g)
    reverse = ((by_x * dx).sum() + (by_t * dt).sum()).item()
    assert (derivative * g).sum().item() == pytest.approx(reverse, rel=1e-9)


def test_gradient_against_finite_differences():
    config = Training(solver="ipndm", scale_time=0.2, num_steps=3, batch=4, images=4)
    net = TinyNet()
    trainer = Trainer(net, config, SHAPE)
    trainer.predictor.double()
    x = make_latents(trainer.seeds(0), trainer.shape).double() * trainer.times[0]

    def loss():
        student = Sampler(net, x, trainer.times, trainer.solver, False, trainer.predictor)
        student.advance()
        return squared_l2(student.x, torch.zeros_like(x)).mean()

    parameter = trainer.predictor.fc_r.bias
    loss().backward()
    exact = parameter.grad.item()
    values = []
    with torch.no_grad():
        for h in (1e-5, -1e-5):
            parameter += h
            values.append(loss().item())
            parameter -= h
    assert exact == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("form", [{"recipe": "paper"}, {"scale_time": 0.2}, TABLE])
@pytest.mark.parametrize("solver, options", STUDENTS)
def test_gradient_of_the_endpoint_against_finite_differences(solver, options, form):
    config = Training(
        solver=solver, options=options, objective="endpoint", batch=4, images=4, **form
    )
    trainer = Trainer(TinyNet(), config, SHAPE)
    trainer.predictor.double()
    latents = make_latents(trainer.seeds(0), trainer.shape)

    def loss():
        (found,) = trainer.losses(latents)
        return found[0]

    loss().backward()
    parameters = [p for p in trainer.predictor.parameters() if p.grad is not None]
    generator = torch.Generator().manual_seed(0)
    directions = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) / p.numel() ** 0.5
        for p in parameters
    ]
    exact = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True)).item()
    h, values = 1e-4, {}
    with torch.no_grad():
        for factor in (-2, -1, 1, 2):
            moved = [(p, factor * h * d) for p, d in zip(parameters, directions, strict=True)]
            for p, change in moved:
                p += change
            values[factor] = loss().item()
            for p, change in moved:
                p -= change
    # Fourth order in h.
    found = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)
    assert exact == pytest.approx(found, rel=1e-6)


def test_every_r_of_a_table_feels_the_endpoint_and_only_its_own_step():
    for objective, felt in (("endpoint", [3]), ("step", [1, 1, 1])):
        trainer = Trainer(TinyNet(), Training(objective=objective, images=4, **TABLE), SHAPE)
        counts = []
        for loss, _ in trainer.losses(make_latents(range(4), SHAPE)):
            trainer.optimizer.zero_grad()
            loss.backward()
            counts.append(sum(p.grad is not None for p in trainer.predictor.parameters()))
        assert counts == felt


def test_training_on_the_endpoint_brings_it_closer():
    config = Training(
        solver="euler", images=640, batch=64, objective="endpoint", learning_rate=0.1, **TABLE
    )
    trainer = Trainer(TinyNet(), config, SHAPE)
    while len(trainer.log) < trainer.batches:
        trainer.step()
    first, last = trainer.log[0], trainer.log[-1]
    assert last[0][0] < 0.9 * first[0][0]
    assert [r for _, r, _ in first] == [0.5, 0.5, 0.5]
    assert all(sd < 1e-6 for _, _, sd in last)
    assert len({loss for loss, _, _ in last}) == 1


def test_a_table_is_the_time_wise_intermediate_of_its_numbers(tmp_path):
    config = Training(solver="ipndm", images=128, batch=64, learning_rate=0.1, **TABLE)
    path, net = tmp_path / "table.safetensors", TinyNet()
    train(net, config, SHAPE, path, progress=False)
    table = load_predictor(path, config)
    assert isinstance(table, LearnedTable)
    r = torch.sigmoid(torch.stack(list(table.double().logits))).tolist()
    assert len(set(r)) == 3 and 0.5 not in r
    latents = make_latents(range(3), SHAPE)
    arguments = net, latents, config.times(), make_solver("ipndm")
    found = sample(*arguments, intermediate=table).x
    expected = sample(*arguments, intermediate=TimeWise(r)).x
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="steps of a learned table must be .* 4; 3 was given"):
        sample(net, latents, Training(num_steps=5).times(), make_solver("ipndm"), False, table)


def test_a_table_starts_where_dpm_solver_2_is():
    net, latents, times = TinyNet(), make_latents(range(3), SHAPE), Training().times()
    found = sample(net, latents, times, make_solver("amed"), intermediate=LearnedTable(times)).x
    expected = sample(net, latents, times, make_solver("dpm2", r=0.5)).x
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_shared_evaluations_are_made_once(recipe, afs):
    config = Training(recipe=recipe, afs=afs, num_steps=4, batch=2, images=2)
    net = TinyNet()
    trainer = Trainer(net, config, SHAPE)
    list(trainer.losses(make_latents(trainer.seeds(0), trainer.shape)))
    teacher, student = 4 * 3, 2 * 3
    shared = 3 if recipe == "release" else 1
    assert net.images == 2 * (teacher + student - shared)


def test_teacher_meets_the_students_times():
    config = Training(schedule="time_uniform", num_steps=5, m=2)
    torch.testing.assert_close(
        config.teacher_times()[::3], config.times(), rtol=0, atol=0, check_dtype=True
    )


def test_recipes_differ_as_documented():
    paper, release = Training(recipe="paper"), Training(recipe="release")
    assert (paper.form, paper.start, paper.images) == ("paper", "student", 20_000)
    assert (release.form, release.start, release.images) == ("release", "teacher", 10_000)
    assert Training(solver="ipndm").start == "student"
    assert Training(solver="ipndm").teacher == "ipndm"
    assert Training(solver="amed").teacher == "heun"


def test_training_brings_the_student_closer(tmp_path):
    config = Training(solver="euler", images=1280, num_steps=3, recipe="paper")
    trainer = Trainer(TinyNet(), config, SHAPE)
    while len(trainer.log) < trainer.batches:
        trainer.step()
    first, last = trainer.log[0], trainer.log[-1]
    assert all(after[0] < 0.95 * before[0] for before, after in zip(first, last, strict=True))


def test_resumed_training_equals_an_undisturbed_one(tmp_path):
    config = Training(images=640, batch=64, num_steps=3)
    net = TinyNet()
    straight = train(net, config, SHAPE, tmp_path / "straight.safetensors", progress=False)
    trainer = Trainer(net, config, SHAPE)
    for _ in range(4):
        trainer.step()
    trainer.save(tmp_path / "resumed.safetensors.partial")
    resumed = train(net, config, SHAPE, tmp_path / "resumed.safetensors", progress=False)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not list(tmp_path.glob("*.partial"))


class Small:
    """A denoiser on a device with room for ``room`` samples; remembers the labels it was given."""

    gives_bottleneck = True

    def __init__(self, room):
        self.net, self.room, self.labels = TinyNet().double(), room, []
        self.bottleneck_size = self.net.bottleneck_size

    def __call__(self, x, t, labels=None, **options):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("this device is small")
        self.labels.append(labels)
        return self.net(x, t, **options)


@pytest.mark.parametrize("objective", ["step", "endpoint"])
@pytest.mark.parametrize("solver", ["amed", "ipndm"])
def test_a_batch_in_parts_trains_the_same_predictor(solver, objective):
    config = Training(solver=solver, objective=objective, images=14, batch=7, num_steps=3)
    trainers = [Trainer(Small(room), config, SHAPE) for room in (7, 2)]
    for trainer in trainers:
        trainer.predictor.double()
        trainer.step()
        trainer.step()
    whole, parts = trainers
    assert (whole.part, parts.part) == (7, 1)
    torch.testing.assert_close(parts.log, whole.log, rtol=1e-9, atol=1e-12)
    for a, b in zip(whole.predictor.parameters(), parts.predictor.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_device_without_room_for_one_sample_is_named():
    trainer = Trainer(Small(0), Training(images=4, batch=4, num_steps=3), SHAPE)
    with pytest.raises(RuntimeError, match="memory does not suffice for training with a single"):
        trainer.step()


def test_labels_belong_to_the_seeds_of_their_latents():
    net = Small(2)
    trainer = Trainer(
        net, Training(images=4, batch=4, num_steps=3), SHAPE, labels=lambda s: make_classes(s, 5)
    )
    trainer.step()
    seen = torch.stack([labels for labels in net.labels if labels is not None])
    expected = make_classes(trainer.seeds(0), 5).split(2)
    assert all(any(torch.equal(labels, part) for part in expected) for labels in seen)
    assert {tuple(labels.argmax(1).tolist()) for labels in seen} == {
        tuple(part.argmax(1).tolist()) for part in expected
    }


def test_half_precision_changes_the_loss_a_little():
    arguments = {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet"}
    arguments |= {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
    torch.manual_seed(0)
    net = edm.build("EDMPrecond", arguments).eval()
    losses = []
    for precision in ("float32", "bfloat16"):
        for gradient in ("reverse", "forward"):
            config = Training(images=8, batch=8, precision=precision, gradient=gradient)
            trainer = Trainer(net, config, SHAPE)
            trainer.step()
            losses.append(sum(row[0] for row in trainer.log[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert 0 < abs(losses[2] - losses[0]) < 0.1 * losses[0]
    assert losses[3] == pytest.approx(losses[0], rel=0.1)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    trainer = Trainer(TinyNet(), Training(batch=4, images=8), SHAPE)
    trainer.step()
    trainer.save(tmp_path / "a.partial")
    other = Trainer(TinyNet(), Training(batch=4, images=8, seed=1), SHAPE)
    with pytest.raises(ValueError, match="same training"):
        other.resume(tmp_path / "a.partial")


def test_a_trained_predictor_survives_the_file(tmp_path):
    config = Training(images=8, batch=4, scale_time=0.2)
    path = tmp_path / "p.safetensors"
    predictor = train(TinyNet(), config, SHAPE, path, progress=False)
    again = load_predictor(path)
    h = torch.randn(3, 5, 4, 4)
    for a, b in zip(predictor(0, 10.0, 1.0, h), again(0, 10.0, 1.0, h), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(ValueError, match="asked for"):
        load_predictor(path, replace(config, seed=3))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_predictor(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"recipe": "mine"}, "recipe must be one of 'paper', 'release'; 'mine' was given"),
        ({"teacher": "amed"}, "teacher must be one of"),
        ({"loss": "l3"}, "loss must be one of"),
        ({"solver": "ipndm", "start": "teacher"}, "start must be 'student' for 'ipndm'"),
        ({"m": 0}, "m must be a whole number of at least 1; 0 was given"),
        ({"images": -1}, "images must be"),
        ({"seed": 1.5}, "seed must be"),
        ({"solver": "ipndm", "options": {"order": 5}}, "order must be a whole number from 1 to 4"),
        ({"sigma_min": 90.0}, "0 < sigma_min < sigma_max"),
        ({"recipe": "paper", "scale_dir": 0.1}, "must be zero in the form"),
        ({"form": "mine"}, "form must be one of 'paper', 'release', 'table'"),
        ({"form": "table", "scale_dir": 0.0}, "uses_bottleneck must be False in the form"),
        ({"form": "table", "uses_bottleneck": False}, 'must be zero in the form "table"'),
        (
            {"objective": "end"},
            "objective must be one of 'step', 'endpoint', 'search'; 'end' was given",
        ),
        (
            {"objective": "endpoint", "start": "teacher"},
            "start must be 'student' for the objective",
        ),
        (
            {"objective": "endpoint", "gradient": "forward"},
            "gradient must be 'reverse' for the obj",
        ),
        ({"precision": "float8"}, "precision must be one of 'float32', 'float16', 'bfloat16'"),
    ],
)
def test_bad_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Training(**arguments)


def test_a_nan_in_the_denoiser_stops_the_training():
    def broken(x, t, labels=None):
        return x * float("nan")

    trainer = Trainer(broken, Training(uses_bottleneck=False, batch=2, images=2), SHAPE)
    with pytest.raises(ValueError, match="loss of batch 0, step 0"):
        trainer.step()


def test_a_predictor_for_another_bottleneck_is_refused():
    net, predictor = TinyNet(), Predictor("paper", (8, 8), scale_dir=0.0)
    times = Training().times()
    with pytest.raises(ValueError, match=r"bottleneck_size must be .*\(8, 8\); \(4, 4\) was given"):
        sample(net, torch.zeros(1, *SHAPE), times, make_solver("amed"), intermediate=predictor)
    with pytest.raises(ValueError, match="intermediate must be None or a callable"):
        sample(net, torch.zeros(1, *SHAPE), times, make_solver("amed"), intermediate=0.5)
