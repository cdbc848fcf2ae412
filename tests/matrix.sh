#!/usr/bin/env bash
# Runs tests in one cell of the versions' matrix: a container of Debian's packages, whose only network
# is its loopback. Without PYTEST ARGS these are the tests of what the README promises.
#
#   bash tests/matrix.sh RABBITMQ POSTGRESQL PYTHON [PYTEST ARGS]
#   bash tests/matrix.sh 4.0 17 3.13
#   bash tests/matrix.sh 3.10 15 3.11 tests/test_cluster.py
#
# RABBITMQ is 3.10 or 4.0, POSTGRESQL 15 or 17, PYTHON 3.11 or 3.13. pip gets the environment's PIP_CERT,
# PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_TRUSTED_HOST, apt the sources of the image debian:trixie-slim.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  printf 'matrix.sh: %s\n' "$*" >&2
  exit 2
}

usage='expected RabbitMQ 3.10 or 4.0, PostgreSQL 15 or 17, Python 3.11 or 3.13'
[[ ${*:1:3} =~ ^(3\.10|4|4\.0)\ (15|17)\ 3\.1(1|3)$ ]] || fail "$usage, not ${*:1:3}"
rabbitmq=$1 postgresql=$2 python=$3
shift 3
# What the servers and Python decide, but for the longest: four minutes on two busy cores.
chosen='not (test_faults or test_leases or test_producer or protocol or dead_entries)'
chosen+=' or broker or killed or database or connection or array'
[ $# -gt 0 ] || set -- --numprocesses=3 --chaos-seed=7 --chaos-seconds=20 -k "$chosen" \
  tests/test_{chaos,faults,end_to_end,dispatcher,leases,producer,schema,upgrade,workers}.py

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
cp requirements.txt requirements-test.txt tests/Dockerfile.matrix "$context"
cp "${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}" "$context/ca-certificates.crt"

image=tasks-matrix:$rabbitmq-$postgresql-$python
docker build --quiet --tag "$image" --file "$context/Dockerfile.matrix" \
  --build-arg RABBITMQ="$rabbitmq" --build-arg POSTGRESQL="$postgresql" --build-arg PYTHON="$python" \
  --build-arg PIP_CERT=/ca-certificates.crt --build-arg PIP_INDEX_URL \
  --build-arg PIP_EXTRA_INDEX_URL --build-arg PIP_TRUSTED_HOST "$context" >/dev/null

cell() {
  docker run --rm --init --network none --shm-size 1g --volume "$PWD:/tasks:ro" --workdir /tasks \
    "$image" "$@"
}
cell dpkg-query --show rabbitmq-server erlang-base "postgresql-$postgresql" "python$python"
cell python -m pytest -p no:cacheprovider "$@"
