# For the login shell of a lab guest. busybox would ask pid 1 to power off, which here is a script: do it at once.
poweroff() { busybox poweroff -f; }
reboot() { busybox reboot -f; }
PS1='guest# '
echo "A kvmpy guest: busybox's commands are here. Leave with poweroff, or try reboot."
