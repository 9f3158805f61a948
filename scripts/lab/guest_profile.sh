# For the login shell of a lab guest. busybox would ask pid 1 to power off, which here is a script: do it at once.
leave() {
    [ -z "$root" ] || mount -o remount,ro /
    busybox "$1" -f
}
poweroff() { leave poweroff; }
reboot() { leave reboot; }
ip() { /bin/ip "$@"; } # iproute2's from the disk: the shell would take busybox's
PS1='guest# '
echo "A kvmpy guest: busybox's commands are here. Leave with poweroff, or try reboot."
