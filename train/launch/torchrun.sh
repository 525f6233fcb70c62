#!/usr/bin/env bash
# Train on every GPU of this machine (GPUS=n: on n of them). Run it again to resume.
#   train/launch/torchrun.sh pMF-B/16 runs/b16 --data data/imagenet256
set -euo pipefail
preset=${1:?expected PRESET OUT [options]} out=${2:?expected PRESET OUT [options]}
shift 2
if compgen -G "$out/checkpoints/step-*" > /dev/null; then
    run=(--resume "$out")
else
    run=("$preset" --out "$out")
fi
# torchrun forwards these signals to the processes, which save and exit; it kills them after this many seconds.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2,SIGXCPU TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300
exec python -m torch.distributed.run --standalone --nproc-per-node "${GPUS:-gpu}" -m pmf.train train "${run[@]}" "$@"
