#!/bin/busybox sh
# Write garbage into a live ring of this guest, with nothing but busybox and lspci.
#   garble VICTIM QUEUE RNG PAGES     functions as 01:00.0, the number of a queue, the address of three free pages
# The virtio-rng device RNG is taken from its driver and driven by hand: its buffer is the available ring of VICTIM's
# queue, which it fills with random bytes. (Not the descriptors: Linux reads their flags again, and would be lost itself.)
# Registers and pages are reached through /dev/mem, so the guest boots with iomem=relaxed, and with mem= below PAGES.
set -e
victim=$1 queue=$2 rng=$3 pages=$(($4))
descriptors=$pages available=$((pages + 0x1000)) used=$((pages + 0x2000))

get() { echo $(($(devmem $(($1)) "$2"))); }                 # ADDRESS BITS
put() { devmem $(($1)) "$2" $(($3)); }                      # ADDRESS BITS VALUE
put_address() { put "$1" 32 "$2"; put "$1 + 4" 32 0; }      # 64-bit registers are written by halves
device_of() { echo "/sys/bus/pci/devices/0000:$1"; }

find_registers() { # FUNCTION CAPABILITY: sets $registers and $multiplier
    set -- "$1" $(lspci -vvns "$1" 2>/dev/null | grep -A1 "VirtIO: $2" | tr '=' ' ' | tail -n 1)
    # now: FUNCTION "BAR" number "offset" number "size" number ["multiplier" number]
    registers=$(($(sed -n "$(($3 + 1))s/ .*//p" "$(device_of "$1")/resource") + 0x$5)) multiplier=$((0x${9:-0}))
}

# The common configuration of virtio 1.2, section 4.1.4.3
feature_select=8 feature=12 status=20 queue_select=22 queue_size=24
queue_vector=26 queue_enable=28 queue_notify_off=30 queue_desc=32 queue_driver=40 queue_device=48
started=15 features_ok=11 driver=3 acknowledge=1 # values of the status
writable=2                                       # flag of a descriptor

find_registers "$victim" CommonCfg
put "registers + queue_select" 16 "$queue"
size=$(get "registers + queue_size" 16)
low=$(get "registers + queue_driver" 32) high=$(get "registers + queue_driver + 4" 32)

put "descriptors" 64 "high << 32 | low"
put "descriptors + 8" 64 "writable << 32 | (4 + 2 * size)"
put "available" 64 "1 << 16" # no flags, index 1, and the first entry is descriptor 0
put "used" 32 0

for virtio in "$(device_of "$rng")"/virtio*; do echo "${virtio##*/}" >/sys/bus/virtio/drivers/virtio_rng/unbind; done
find_registers "$rng" CommonCfg
for value in 0 acknowledge driver; do put "registers + status" 8 $value; done
put "registers + feature_select" 32 1 # the second word, whose first bit is VERSION_1
put "registers + feature" 32 1
put "registers + status" 8 features_ok
put "registers + queue_select" 16 0
put "registers + queue_size" 16 8
put "registers + queue_vector" 16 0xffff
put_address "registers + queue_desc" descriptors
put_address "registers + queue_driver" available
put_address "registers + queue_device" used
put "registers + queue_enable" 16 1
put "registers + status" 8 started
[ "$(get "registers + status" 8)" = $started ]
offset=$(get "registers + queue_notify_off" 16)
find_registers "$rng" Notify
put "registers + offset * multiplier" 16 0
while [ "$(get "used" 32)" != 65536 ]; do :; done # index 1: the bytes are there
echo "garbled queue $queue of $victim"
