"""The state of an optimiser as tensors by name, as a safetensors file can hold it, and back."""

import torch

from amedlib.trained import below


def flat(state: dict) -> dict[str, torch.Tensor]:
    """An optimiser's state for one parameter as tensors by name, those of a list by number."""
    found = {}
    for name, value in state.items():
        named = (
            {f"{name}/{i}": v for i, v in enumerate(value)}
            if isinstance(value, list)
            else {name: value}
        )
        for key, v in named.items():
            if v is not None:
                found[key] = v if torch.is_tensor(v) else torch.tensor(v, dtype=torch.float64)
    return found


def nested(tensors: dict[str, torch.Tensor], optimizer: str) -> dict:
    """An optimiser's state for one parameter, of what ``flat`` made of it.

    Args:
        optimizer: ``"adam"`` or ``"lbfgs"``, whose workspace ``al`` is made anew.
    """
    if optimizer == "adam":
        return {name: tensors[name] for name in ("step", "exp_avg", "exp_avg_sq")}
    state = {name: tensors[name] for name in ("d", "H_diag", "prev_flat_grad")}
    state |= {name: tensors[name].item() for name in ("t", "prev_loss")}
    state |= {name: int(tensors[name]) for name in ("func_evals", "n_iter")}
    for name in ("old_dirs", "old_stps", "ro"):
        values = below(f"{name}/", tensors)
        state[name] = [values[key] for key in sorted(values, key=int)]
    return state
