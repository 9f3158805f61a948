#!/bin/busybox sh
# Pid 1 of a lab guest: says that it is up, then does what the kernel command line asks for.
#   mode=shell (default) | poweroff | reboot | panic      what to do once up
#   modules=NAME,NAME...                                  what to insert, dependencies included
# The kernel hands words it does not know to init as environment variables: $mode and $modules come from there.
# In a guest of an emulated host a new process costs tens of milliseconds: prefer the shell's own commands.

/bin/stamp A
export PATH=/bin HOME=/root TERM=${TERM:-vt100}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev

# /lib/modules/load has a line for each module: its name, then the files to insert in order.
wanted=",${modules:=button,evdev,pvpanic-mmio},"
while read -r name files; do
    case $wanted in *",$name,"*) ;; *) continue ;; esac
    for file in $files; do
        [ -d "/sys/module/${file%.ko}" ] || insmod "/lib/modules/$file"
    done
done </lib/modules/load

# The power button's input device reports nothing but presses: the first record is one. It is opened here and not in
# the child, so that a press after the line below is never lost.
for input in /sys/class/input/event*; do
    [ -e "$input" ] && read -r name <"$input/device/name" && [ "$name" = "Power Button" ] || continue
    exec 3<"/dev/input/${input##*/}"
    { dd bs=24 count=1 <&3 >/dev/null 2>&1 && poweroff -f; } &
    exec 3<&-
    break
done

read -r kernel </proc/sys/kernel/osrelease
read -r online </sys/devices/system/cpu/online # "0-3": none is unplugged yet
read -r clocksource </sys/devices/system/clocksource/clocksource0/current_clocksource
read -r uptime idle </proc/uptime
echo "KVMPY-GUEST UP kernel=$kernel cpus=$((${online##*-} + 1)) uptime=$uptime clocksource=$clocksource"
/bin/stamp B

case ${mode:=shell} in
    poweroff) poweroff -f ;;
    reboot) reboot -f ;;
    panic) echo c >/proc/sysrq-trigger ;;
esac
while :; do setsid cttyhack sh -l || sleep 1; done
