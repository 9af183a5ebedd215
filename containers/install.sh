#!/usr/bin/env bash
# Installs the harness from a checkout, for images: `bash install.sh CHECKOUT`. The Dockerfile and apptainer.def both run it.
set -euo pipefail
checkout=${1:?give the folder of the checkout}
# One command resolves everything: torch first or capped would pick a build without a matching torchvision.
python3 -m pip install --no-cache-dir --disable-pip-version-check "$checkout"
harness --version
harness list methods > /dev/null
