"""Train the embedded default (denoiser and classifiers of the digits) from nothing, and measure it.

    python data/models/train.py                    everything
    python data/models/train.py noisy_classifier   one part: denoiser or noisy_classifier

Writes digits_edm.safetensors, digits_classifier.safetensors (both are the part "denoiser", which
the classifier judges), digits_noisy_classifier.safetensors and their model cards beside itself,
with every number in the cards measured here. On 2 cores it takes less than half an hour. If it is
stopped, the next start goes on from the last checkpoint.
"""

import copy
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

# threads that sleep while they wait: spinning ones stall each other when a core is busy
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from amedlib import make_latents, make_schedule, make_solver, sample
from amedlib.checks import one_of
from amedlib.denoisers import edm
from amedlib.denoisers.digits import (
    DigitsClassifier,
    NoisyDigitsClassifier,
    load_digits_images,
    quantise,
)
from amedlib.metrics import Moments, frechet_distance

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint.pt"
INIT_KWARGS = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 10,
    "model_type": "SongUNet",
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.0,
    "label_dropout": 0.5,  # sampling without labels is the default use
}
BATCH = 256
TRAINING_IMAGES = 600_000
LEARNING_RATE, RAMP_IMAGES = 3e-3, 30_000
EMA_HALF_LIFE_IMAGES = 30_000
SIGMA_LOG_MEAN, SIGMA_LOG_STD = -1.2, 1.2  # Karras et al., 2022, Table 1
SIGMA_RANGE = 0.002, 80.0  # of the noisy classifier
CARD_SIGMAS = (0.1, 0.5, 1.0, 2.0, 5.0, 20.0)
SAMPLE_BATCH = 500
SEED = 0


def train_classifier(data):
    """Train on the classifier's third, with random shifts by up to one pixel."""
    torch.manual_seed(SEED)
    net = DigitsClassifier()
    images, labels = data.images[data.classifier_part], data.labels[data.classifier_part]
    steps = 1500
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="classifier"):
        pick = torch.randint(len(images), (64,))
        dy, dx = torch.randint(3, (2,)).tolist()
        shifted = F.pad(images[pick], (1, 1, 1, 1), value=-1.0)[:, :, dy : dy + 8, dx : dx + 8]
        loss = F.cross_entropy(net(shifted), labels[pick], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def train_noisy_classifier(data):
    """Train on the classifier's third with noise; returns the network and its processor seconds.

    No shifts: at noise of the size of the data, p(digit | x) depends on where the digits can be.
    """
    torch.manual_seed(SEED)
    net = NoisyDigitsClassifier()
    images = data.images[data.classifier_part] - data.mean
    labels = data.labels[data.classifier_part]
    low, high = map(math.log, SIGMA_RANGE)
    steps = 3000
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    begin = time.process_time()
    for _ in tqdm(range(steps), desc="noisy classifier"):
        pick = torch.randint(len(images), (BATCH,))
        sigma = torch.empty(BATCH, 1, 1, 1).uniform_(low, high).exp()
        noisy = images[pick] + sigma * torch.randn(BATCH, 1, 8, 8)
        loss = F.cross_entropy(net(noisy, sigma), labels[pick])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval().requires_grad_(False), time.process_time() - begin


def denoising_loss(net, images, labels):
    """EDM's loss: log-normal noise levels, each weighted so that all start out equal."""
    sigma = (torch.randn(len(images), 1, 1, 1) * SIGMA_LOG_STD + SIGMA_LOG_MEAN).exp()
    weight = (sigma**2 + net.sigma_data**2) / (sigma * net.sigma_data) ** 2
    denoised = net(images + torch.randn_like(images) * sigma, sigma, labels)
    return (weight * (denoised - images) ** 2).mean()


def train_denoiser(data):
    """Train on all centred images; returns the moving average of the weights."""
    torch.manual_seed(SEED)
    images = data.images - data.mean
    labels = F.one_hot(data.labels, 10).float()
    init_kwargs = INIT_KWARGS | {"sigma_data": round(images.std().item(), 4)}
    net = edm.build("EDMPrecond", init_kwargs)
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimiser = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    state = {"net": net, "average": average, "optimiser": optimiser}
    total = TRAINING_IMAGES // BATCH
    start = resume(state, init_kwargs)
    bar = tqdm(range(start, total), initial=start, total=total, desc="denoiser", mininterval=2)
    shown, saved = 0.0, time.monotonic()
    for step in bar:
        ramp = min(1, (step + 1) * BATCH / RAMP_IMAGES)
        optimiser.param_groups[0]["lr"] = (
            LEARNING_RATE * ramp * 0.5 * (1 + math.cos(math.pi * step / total))
        )
        pick = torch.randint(len(images), (BATCH,))
        loss = denoising_loss(net, images[pick], labels[pick])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        # the average follows faster at the start, where there is little to average
        half_life = min(EMA_HALF_LIFE_IMAGES, 0.05 * (step + 1) * BATCH)
        keep = 0.5 ** (BATCH / half_life)
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - keep)
        shown += 0.01 * (loss.item() - shown) if shown else loss.item()
        bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
        if time.monotonic() - saved > 30:
            save_checkpoint(state, init_kwargs, step + 1)
            saved = time.monotonic()
    save_checkpoint(state, init_kwargs, total)
    return average, init_kwargs


