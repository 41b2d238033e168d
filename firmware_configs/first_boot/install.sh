#!/bin/sh
# Installs bmoe's agent on this board, from the folder that this file lies in. Run by root at the first boot, by
# bmoe-first-boot.service, again and again until it has worked. Everything in it may be done twice.
#   sh install.sh            install, then switch the first-boot service off
#   sh install.sh --enable   only have the service do it: for first boots where there is no network yet
set -eu
here=$(cd "$(dirname "$0")" && pwd)
board=@BOARD@
place=/opt/bmoe

say() { echo "bmoe first boot: $*"; }

if [ "${1:-}" = --enable ]; then
    install -m 644 "$here/bmoe-first-boot.service" /etc/systemd/system/bmoe-first-boot.service
    mkdir -p /etc/systemd/system/multi-user.target.wants
    ln -sf ../bmoe-first-boot.service /etc/systemd/system/multi-user.target.wants/bmoe-first-boot.service
    if [ -d /run/systemd/system ] && [ "${2:-}" = --now ]; then
        systemctl daemon-reload
        systemctl start --no-block bmoe-first-boot.service
    fi
    say "the agent will be installed"
    exit 0
fi

# A public key for the first user, where the system has no way of its own to be given one.
if [ -f "$here/authorized_keys" ]; then
    user=$(getent passwd 1000 | cut -d: -f1)
    home=$(getent passwd 1000 | cut -d: -f6)
    if [ -n "$user" ] && [ -d "$home" ]; then
        install -d -m 700 -o "$user" -g "$(id -gn "$user")" "$home/.ssh"
        touch "$home/.ssh/authorized_keys"
        grep -qxFf "$here/authorized_keys" "$home/.ssh/authorized_keys" ||
            cat "$here/authorized_keys" >> "$home/.ssh/authorized_keys"
        chown "$user:$(id -gn "$user")" "$home/.ssh/authorized_keys"
        chmod 600 "$home/.ssh/authorized_keys"
    fi
fi

# What a power cut leaves of an installation may be files without content, which pip takes for installed.
if [ -e "$place/unfinished" ]; then
    rm -rf "$place"
fi
if [ ! -x "$place/bin/bmoe-agent" ]; then
    mkdir -p "$place"
    : > "$place/unfinished"
    sync
    if ls "$here"/wheels/pip-*.whl > /dev/null 2>&1; then
        # A wheel of pip runs as it is: neither network nor the package python3-venv is needed.
        python3 -m venv --without-pip "$place"
        pip="$place/bin/python $(ls "$here"/wheels/pip-*.whl | tail -n 1)/pip"
    else
        python3 -c 'import ensurepip, venv' 2> /dev/null || { apt-get update && apt-get install -y python3-venv; }
        python3 -m venv "$place"
        pip="$place/bin/python -m pip"
    fi
    # Our own wheel by its file, never by its name: what an index has under that name is not ours, and would run as root.
    own=$(ls "$here"/wheels/bmoe-*.whl | tail -n 1)
    say "installing from the card"
    $pip install --no-compile --no-index --find-links "$here/wheels" "$own[agent]" || {
        say "the card has not all of it: fetching the rest"
        $pip install --no-compile --find-links "$here/wheels" "$own[agent]" || {
            rm -f "$place/unfinished"  # pip takes back what it cannot finish, and has told why
            exit 1
        }
    }
    sync
    rm -f "$place/unfinished"
fi

# Bytecode of what the agent imports alone: that of all of numpy and onnxruntime takes minutes, and is never read.
"$place/bin/python" -c 'import edge_agent.service, bmoe.inference.worker'

# Takes settings, clock and token; the token is then destroyed here. Enables and starts the agent.
"$place/bin/bmoe-agent" install --from "$here" --board "$board"
rm -f /etc/systemd/system/multi-user.target.wants/bmoe-first-boot.service
say "done"
