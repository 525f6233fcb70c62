#!/usr/bin/env bash
# Train on every GPU of this machine (GPUS=n: on n of them); called again, continue.
#   train/launch/torchrun.sh pMF-B/16 runs/b16 --data data/imagenet256
set -euo pipefail
preset=$1 out=$2
shift 2
if compgen -G "$out/checkpoints/step-*" > /dev/null; then
    run=(--resume "$out")
else
    run=("$preset" --out "$out")
fi
exec python -m torch.distributed.run --standalone --nproc-per-node "${GPUS:-gpu}" -m pmf.train train "${run[@]}" "$@"
