#!/bin/sh
# In an emulated host with NICs (hardware.py, which sets the variables): loads their drivers, makes virtual functions,
# puts the uplink into a bridge, and gives the third station its namespace.
set -eu

until_there() { # COMMAND...: what it prints, once it does
    tries=0
    until found=$("$@") && [ -n "$found" ]; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || { echo "lab: still nothing: $*" >&2; exit 1; }
        sleep 0.1
    done
    echo "$found"
}

interface() { # MAC: the name of the interface that has it
    for file in /sys/class/net/*/address; do
        [ "$(cat "$file")" != "$1" ] || basename "${file%/address}"
    done
}

all_functions() { # PF: the addresses of its virtual functions, once all are there
    set -- "$1"/virtfn*
    [ $# != "$vfs" ] || for function in "$@"; do basename "$(readlink "$function")"; done
}

for module in $modules; do modprobe "$module"; done

uplink=$(until_there interface "$uplink")
[ "$vfs" = 0 ] || pf=$(until_there interface "$pf")
# Of its uplink's address, and of that only: else it would have another's as soon as a guest's tap is a port too.
ip link add "$bridge" address "$(cat "/sys/class/net/$uplink/address")" type bridge
ip addr add "$bridge_address/24" dev "$bridge"
ip link set "$bridge" up
ip link set "$uplink" master "$bridge" up
if [ "$vfs" != 0 ]; then
    ip link set "$pf" up
    carrier=/sys/class/net/$pf/carrier pf=/sys/class/net/$pf/device
    # A virtual function's driver asks the PF's for its address, and gets no answer before that has a link.
    echo 0 >"$pf/sriov_drivers_autoprobe"
    echo "$vfs" >"$pf/sriov_numvfs"
    until_there grep 1 "$carrier" >/dev/null
    echo 1 >"$pf/sriov_drivers_autoprobe"
    for function in $(until_there all_functions "$pf"); do echo "$function" >/sys/bus/pci/drivers_probe; done
fi

name=$(until_there interface "$station_mac")
ip netns add "$station"
ip link set "$name" netns "$station"
ip -n "$station" addr add "$station_address/24" dev "$name"
ip -n "$station" link set lo up
ip -n "$station" link set "$name" up
