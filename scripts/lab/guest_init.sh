#!/bin/busybox sh
# Pid 1 of a lab guest's initramfs: inserts modules, then goes on with guest_main.sh, here or on a disk.
#   modules=NAME,NAME...     what to insert, dependencies included
#   root=/dev/NAME           the disk to go on from, writable unless there is the word "ro"; its driver is inserted too
# The kernel hands words it does not know to init as environment variables: $modules comes from there, root= does not.
# In a guest of an emulated host a new process costs tens of milliseconds: prefer the shell's own commands.

/bin/stamp A
export PATH=/bin HOME=/root TERM=${TERM:-vt100}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev

access=rw
read -r words </proc/cmdline
for word in $words; do
    case $word in
        root=*) export root=${word#root=} ;;
        ro) access=ro ;;
    esac
done

# /lib/modules/load has a line for each module: its name, then the files to insert in order.
wanted=",${modules:=button,evdev,pvpanic-mmio},${root:+virtio_pci,virtio_blk,crc32c_generic,ext4,}"
while read -r name files; do
    case $wanted in *",$name,"*) ;; *) continue ;; esac
    for file in $files; do
        [ -d "/sys/module/${file%.ko}" ] || insmod "/lib/modules/$file"
    done
done </lib/modules/load

if [ -n "$root" ]; then
    if ! mount -t ext4 -o "$access" "$root" /newroot; then
        echo "guest: $root cannot be mounted; this is the initramfs"
        exec sh
    fi
    for directory in dev proc sys; do mount --move /$directory /newroot/$directory; done
    exec switch_root /newroot /sbin/init
fi
. /sbin/init
