"""Time schedules: where the time steps are.

Time is the noise level, t = sigma. A schedule is a descending float64 tensor of N points from
``sigma_max`` to ``sigma_min``; the paper counts the same points upwards, t_1 = epsilon to t_N = T.
"""

import math

import numpy as np
import torch

from amedlib.checks import is_number, one_of, require, whole

# The shortest VP time that the time_uniform schedule visits (Song et al., 2021, Appendix C).
VP_TIME_MIN = 1e-3


def vp_coefficients(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """beta_d and beta_min of the VP process whose noise level runs from sigma_min to sigma_max.

    The process has sigma(tau)^2 = exp(beta_d tau^2 / 2 + beta_min tau) - 1, and the two numbers are
    fixed by sigma(VP_TIME_MIN) = sigma_min and sigma(1) = sigma_max.
    """
    top, bottom = math.log1p(sigma_max**2), math.log1p(sigma_min**2)
    beta_d = 2 * (bottom / VP_TIME_MIN - top) / (VP_TIME_MIN - 1)
    return beta_d, top - beta_d / 2


def _polynomial(u, sigma_min, sigma_max, rho):
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (top + u * (bottom - top)) ** rho


def _logsnr(u, sigma_min, sigma_max):
    return torch.exp((1 - u) * math.log(sigma_max) + u * math.log(sigma_min))


def _time_uniform(u, sigma_min, sigma_max, rho):
    beta_d, beta_min = vp_coefficients(sigma_min, sigma_max)
    tau = (1 + u * (VP_TIME_MIN ** (1 / rho) - 1)) ** rho
    return torch.sqrt(torch.expm1(beta_d * tau**2 / 2 + beta_min * tau))


# The variances beta of the models that were trained on 1,000 noise levels: the range, and the power
# in which they are equally spaced. ADM: Dhariwal and Nichol (2021), `noise_schedule` "linear"; the
# latent models: Rombach et al. (2022), `linear_start` and `linear_end` of their configurations.
BETAS = {
    "adm": (1e-4, 0.02, 1),
    "stable_diffusion": (0.00085, 0.012, 1 / 2),
    "lsun_bedroom_ldm": (0.0015, 0.0195, 1 / 2),
}


def noise_levels(name: str) -> np.ndarray:
    """The 1,000 noise levels of a model that was trained on discrete times, ascending, [1000].

    Args:
        name: ``"adm"``, ``"stable_diffusion"`` or ``"lsun_bedroom_ldm"``.
    """
    one_of("noise levels", name, BETAS)
    first, last, power = BETAS[name]
    betas = np.linspace(first**power, last**power, 1000) ** (1 / power)
    alphas = np.cumprod(1 - betas)
    return np.sqrt((1 - alphas) / alphas)


def _discrete(u, sigma_min, sigma_max, sigmas):
    if isinstance(sigmas, str):
        sigmas = noise_levels(sigmas)
    try:
        sigmas = np.asarray(sigmas, np.float64)
    except (TypeError, ValueError):
        require(False, "sigmas", sigmas, "an ascending list of at least two noise levels")
    require(
        sigmas.ndim == 1
        and len(sigmas) > 1
        and sigmas[0] >= 0
        and bool(np.all(np.diff(sigmas) > 0)),
        "sigmas",
        sigmas.shape,
        "an ascending list of at least two noise levels",
    )
    for name, sigma in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        require(
            sigmas[0] * (1 - 1e-6) <= sigma <= sigmas[-1] * (1 + 1e-6),
            name,
            sigma,
            f"between the model's lowest and highest noise level, {sigmas[0]:.4g} and "
            f"{sigmas[-1]:.4g}, for the discrete schedule",
        )
    # Between two levels, log alpha is taken as linear in the level's number.
    level, log_alpha = np.arange(len(sigmas)), -0.5 * np.log1p(sigmas**2)

    def number(sigma):
        return np.interp(0.5 * np.log1p(sigma**2), -log_alpha, level)

    numbers = number(sigma_max) + u.numpy() * (number(sigma_min) - number(sigma_max))
    return torch.from_numpy(np.sqrt(np.expm1(-2 * np.interp(numbers, level, log_alpha))))


SCHEDULES = ("polynomial", "logsnr", "time_uniform", "discrete")


DEFAULT_RHO = {"polynomial": 7.0, "time_uniform": 1.0}


def canonical_rho(name: str, rho: float | None) -> float | None:
    """The exponent of a schedule, or ``None`` where it is the default or there is none."""
    if rho is None or name not in DEFAULT_RHO or rho == DEFAULT_RHO[name]:
        return None
    return float(rho)


def _range(name, sigma_min, sigma_max, rho) -> tuple[float, float, float]:
    """The ends and the exponent of a schedule, checked."""
    for given, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max), ("rho", rho)):
        require(is_number(value) or given == "rho" and rho is None, given, value, "a number")
    sigma_min, sigma_max = float(sigma_min), float(sigma_max)
    require(
        0 < sigma_min < sigma_max < math.inf,
        "sigma_min and sigma_max",
        (sigma_min, sigma_max),
        "finite with 0 < sigma_min < sigma_max",
    )
    rho = DEFAULT_RHO.get(name, 1.0) if rho is None else rho
    require(0 < rho < math.inf, "rho", rho, "a positive number")
    return sigma_min, sigma_max, float(rho)


