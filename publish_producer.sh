#!/usr/bin/env bash
# Builds the image of the producer and pushes it to REGISTRY (localhost:5000 unless set).
#
#   sudo bash publish_producer.sh [TAG]     TAG is `git describe` unless given
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/publish.sh" producer "$@"
