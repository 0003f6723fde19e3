"""Kernels on trial: one is used only after it gave, on this device, what plain products give.

Kernels for GPUs come through interfaces without promise (Triton's, jax's inner ones), for hardware
that a test suite on CPUs never sees. A wrong one would train on wrong numbers without a word, so each
is tried on a small input of the model's own head sizes, once per process; the cost is one small
compilation.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxagentrl.models import sharding


def agrees(
    name: str,
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: tuple[Any, ...],
    *,
    tolerance: float,
) -> bool:
    """Whether `kernel(*inputs)` runs and equals `reference(*inputs)`; warns with the reason if not.

    May be called while something else is traced, for a mesh too: both are compiled and executed apart from
    it, on one device.

    Args:
        inputs: numpy arrays, or trees of them.
        tolerance: largest difference, as a share of the largest absolute value of each result.
    """
    try:
        ours = _run(kernel, inputs)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        # What a kernel's compiler or an inner interface that has changed raises.
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    else:
        worst = max(map(_difference, jax.tree.leaves(ours), jax.tree.leaves(_run(reference, inputs))))
        if worst <= tolerance:
            return True
        reason = f"results differ by {worst:.2g} of their size, {tolerance:.2g} is allowed"
    warnings.warn(
        f"{name} is not used, the slower products are: on {jax.devices()[0].device_kind} with jax "
        f"{jax.__version__}, {reason}",
        stacklevel=2,
    )
    return False


def _run(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    def run() -> Any:
        return jax.device_get(jax.jit(function).lower(*inputs).compile()(*inputs))

    return sharding.outside(run)


def _difference(ours: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference as a share of the largest wanted value; infinite where ours is NaN."""
    ours, wanted = np.asarray(ours, np.float64), np.asarray(wanted, np.float64)
    worst = np.max(np.abs(ours - wanted)) / max(np.max(np.abs(wanted)), 1e-30)
    return float(worst) if np.isfinite(worst) else float("inf")
