#!/usr/bin/env bash
# Builds the image of one service and pushes it to REGISTRY (localhost:5000 unless set).
#
#   sudo bash publish.sh producer|consumer|rabbit [TAG]     TAG is `git describe` unless given
set -euo pipefail

fail() {
  echo "publish.sh: $*" >&2
  exit 2
}

name=${1:-}
[[ $name =~ ^(producer|consumer|rabbit)$ ]] || fail 'expected producer, consumer or rabbit'
PROJECT_ABSOLUTE_PATH=${PROJECT_ABSOLUTE_PATH:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
cd "$PROJECT_ABSOLUTE_PATH" 2>/dev/null || fail "$PROJECT_ABSOLUTE_PATH: no such folder"
git=(git -c "safe.directory=$(pwd -P)")  # under sudo the checkout is another user's
tag=${2:-$("${git[@]}" describe --tags --always --dirty 2>/dev/null || true)}
[ -n "$tag" ] || fail 'not a git checkout: expected a TAG'
command -v docker >/dev/null || fail 'expected docker to be installed'
docker info >/dev/null 2>&1 || fail 'expected a running Docker engine'

image=${REGISTRY:-localhost:5000}/tasks-$name:$tag
docker build --file "Dockerfile.$name" --tag "$image" .
docker push "$image" || fail "not pushed: expected a registry at ${image%%/*} that lets you in"
echo "pushed $image"