def save_checkpoint(state, init_kwargs, step):
    content = {name: part.state_dict() for name, part in state.items()}
    content |= {"step": step, "random": torch.get_rng_state(), "init_kwargs": init_kwargs}
    partial = CHECKPOINT.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(CHECKPOINT)


def resume(state, init_kwargs):
    """Load the checkpoint of a stopped training of the same network, if there is one."""
    if not CHECKPOINT.exists():
        return 0
    content = torch.load(CHECKPOINT, weights_only=True)
    if content["init_kwargs"] != init_kwargs:  # of another network
        return 0
    for name, part in state.items():
        part.load_state_dict(content[name])
    torch.set_rng_state(content["random"])
    return content["step"]


def save_models(denoiser, init_kwargs, classifier, data):
    """The weights with what is needed to build the network; the mean image among the tensors."""
    metadata = {
        "precond_class": "EDMPrecond",
        "init_kwargs": json.dumps(init_kwargs),
        "data": "sklearn digits, g/8 - 1, minus mean_image",
    }
    tensors = denoiser.state_dict() | {"mean_image": data.mean}
    save_file(tensors, HERE / "digits_edm.safetensors", metadata)
    metadata = {"class": "DigitsClassifier", "data": "sklearn digits, g/8 - 1"}
    save_file(classifier.state_dict(), HERE / "digits_classifier.safetensors", metadata)
    publish("digits_classifier.safetensors", "digits_edm.safetensors")


def publish(*names):
    """Enter files that were just written into SHA256SUMS; the lines of the others stay."""
    path = HERE / "SHA256SUMS"
    lines = path.read_text().splitlines() if path.exists() else []
    sums = dict(line.split()[::-1] for line in lines if line.strip())
    for name in names:
        sums[name] = hashlib.sha256((HERE / name).read_bytes()).hexdigest()
    path.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


