#!/bin/sh
# The preStop hook of a pod with a Docker daemon that is one of a dindpool: it returns when nothing of a session runs on
# the daemon any more, and TERM follows. It runs in the daemon's container (busybox will do), within the pod's
# terminationGracePeriodSeconds:
#
#   lifecycle: {preStop: {exec: {command: [sh, /etc/dindpool/prestop.sh]}}}
#
# It asks the pool, which knows of builds, containers and what is just being sent. Without an answer (no pool, not its
# token, one that has just started) it goes by what it sees itself: established connections to the daemon's port, and
# processes of its containers and builds. None for PRESTOP_QUIET seconds in a row is the end, too.
#
#   DINDPOOL_PRESTOP_URL         where the pool listens for this (--prestop), http://dindpool.ci.svc:9376; without one
#                                the hook goes by what it sees
#   DINDPOOL_PRESTOP_TOKEN_FILE  the token of --prestop-token-file, /etc/dindpool/prestop-token
#   POD_NAME                     the pod's name, from the downward API; without it the host name
#   DOCKER_PORT                  the daemon's port, 2375
#   PRESTOP_QUIET                seconds, 10

set -u
url=${DINDPOOL_PRESTOP_URL:-}
token_file=${DINDPOOL_PRESTOP_TOKEN_FILE:-/etc/dindpool/prestop-token}
pod=${POD_NAME:-$(hostname)}
port=$(printf '%04X' "${DOCKER_PORT:-2375}")
quiet=${PRESTOP_QUIET:-10}
# The pool is no matter for a proxy of the web.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

# Into the log of the pod: what a hook prints is shown only if it fails.
say() {
    line="preStop: $*"
    # Not the same line each second.
    [ "$line" != "${said:-}" ] || return 0
    said=$line
    { echo "$line" >/proc/1/fd/2; } 2>/dev/null || echo "$line" >&2
}

# ask sets `answer`: drained, busy, or why there is none. The pool answers when there is something to tell.
ask() {
    answer="no DINDPOOL_PRESTOP_URL is set"
    [ -n "$url" ] || return
    token=
    { read -r token <"$token_file"; } 2>/dev/null
    if [ -z "$token" ]; then
        answer="$token_file cannot be read or is empty"
        return
    fi
    # Not `wget -T`: that of a static busybox dies of it. Not through a pipe: the exit status would be that of its end.
    told=$(timeout 40 wget -q -O - --header "Authorization: Bearer $token" "$url/drained/$pod" 2>&1)
    status=$?
    case "$status $told" in
    "0 drained"*) answer=drained ;;
    *" 409 "* | *" 409") answer=busy ;;
    *) answer="the pool does not answer: $(echo "$told" | tail -n 1)" ;;
    esac
}

# Whether a connection to the daemon's port is established (state 01).
connected() {
    cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | while read -r _ local _ state _; do
        case "$local $state" in
        *:"$port 01") echo yes && break ;;
        esac
    done | grep -q yes
}

# Whether a container runs (each has a shim) or a step of a build (a runc).
running() {
    for file in /proc/[0-9]*/comm; do
        name=
        { read -r name <"$file"; } 2>/dev/null
        case "$name" in
        containerd-shim* | runc) return 0 ;;
        esac
    done
    return 1
}

still=0
while :; do
    ask
    case "$answer" in
    drained)
        say "nothing of a session runs on this daemon any more"
        exit 0
        ;;
    busy)
        say "a session works on this daemon: waiting"
        still=0
        # It has waited long enough to answer.
        sleep 1
        continue
        ;;
    esac
    say "$answer; waiting until nobody is connected and nothing runs"
    # Some looks before the pool is asked again.
    for _ in 1 2 3; do
        if connected || running; then still=0; else still=$((still + 1)); fi
        if [ "$still" -ge "$quiet" ]; then
            say "nobody has been connected and nothing has run for $quiet s"
            exit 0
        fi
        sleep 1
    done
done
