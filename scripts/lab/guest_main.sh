#!/bin/busybox sh
# /sbin/init of a lab guest, in its initramfs and on its root disk: says that it is up, then does what the kernel command
# line asks for.
#   mode=shell (default) | poweroff | reboot | panic      what to do once up
#   address=ADDRESS/BITS                                  for eth0, which has none without it

leave() {
    [ -z "$root" ] || mount -o remount,ro /
    busybox "$1" -f
}

# The power button's input device reports nothing but presses: the first record is one. It is opened here and not in
# the child, so that a press after the line below is never lost.
for input in /sys/class/input/event*; do
    [ -e "$input" ] && read -r name <"$input/device/name" && [ "$name" = "Power Button" ] || continue
    exec 3<"/dev/input/${input##*/}"
    { dd bs=24 count=1 <&3 >/dev/null 2>&1 && leave poweroff; } &
    exec 3<&-
    break
done

[ -z "$root" ] || mount -t tmpfs tmp /tmp
[ -z "$address" ] || { busybox ip address add "$address" dev eth0 && busybox ip link set eth0 up; }
read -r kernel </proc/sys/kernel/osrelease
read -r online </sys/devices/system/cpu/online # "0-3": none is unplugged yet
read -r clocksource </sys/devices/system/clocksource/clocksource0/current_clocksource
read -r uptime idle </proc/uptime
echo "KVMPY-GUEST UP kernel=$kernel cpus=$((${online##*-} + 1)) uptime=$uptime clocksource=$clocksource${root:+ root=$root}"
/bin/stamp B

case ${mode:=shell} in
    poweroff | reboot) leave "$mode" ;;
    panic) echo c >/proc/sysrq-trigger ;;
esac
while :; do setsid cttyhack sh -l || sleep 1; done
