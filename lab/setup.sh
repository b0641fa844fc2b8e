#!/bin/bash
# Installs what this checkout needs and this machine lacks, and says what it does; a second run changes nothing.
#
#     lab/setup.sh [LIST...]
#
# - Debian packages: those in the lists, or in all (lab/*-packages.txt). Services that come with them are neither
#   started nor enabled.
# - .venv, from Debian's own Python whichever comes first in PATH, with criproxy installed to be edited.
# - .build/criu: Debian 13's CRIU, unpacked, on a Debian 12.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .build
lists=("$@")
[ $# != 0 ] || lists=(lab/*-packages.txt)
log=$PWD/.build/setup.log

say() { echo "set-up: $*"; }
die() { echo "set-up: $*" >&2; exit 1; }

# quiet COMMAND...: its output goes to the log, and to the terminal if it fails.
quiet() {
    echo "+ $*" >>"$log"
    "$@" >"$log.step" 2>&1 || { cat "$log.step" >&2; die "failed: $*"; }
    cat "$log.step" >>"$log"
}

# --- Debian packages -------------------------------------------------------------------------------------------

installed() { [ "$(dpkg-query --show --showformat '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

missing_packages() {
    local line package since
    while read -r line; do
        read -r package since <<<"${line%%#*}"
        if [ -z "$package" ] || [ "${VERSION_ID:-99}" -lt "${since:-0}" ]; then continue; fi
        installed "${package%|*}" || installed "${package#*|}" || echo "${package%|*}"
    done < <(cat "${lists[@]}")
}

# Debian asks this program before it starts, stops or restarts any service.
policy=/usr/sbin/policy-rc.d
forbid_services='#!/bin/sh
# Made by the set-up of criproxy while it installs packages; it takes it away again.
exit 101'

install_packages() {
    [ "$(id -u)" = 0 ] || die "these Debian packages are missing, and installing them takes root: $*"
    command -v apt-get >/dev/null || die "this is no Debian; install the likes of: $*"
    local before after run=() options=(-q -y --no-install-recommends --no-upgrade -o DPkg::Lock::Timeout=600)
    export DEBIAN_FRONTEND=noninteractive
    say "installs $# Debian packages: $*"
    before=$(dpkg-query --show --showformat '${Package}\n')
    # One of ours that a killed run left behind counts as absent.
    if [ ! -e $policy ] || [ "$(cat $policy)" = "$forbid_services" ]; then
        trap 'rm -f $policy' EXIT
        trap 'exit 1' INT TERM HUP
        echo "$forbid_services" >$policy
        chmod +x $policy
    else
        # The machine has one of its own: ours takes its place for these commands only.
        echo "$forbid_services" >.build/policy-rc.d
        chmod +x .build/policy-rc.d
        # shellcheck disable=SC2016
        run=(unshare --mount --propagation private sh -c 'mount --bind "$0" "$1" && shift && exec "$@"'
            "$PWD/.build/policy-rc.d" $policy)
    fi
    quiet apt-get -q update
    quiet "${run[@]}" apt-get "${options[@]}" install "$@"
    after=$(dpkg-query --show --showformat '${Package}\n')
    disable_services "$(comm -13 <(sort <<<"$before") <(sort <<<"$after"))"
    if [ ${#run[@]} = 0 ]; then
        rm -f $policy
        trap - EXIT INT TERM HUP
    fi
}

# What came with the packages (NAMES, a line each) mustn't start at the next boot either.
disable_services() {
    local package file
    for package in $1; do
        for file in $(dpkg-query --listfiles "$package"); do
            case $file in
                */lib/systemd/system/*@*) ;;
                */lib/systemd/system/*.service | */lib/systemd/system/*.socket | */lib/systemd/system/*.timer)
                    DPKG_MAINTSCRIPT_PACKAGE=$package quiet deb-systemd-helper disable "$(basename "$file")"
                    ;;
                /etc/init.d/*) if [ -x /usr/sbin/update-rc.d ]; then quiet update-rc.d "$(basename "$file")" disable; fi ;;
            esac
        done
    done
}

# --- Python ----------------------------------------------------------------------------------------------------

python=/usr/bin/python3

hash_of() { sha256sum "$@" | sha256sum | cut -d ' ' -f 1; }

set_up_python() {
    local version stamp build
    version=$($python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ ! -d ".venv/lib/python$version" ] || [ ! .venv/bin/python -ef $python ]; then
        say "makes .venv with Python $version"
        rm -rf .venv
        quiet $python -m venv .venv
    fi
    stamp="$(hash_of pyproject.toml) $PWD"
    if [ "$(cat .venv/.set-up 2>/dev/null)" != "$stamp" ]; then
        say "installs Python packages into .venv"
        # First what the build needs, so that it takes place right here: an isolated build would fetch it each time.
        mapfile -t build < <($python -c '
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], "wheel", sep="\n")')
        quiet .venv/bin/python -m pip install --quiet "${build[@]}"
        quiet .venv/bin/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
        echo "$stamp" >.venv/.set-up
    fi
    # Looks at each file's time, and makes what is older than its sources.
    quiet .venv/bin/python setup.py --quiet artefacts
}

# --- CRIU ------------------------------------------------------------------------------------------------------

set_up_criu() {
    if [ "${VERSION_ID:-99}" -ge 13 ] || [ -d .build/criu ]; then return; fi
    say "fetches CRIU from Debian 13 (trixie), beside this machine's own"
    quiet .venv/bin/python -c 'from pathlib import Path
from criproxy.criu.bundle import SUITE, download
download(SUITE, Path(".build/criu").absolute())'
}

[ -r /etc/os-release ] && . /etc/os-release
exec 9>.build/setup.lock
flock 9
: >"$log"
began=$SECONDS
mapfile -t missing < <(missing_packages)
if [ ${#missing[@]} != 0 ]; then install_packages "${missing[@]}"; fi
set_up_python
set_up_criu
rm -f "$log.step"
if [ $((SECONDS - began)) -gt 5 ]; then say "done after $((SECONDS - began)) s"; fi
