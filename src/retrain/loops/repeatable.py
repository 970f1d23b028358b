"""What else the bits of a run depend on, besides its config and its data."""

from __future__ import annotations

import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from torch.backends.cpu import get_cpu_capability

from retrain.version import __version__


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Seed the generators that Python, NumPy and torch share out to everybody, which the run itself
    does not draw from but a user's functions may; and let torch use deterministic algorithms only,
    where there is no accelerator, which could lack them.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    before = torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    if not torch.cuda.is_available():
        # As use_deterministic_algorithms(True), which takes two seconds to import a compiler.
        torch.set_deterministic_debug_mode("error")
        settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        settings.fill_uninitialized_memory = filled


def circumstances() -> dict[str, object]:
    """What has to be equal for equal bits, and is not in the config."""
    return {
        "retrain": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.system()} {platform.machine()} {get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }
