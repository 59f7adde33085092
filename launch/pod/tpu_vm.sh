#!/usr/bin/env bash
# The main job on every host of a Cloud TPU slice; JAX finds the hosts by the metadata server.
#
#   TPU=my-v5e-16 ZONE=us-west4-a launch/pod/tpu_vm.sh setup https://github.com/OWNER/sparselora-jax
#   TPU=my-v5e-16 ZONE=us-west4-a launch/pod/tpu_vm.sh run --config=configs/llava_lang_only.py:model=... \
#       --workdir=/mnt/shared/runs/llava --config.mesh.data=16
#
# The workdir must lie on a file system that all hosts have mounted (Filestore, or a bucket by gcsfuse). Credentials are
# those of gcloud on this machine, and of the service account on the hosts: none is written anywhere.
set -euo pipefail
: "${TPU:?the name of the slice}" "${ZONE:?its zone}"

on_every_host() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
setup)
    repository=${2:?the repository to clone}
    on_every_host "git clone $(printf %q "$repository") sparselora-jax && cd sparselora-jax && make .venv/installed && \
        .venv/bin/pip install -r requirements-tpu.txt"
    ;;
run)
    shift
    on_every_host "cd sparselora-jax && .venv/bin/python launch/train.py --distributed $(printf '%q ' "$@")"
    ;;
*)
    echo "usage: TPU=NAME ZONE=ZONE $0 setup REPOSITORY | run FLAGS OF launch/train.py" >&2
    exit 2
    ;;
esac