@torch.inference_mode()
def evaluate(denoiser, classifier, data, n_samples=5000):
    """All numbers of the model cards, as a dict."""
    found = {"samples": n_samples}
    logits = classifier(data.images[data.reference_part])
    right = logits.argmax(1) == data.labels[data.reference_part]
    found["accuracy"] = right.float().mean().item()

    times = make_schedule("polynomial", num_steps=41, sigma_min=0.002, sigma_max=80.0, rho=7.0)
    samples, seconds = [], []
    for first in tqdm(range(0, n_samples, SAMPLE_BATCH), desc="samples"):
        begin = time.monotonic()
        latents = make_latents(range(first, first + SAMPLE_BATCH), (1, 8, 8))
        out = sample(denoiser, latents, times, make_solver("heun"))
        samples.append(quantise(out.x.float() + data.mean))
        seconds.append(time.monotonic() - begin)
    found["nfe"] = out.nfe
    found["evaluations_per_second"] = SAMPLE_BATCH * out.nfe / min(seconds)
    samples = torch.cat(samples)

    reference = data.images[data.reference_part]
    features = {"feature": classifier.features, "pixel": lambda x: x.flatten(1)}
    for name, of in features.items():
        found[f"{name}_fd"] = distance(of(samples), of(reference))
        halves = []
        for seed in range(20):
            order = torch.randperm(len(reference), generator=torch.manual_seed(seed))
            halves.append(of(reference[order]).chunk(2))
        floors = torch.tensor([distance(*pair) for pair in halves])
        found[f"{name}_floor"] = floors.mean().item()
        found[f"{name}_floor_std"] = floors.std().item()
        # the same count of samples as in the floor: distances at different counts do not compare
        half = len(reference) // 2
        pairs = [
            distance(of(samples[i * half : (i + 1) * half]), halves[i][0])
            for i in range(n_samples // half)
        ]
        found[f"{name}_fd_half"] = sum(pairs) / len(pairs)

    # memorisation: are samples nearer to the training images than real images are to each other?
    flat = data.images.flatten(1)
    among_real = torch.cdist(flat, flat).fill_diagonal_(math.inf).amin(1)
    to_real = torch.cdist(samples.flatten(1), flat).amin(1)
    for name, distances in {"real": among_real, "sample": to_real}.items():
        levels = torch.quantile(distances, torch.tensor([0.01, 0.1, 0.5]))
        found[f"{name}_nearest"] = levels.tolist()
    found["copies"] = int((to_real < among_real.min()).sum())
    return found


@torch.inference_mode()
def accuracies(net, data, sigma, draws=10):
    """Accuracy on the reference images with noise: of the network, and of Bayes' rule.

    The latter takes the classifier's images for all that there are: their exact posterior.
    """
    images, labels = data.images - data.mean, data.labels[data.reference_part]
    known = F.one_hot(data.labels[data.classifier_part], 10).float()
    random = torch.Generator().manual_seed(SEED)
    right = torch.zeros(2)
    for _ in range(draws):
        noisy = images[data.reference_part]
        noisy = noisy + sigma * torch.randn(noisy.shape, generator=random)
        distances = torch.cdist(noisy.flatten(1), images[data.classifier_part].flatten(1))
        bayes = (-distances.square() / (2 * sigma**2)).softmax(1) @ known
        for i, scores in enumerate((net(noisy, sigma), bayes)):
            right[i] += (scores.argmax(1) == labels).float().mean() / draws
    return right.tolist()


def distance(a, b):
    a, b = Moments.of(a), Moments.of(b)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


DENOISER_CARD = """# digits_edm: a small diffusion model of 8x8 digits

**What.** SongUNet (DDPM++) in EDM's preconditioner, {parameters:,} parameters, trained by
`data/models/train.py` on {images:,} draws of the 1,797 images of scikit-learn's `load_digits`.
The images are scaled to [-1, 1] and the mean image is subtracted; it lies in the file as
`mean_image` and is added again after sampling. Arguments for `amedlib.denoisers.edm.build` are in
the file's metadata. Noise levels: 0.002 to 80.

**Labels.** Without labels the model samples from all digits, which is the default use. In training
half of the images carried their one-hot label, so that guidance can be studied.

**Training.** EDM's loss (log-normal noise levels, mean -1.2, deviation 1.2), Adam, batch {batch},
learning rate {rate} with a ramp and a cosine decay, moving average of the weights, no augmentation
(a shift would change the distribution), seed {seed}.

**Measured** by the same script: {samples:,} samples without labels, Heun on the polynomial schedule
(rho 7), {nfe} network evaluations, samples rounded to the 17 grey levels. Distances are Frechet
distances to the {reference:,} reference images (in the features of `digits_classifier`, so no FID).

| | features | pixels |
|---|---|---|
| {samples:,} samples to all {reference:,} reference images | {feature_fd:.2f} | {pixel_fd:.3f} |
| sets of {half} samples to {half} reference images | {feature_fd_half:.2f} | {pixel_fd_half:.3f} |
| floor: {half} to the other {half} reference images, mean of 20 divisions | \
{feature_floor:.2f} (deviation {feature_floor_std:.2f}) | \
{pixel_floor:.3f} (deviation {pixel_floor_std:.3f}) |

Values at different sample counts do not compare; the second row (a mean over disjoint sets of
samples) is the one to set against the floor. It can lie below the floor, because the model was
trained on all images, those of both halves included.

**Memorisation.** Distance (root of summed squares, pixels in [-1, 1]) to the nearest image of the
data; for a real image, to the nearest other one:

| quantile | 1 % | 10 % | 50 % |
|---|---|---|---|
| samples | {sample_nearest[0]:.2f} | {sample_nearest[1]:.2f} | {sample_nearest[2]:.2f} |
| real images | {real_nearest[0]:.2f} | {real_nearest[1]:.2f} | {real_nearest[2]:.2f} |

Samples nearer to an image than any two real images are to each other: {copies} of {samples:,}.

**Speed.** {evaluations_per_second:,.0f} network evaluations of one image per second while sampling
(fastest of the batches of {sample_batch}, {threads} threads of the machine that measured the rest).

**Limits.** 8x8 pixels and 1,797 images: good for telling solvers apart, of no use as a generator.
Data: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998, CC BY 4.0.
"""

CLASSIFIER_CARD = """# digits_classifier: features for the Frechet distance of digits

**What.** `amedlib.denoisers.digits.DigitsClassifier`, a convolutional network with smooth
activations and 64 penultimate features, trained by `data/models/train.py`. Input: images in
[-1, 1], not centred.

**Division of the data.** Every third image of scikit-learn's `load_digits` (index divisible by 3,
{classifier} images) trains the classifier; the other {reference:,} give the reference statistics,
and were never seen in its training.

**Measured.** {accuracy:.1%} of the {reference:,} reference images are classified correctly. FD of
one random half of the reference to the other ({half} each, mean of 20 divisions):
{feature_floor:.2f} (standard deviation {feature_floor_std:.2f}).

**Limits.** Its features tell 8x8 digits apart and nothing else. A distance in them is called FD
(digits features), never FID. Data: Alpaydin and Kaynak, "Optical Recognition of Handwritten
Digits", UCI, 1998, CC BY 4.0.
"""

NOISY_CARD = """# digits_noisy_classifier: which digit it is, through noise

**What.** `amedlib.denoisers.digits.NoisyDigitsClassifier`, p(digit | x; sigma) for classifier
guidance, {parameters:,} parameters, trained by `data/models/train.py`. Input: states as the
denoiser `digits_edm` sees them, centred images with noise of deviation sigma from 0.002 to 80.

**Training.** Cross-entropy, log-uniform noise levels, AdamW, batch {batch}, seed {seed};
{seconds:.0f} seconds of processor time. No shifts, unlike for `digits_classifier`: they change what
can be told through noise.

**Division of the data.** Trained on the same {classifier} images as `digits_classifier`. The
{reference:,} images that FD compares with do not enter: otherwise guidance could draw samples
towards the very images that judge them.

**Measured** on those {reference:,} images, 10 draws of noise each. Beside it Bayes' rule with the
{classifier} training images in place of the distribution; always naming the most frequent digit
gives {chance:.1%}.

| sigma | accuracy | Bayes' rule |
|---|---|---|
{rows}

**Limits.** Of use for guiding `digits_edm`, and nothing else. Data: Alpaydin and Kaynak, "Optical
Recognition of Handwritten Digits", UCI, 1998, CC BY 4.0.
"""


def write_cards(denoiser, classifier, data):
    """Measure both networks, write their model cards and print the numbers."""
    found = evaluate(denoiser, classifier, data) | {
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "images": TRAINING_IMAGES,
        "batch": BATCH,
        "rate": LEARNING_RATE,
        "seed": SEED,
        "sample_batch": SAMPLE_BATCH,
        "threads": torch.get_num_threads(),
        "classifier": len(data.classifier_part),
        "reference": len(data.reference_part),
        "half": len(data.reference_part) // 2,
    }
    (HERE / "digits_edm.md").write_text(DENOISER_CARD.format(**found))
    (HERE / "digits_classifier.md").write_text(CLASSIFIER_CARD.format(**found))
    for name, value in found.items():
        print(f"{name:24} {value}")


def make_denoiser(data):
    classifier = train_classifier(data)
    denoiser, init_kwargs = train_denoiser(data)
    save_models(denoiser, init_kwargs, classifier, data)
    CHECKPOINT.unlink()
    write_cards(denoiser, classifier, data)


def make_noisy_classifier(data):
    net, seconds = train_noisy_classifier(data)
    name = "digits_noisy_classifier"
    metadata = {"class": "NoisyDigitsClassifier", "data": "sklearn digits, g/8 - 1, centred"}
    save_file(net.state_dict(), HERE / f"{name}.safetensors", metadata)
    publish(f"{name}.safetensors")
    rows = []
    for sigma in CARD_SIGMAS:
        network, bayes = accuracies(net, data, sigma)
        rows.append(f"| {sigma:g} | {network:.1%} | {bayes:.1%} |")
    counts = data.labels[data.reference_part].bincount()
    card = NOISY_CARD.format(
        parameters=sum(p.numel() for p in net.parameters()),
        batch=BATCH,
        seconds=seconds,
        seed=SEED,
        classifier=len(data.classifier_part),
        reference=len(data.reference_part),
        chance=(counts.max() / counts.sum()).item(),
        rows="\n".join(rows),
    )
    (HERE / f"{name}.md").write_text(card)
    print("\n".join(rows))


PARTS = {"denoiser": make_denoiser, "noisy_classifier": make_noisy_classifier}


def main(parts):
    for part in parts:
        one_of("part", part, PARTS)
    data = load_digits_images()
    for part in parts or PARTS:
        PARTS[part](data)


if __name__ == "__main__":
    main(sys.argv[1:])
