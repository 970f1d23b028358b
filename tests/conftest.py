"""One thread, nothing from the network, no display: set before any test module imports torch."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
    }
)

settings.register_profile("retrain", deadline=None)
settings.load_profile("retrain")

LISTEN_TO_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""First line of a child process that is to be interrupted: a shell's background jobs, and so the
tests in one, ignore SIGINT and hand that down."""