def _points(name, u, sigma_min, sigma_max, rho, sigmas):
    if name == "polynomial":
        return _polynomial(u, sigma_min, sigma_max, rho)
    if name == "logsnr":
        return _logsnr(u, sigma_min, sigma_max)
    if name == "time_uniform":
        return _time_uniform(u, sigma_min, sigma_max, rho)
    return _discrete(u, sigma_min, sigma_max, "stable_diffusion" if sigmas is None else sigmas)


def make_schedule(
    name: str = "polynomial",
    num_steps: int = 6,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float | None = None,
    sigmas=None,
) -> torch.Tensor:
    """The N = ``num_steps`` time points of a schedule, descending, float64, shape [N].

    Args:
        name: ``"polynomial"`` (Eq. 10 of the paper), ``"logsnr"`` (its limit for large rho:
            geometric), ``"time_uniform"`` (uniform in the time of the VP process) or
            ``"discrete"`` (uniform in the number of the noise level a model was trained on).
        num_steps: number of time points, at least 2; there is one interval fewer.
        sigma_min, sigma_max: the ends, 0 < sigma_min < sigma_max.
        rho: exponent, positive; 7 for polynomial and 1 for time_uniform unless given. The other
            two have none and ignore it.
        sigmas: ascending noise levels of the model, for ``"discrete"`` only: numbers, or a name of
            ``noise_levels``; those of Stable Diffusion v1 unless given.

    Raises:
        ValueError: an argument is outside its range.
    """
    one_of("schedule", name, SCHEDULES)
    num_steps = whole(
        "num_steps",
        num_steps,
        2,
        10**6,
        "a whole number up to a million and of at least 2 time points",
    )
    sigma_min, sigma_max, rho = _range(name, sigma_min, sigma_max, rho)
    u = torch.arange(num_steps, dtype=torch.float64, device="cpu") / (num_steps - 1)
    try:
        times = _points(name, u, sigma_min, sigma_max, rho, sigmas)
        # The ends are what was asked for, to the last bit.
        times[0], times[-1] = sigma_max, sigma_min
    except (OverflowError, ZeroDivisionError):
        times = torch.full_like(u, torch.nan)
    require(
        bool((times.diff() < 0).all()),
        "num_steps, sigma_min, sigma_max and rho",
        (num_steps, sigma_min, sigma_max, rho),
        f"such that the points of the schedule {name!r} descend in double precision",
    )
    return times
