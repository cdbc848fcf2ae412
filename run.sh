#!/usr/bin/env bash
# Starts the whole task service with one command, or runs its tests.
#
#   sudo bash run.sh                 with Docker if an engine answers, else natively
#   sudo bash run.sh --docker        five containers: rabbit, postgres, producer, two consumers
#   sudo bash run.sh --native        private servers in .run, in the foreground until Ctrl-C
#   sudo bash run.sh down            stop whichever runs; the data stays
#   sudo bash run.sh test [ARGS]     everything the tests need, then pytest ARGS
#   sudo bash run.sh bench [ARGS]    the same, then the benchmark
#
# PROJECT_ABSOLUTE_PATH is this folder unless set; HTTP_PORT is 8080 unless set. Settings come from
# the environment (sudo HANDLER=... bash run.sh) or from .env.
set -euo pipefail

PROJECT_ABSOLUTE_PATH=${PROJECT_ABSOLUTE_PATH:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
export PROJECT_ABSOLUTE_PATH

fail() {
  printf 'run.sh: %s\n' "$*" >&2
  exit 2
}

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

# The settings file of Compose and native/run.py gets the passwords that it lacks, and the cookie of a
# RabbitMQ cluster. Root made it for the user who called sudo.
make_env() {
  local name
  for name in POSTGRES_PASSWORD RABBITMQ_PASSWORD RABBITMQ_COOKIE; do
    if ! grep -qs "^$name=" .env; then
      if [ ! -f .env ]; then (umask 077 && : >.env) && own .env; fi
      # the first line may be the user's own, without an end
      if [ -n "$(tail -c 1 .env)" ]; then echo >>.env; fi
      printf '%s=%s\n' "$name" "$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')" >>.env
    fi
  done
  chmod 600 .env
}

own() {
  if [ -n "${SUDO_UID:-}" ]; then chown "$SUDO_UID:${SUDO_GID:-$SUDO_UID}" "$@"; fi
}

http_port() {
  local port=${HTTP_PORT:-}
  if [ -z "$port" ] && [ -f .env ]; then port=$(sed -n 's/^HTTP_PORT=//p' .env | tail -n 1); fi
  port=${port:-8080}
  port=${port//[\"\']/}
  if ! [[ $port =~ ^[0-9]{1,5}$ ]] || ((10#$port < 1 || 10#$port > 65535)); then
    fail "HTTP_PORT=$port is not valid: expected a number from 1 to 65535"
  fi
  echo "$port"
}

check_port() {
  if (: >"/dev/tcp/127.0.0.1/$HTTP_PORT") 2>/dev/null; then
    fail "port $HTTP_PORT is taken: set HTTP_PORT to a free one"
  fi
}

has_docker() {
  command -v docker >/dev/null && docker info >/dev/null 2>&1 &&
    docker compose version >/dev/null 2>&1
}

compose() {
  docker compose --project-directory "$PROJECT_ABSOLUTE_PATH" "$@"
}

# Prints a setting's value from the environment or .env, else $2.
setting() {
  local value=${!1:-}
  [ -n "$value" ] || value=$(sed -n "s/^$1=//p" .env | tail -n 1 | tr -d "\"'")
  echo "${value:-$2}"
}

# Compose cannot count: a worker process takes 10 MB and what the user's function needs.
fit_containers() {
  local workers stop
  workers=$(setting CONCURRENCY 1)
  stop=$(setting STOP_SECONDS 50)
  if [[ $workers =~ ^[0-9]{1,4}$ ]] && ((10#$workers > 30)); then
    CONSUMER_MEMORY=$(setting CONSUMER_MEMORY "$((256 + 25 * 10#$workers))m")
    export CONSUMER_MEMORY
  fi
  if [[ $stop =~ ^[0-9]{1,6}$ ]]; then
    STOP_GRACE_PERIOD=$(setting STOP_GRACE_PERIOD "$((10#$stop + 10))s")
    export STOP_GRACE_PERIOD
  fi
}

up_docker() {
  has_docker || fail 'expected a Docker engine with Compose v2; without one use run.sh --native'
  local address
  HTTP_PORT=$(http_port)
  export HTTP_PORT
  [ -n "$(compose ps --quiet producer 2>/dev/null)" ] || check_port
  # PostgreSQL keeps the password that it was made with.
  local volume=${COMPOSE_PROJECT_NAME:-tasks}_postgres
  if ! grep -qs '^POSTGRES_PASSWORD=' .env && docker volume inspect "$volume" >/dev/null 2>&1; then
    fail "the volume $volume is of an earlier checkout: bring its .env, or docker volume rm $volume"
  fi
  make_env
  fit_containers
  if ! compose up --build --detach --wait; then
    compose logs --tail 20 producer consumer >&2
    fail 'not everything became healthy, see above; stop the rest with run.sh down'
  fi
  address=http://127.0.0.1:$HTTP_PORT
  local curl=curl
  if [ -n "${API_TOKEN:-$(sed -n 's/^API_TOKEN=//p' .env)}" ]; then
    # shellcheck disable=SC2016 # to be expanded by who pastes it
    curl='curl -H "Authorization: Bearer $API_TOKEN"'
  fi
  cat <<TEXT

The console: $address/

The task service runs at $address.

  $curl -X POST $address/api/v1/create-task -d '{"text": "any text"}'
  $curl '$address/api/v1/get-task-data?taskId=<the taskId of the answer>'

Stop it with: sudo bash run.sh down
TEXT
}

# An interpreter with venv; a shim on the PATH may point to one that is not there.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
    if [ -n "$candidate" ] && "$candidate" -c '
import ensurepip, sys, venv
sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

# Packages must not start servers of their own: policy-rc.d forbids it, create_main_cluster too.
install_packages() {
  [ $# -eq 0 ] && return
  [ "$(id -u)" = 0 ] || fail "expected root to install $*: use sudo bash run.sh"
  command -v apt-get >/dev/null || fail "expected $* to be installed: only apt is known here"
  local policy=/usr/sbin/policy-rc.d clusters=/etc/postgresql-common/createcluster.conf
  if [ ! -e "$policy" ]; then
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
  fi
  if [ ! -e "$clusters" ]; then
    mkdir -p "${clusters%/*}"
    printf 'create_main_cluster = false\n' >"$clusters"
  fi
  printf 'installing %s\n' "$*" >&2
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq >&2 || fail 'apt-get update failed, see above'
  apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-confold "$@" >&2 ||
    fail "apt-get could not install $*, see above"
  if [ -n "$(trap -p EXIT)" ]; then # the policy is ours: one that was there before stays
    rm -f "$policy"
    trap - EXIT
  fi
  # Nor after the next boot: this service has servers of its own.
  if [[ " $* " = *' rabbitmq-server '* ]] && command -v systemctl >/dev/null; then
    systemctl disable rabbitmq-server epmd.socket >/dev/null 2>&1 || true
  fi
}

# Makes the environment .run/$1 of the requirements files that follow. Tests have their own: a
# service that runs beside them would lose its packages with a shared one.
prepare_native() {
  local missing=() python marker venv=.run/$1
  shift
  compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || missing+=(postgresql)
  compgen -G '/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin' >/dev/null || missing+=(rabbitmq-server)
  find_python >/dev/null || missing+=(python3 python3-venv)
  install_packages "${missing[@]}"
  python=$(find_python) || fail 'expected Python 3.11 or newer with venv'
  mkdir -p .run
  own .run
  marker=$venv/$({ cat "$@" && "$python" -V; } | cksum | tr ' ' -)
  if [ ! -e "$marker" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "${@/#/-r}" >&2
    touch "$marker"
  fi
}

# The console's tests drive a real browser. Ubuntu has it as a snap only: there they say what is missing.
prepare_browser() {
  local missing=()
  command -v chromium >/dev/null || missing+=(chromium)
  command -v chromedriver >/dev/null || missing+=(chromium-driver)
  if grep -qs '^ID=debian' /etc/os-release; then install_packages "${missing[@]}"; fi
}

# The tests put PgBouncer and HAProxy beside the service; neither is to run by itself after a boot.
prepare_peers() {
  local missing=() name
  for name in pgbouncer haproxy; do
    [ -x "/usr/sbin/$name" ] || missing+=("$name")
  done
  install_packages "${missing[@]}"
  if [ "${#missing[@]}" -gt 0 ] && command -v systemctl >/dev/null; then
    systemctl disable "${missing[@]}" >/dev/null 2>&1 || true
  fi
}

up_native() {
  HTTP_PORT=$(http_port)
  export HTTP_PORT
  make_env
  # A supervisor that runs has the port: native/run.py will say so.
  [ -d "/proc/$(cat .run/native.pid 2>/dev/null || echo none)" ] || check_port
  prepare_native venv requirements.txt
  exec .run/venv/bin/python -m native.run
}

down() {
  if has_docker && [ -f .env ]; then
    compose --profile observability down
  elif command -v docker >/dev/null && [ "$(id -u)" != 0 ] && ! docker info >/dev/null 2>&1; then
    fail 'the Docker engine lets only root in: use sudo bash run.sh down'
  fi
  if [ -x .run/venv/bin/python ]; then exec .run/venv/bin/python -m native.run down; fi
}

main() {
  local root="PROJECT_ABSOLUTE_PATH=$PROJECT_ABSOLUTE_PATH"
  cd "$PROJECT_ABSOLUTE_PATH" 2>/dev/null || fail "$root: no such folder"
  [ -f producer.py ] || fail "$root: expected producer.py there"
  local command=${1:-}
  case "$command" in
    '' | --docker | --native)
      [ $# -le 1 ] || fail "unexpected ${*:2}"
      if [ "$command" = --docker ] || { [ -z "$command" ] && has_docker; }; then
        up_docker
      else
        if [ -z "$command" ] && command -v docker >/dev/null; then
          echo 'no Docker engine with Compose v2 answers: starting natively' >&2
        fi
        up_native
      fi
      ;;
    down) down ;;
    test)
      prepare_native venv-test requirements.txt requirements-test.txt
      prepare_browser
      prepare_peers
      # Everything: mostly waiting, so side by side; each process has servers of its own.
      [ $# -gt 1 ] || set -- test --numprocesses=3
      exec .run/venv-test/bin/python -m pytest "${@:2}"
      ;;
    bench)
      prepare_native venv-test requirements.txt requirements-test.txt
      exec .run/venv-test/bin/python -m tests.benchmark "${@:2}"
      ;;
    -h | --help) usage ;;
    *)
      usage >&2
      fail "unknown command $command"
      ;;
  esac
}

main "$@"
