#!/usr/bin/env bash
# Builds the image of the consumer and pushes it to REGISTRY (localhost:5000 unless set).
#
#   sudo bash publish_consumer.sh [TAG]     TAG is `git describe` unless given
set -euo pipefail

PROJECT_ABSOLUTE_PATH=${PROJECT_ABSOLUTE_PATH:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
cd "$PROJECT_ABSOLUTE_PATH"
git=(git -c "safe.directory=$PROJECT_ABSOLUTE_PATH")  # under sudo the checkout is another user's
tag=${1:-$("${git[@]}" describe --tags --always --dirty 2>/dev/null || true)}
[ -n "$tag" ] || { echo "publish_consumer.sh: not a git checkout: expected a TAG" >&2; exit 2; }
docker info >/dev/null 2>&1 || { echo 'publish_consumer.sh: expected a Docker engine' >&2; exit 2; }

image=${REGISTRY:-localhost:5000}/tasks-consumer:$tag
docker build --file Dockerfile.consumer --tag "$image" .
docker push "$image" || { echo "publish_consumer.sh: expected a registry at ${image%%/*}" >&2; exit 2; }
echo "pushed $image"
