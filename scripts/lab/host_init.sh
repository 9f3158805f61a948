#!/bin/busybox sh
# Pid 1 of an emulated host's initramfs: makes the outside machine's / the root, then runs its arguments there as pid 1.
# The kernel hands us lab_checkout= and lab_modules= from its command line as environment variables (paths outside).

PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r file; do insmod "/lib/modules/$file" || echo "lab: $file cannot be inserted"; done </lib/modules/load

# cache=loose: what is read once is not asked for again. The outside is not expected to change under a running host.
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=1048576,cache=loose outside /outside
mount -t tmpfs -o mode=755 tmpfs /overlay
mkdir /overlay/upper /overlay/work
mount -t overlay -o lowerdir=/outside,upperdir=/overlay/upper,workdir=/overlay/work overlay /root

mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /root/run
# A checkout below /tmp must stay visible; writes there go to the overlay like all others.
case $lab_checkout in /tmp/*) ;; *) mount -t tmpfs -o mode=1777 tmpfs /root/tmp ;; esac
mkdir -p /root/lib/modules /root/scratch
mount -t ext4 -o noatime /dev/vda /root/scratch
for directory in "/root$lab_modules"/*; do ln -s "${directory#/root}" /root/lib/modules/; done # for modprobe

hostname kvmpy-lab
ifconfig lo up
echo 1 >/proc/sys/kernel/panic_on_oops # a host that oopsed proves nothing: better gone, with its console kept
for directory in dev proc sys; do mount --move /$directory /root/$directory; done
exec switch_root /root "$@"
