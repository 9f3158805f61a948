/* The few things Python cannot do itself (docs/adr/0001). cffi releases the GIL around every call, and that is the point of
 * kvmpy_run. Every function returns a negative errno where it fails: errno itself would be lost on the way. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "compat.h"

enum { KVMPY_RARE, KVMPY_PIO_WRITE, KVMPY_PIO_READ, KVMPY_MMIO_WRITE, KVMPY_MMIO_READ, KVMPY_INTERRUPTED };

/* kvmpy/latch.py: `word` is the value, and above it what of it C answers, so that one access has both. `heard` has a bit
 * for each value of a byte. */
enum { KVMPY_READS = 1, KVMPY_STORES = 2 };
struct kvmpy_latch {
    uint32_t offset, size, mask;
    uint64_t word, heard[4];
};

/* kvmpy/bus.py: [base, end), by rising address. */
struct kvmpy_window {
    uint64_t base, end;
    struct kvmpy_latch **latches;
    uint32_t count;
};

/* Whoever swaps the table or follows it holds the lock, so that a window or a latch is not freed under a vCPU's hands. */
struct kvmpy_bus {
    pthread_mutex_t lock;
    struct kvmpy_window *windows;
    uint32_t count;
};

/* A vCPU and its last exit: of an access where it goes, how many bytes, and their value, which of a read Python sets.
 * The accesses so far are counted, those that C has answered too. */
struct kvmpy_vcpu {
    uint32_t kind, size;
    uint64_t addr, value;
    uint64_t pio_exits, mmio_exits;
    struct kvm_run *run;
    struct kvmpy_bus *pio, *mmio;
    int fd;
};

/* Off while somebody traces a bus. */
int kvmpy_answering = 1;

static long kvmpy_ioctl(int fd, unsigned long request, void *argument)
{
    int result = ioctl(fd, request, argument);
    return result < 0 ? -(long)errno : result;
}

static void answer_read(struct kvmpy_vcpu *v)
{
    struct kvm_run *run = v->run;
    if (v->kind == KVMPY_PIO_READ)
        memcpy((char *)run + run->io.data_offset, &v->value, v->size);
    else if (v->kind == KVMPY_MMIO_READ)
        memcpy(run->mmio.data, &v->value, v->size);
    v->kind = KVMPY_RARE;
}

/* The two exits that come by the thousand, as one record, so that Python reads it at one go. An access that repeats (INS,
 * OUTS) is rare. */
static void decode_access(struct kvmpy_vcpu *v)
{
    struct kvm_run *run = v->run;
    v->value = 0;
    v->pio_exits += run->exit_reason == KVM_EXIT_IO;
    v->mmio_exits += run->exit_reason == KVM_EXIT_MMIO;
    if (run->exit_reason == KVM_EXIT_IO && run->io.count == 1 && run->io.size <= sizeof v->value) {
        int is_in = run->io.direction == KVM_EXIT_IO_IN;
        v->kind = is_in ? KVMPY_PIO_READ : KVMPY_PIO_WRITE;
        v->size = run->io.size;
        v->addr = run->io.port;
        if (!is_in)
            memcpy(&v->value, (char *)run + run->io.data_offset, v->size);
    } else if (run->exit_reason == KVM_EXIT_MMIO && run->mmio.len <= sizeof v->value) {
        v->kind = run->mmio.is_write ? KVMPY_MMIO_WRITE : KVMPY_MMIO_READ;
        v->size = run->mmio.len;
        v->addr = run->mmio.phys_addr;
        if (run->mmio.is_write)
            memcpy(&v->value, run->mmio.data, v->size);
    }
}

static void kvmpy_bus_open(struct kvmpy_bus *bus)
{
    pthread_mutex_init(&bus->lock, NULL);
}

/* From its return on nobody looks at the windows before. */
static void kvmpy_bus_swap(struct kvmpy_bus *bus, struct kvmpy_window *windows, uint32_t count)
{
    pthread_mutex_lock(&bus->lock);
    bus->windows = windows;
    bus->count = count;
    pthread_mutex_unlock(&bus->lock);
}

/* The last window that begins at `addr` or below, if all of the access is in it. */
static const struct kvmpy_window *find_window(const struct kvmpy_bus *bus, uint64_t addr, uint32_t size)
{
    uint32_t low = 0, high = bus->count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (bus->windows[middle].base <= addr)
            low = middle + 1;
        else
            high = middle;
    }
    const struct kvmpy_window *window = low ? &bus->windows[low - 1] : NULL;
    return window && addr < window->end && size <= window->end - addr ? window : NULL;
}

static int answered_by(struct kvmpy_latch *latch, int is_write, uint64_t *value)
{
    uint64_t word = __atomic_load_n(&latch->word, __ATOMIC_ACQUIRE);
    uint32_t answers = word >> 32;
    if (!is_write) {
        *value = (uint32_t)word;
        return answers & KVMPY_READS;
    }
    uint32_t wanted = *value & latch->mask;
    if (!(answers & KVMPY_STORES) && !(latch->size == 1 && latch->heard[wanted >> 6] >> (wanted & 63) & 1))
        return 0;
    return __atomic_compare_exchange_n(&latch->word, &word, (uint64_t)answers << 32 | wanted, 0, __ATOMIC_ACQ_REL,
                                       __ATOMIC_ACQUIRE);
}

/* Whether the last exit was an access of which no device has to hear: of an address that nobody has, which reads as all
 * ones, or of a latch that says so. */
static int kvmpy_answered(struct kvmpy_vcpu *v)
{
    int is_pio = v->kind == KVMPY_PIO_WRITE || v->kind == KVMPY_PIO_READ;
    int is_write = v->kind == KVMPY_PIO_WRITE || v->kind == KVMPY_MMIO_WRITE;
    struct kvmpy_bus *bus = is_pio ? v->pio : v->mmio;
    if (v->kind == KVMPY_RARE || !bus || !__atomic_load_n(&kvmpy_answering, __ATOMIC_RELAXED))
        return 0;
    int done;
    pthread_mutex_lock(&bus->lock);
    const struct kvmpy_window *window = find_window(bus, v->addr, v->size);
    if (!window && !is_write)
        v->value = ~(uint64_t)0;
    done = !window;
    for (uint32_t at = 0; window && !done && at < window->count; at++) {
        struct kvmpy_latch *latch = window->latches[at];
        if (latch->offset == v->addr - window->base && latch->size == v->size)
            done = answered_by(latch, is_write, &v->value);
    }
    pthread_mutex_unlock(&bus->lock);
    return done;
}

/* Enters the guest, after the last access's answer, which is in `value` if it was a read, until the next exit that
 * somebody has to hear of. A kick ends it in any case: KVM_RUN looks at immediate_exit. */
static int kvmpy_run(struct kvmpy_vcpu *v)
{
    do {
        answer_read(v);
        if (ioctl(v->fd, KVM_RUN, 0) < 0) {
            /* EAGAIN: a vCPU that waited for its start-up IPI was woken by something else. */
            if (errno != EINTR && errno != EAGAIN)
                return -errno;
            v->kind = KVMPY_INTERRUPTED;
            return 0;
        }
        decode_access(v);
    } while (kvmpy_answered(v));
    return 0;
}

static void no_op(int signal_number)
{
    (void)signal_number;
}

/* A kick only has to interrupt KVM_RUN, so the handler does nothing, and there is no SA_RESTART. In C, because a Python
 * handler would run on the main thread, which may be busy. */
static int kvmpy_accept_kicks(int signal_number)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = no_op;
    sigemptyset(&action.sa_mask);
    return sigaction(signal_number, &action, NULL) < 0 ? -errno : 0;
}

static int kvmpy_kick_signal(void)
{
    return SIGRTMIN;
}

/* By the kernel's id of the thread, which may have ended meanwhile (-ESRCH). pthread_kill would read the memory of a
 * thread that has ended, and that may be unmapped. */
static int kvmpy_kick(int thread, int signal_number)
{
    return syscall(SYS_tgkill, getpid(), thread, signal_number) < 0 ? -errno : 0;
}

/* Virtqueue indices (Virtio 1.2, 2.7): one access of 16 bits each, ordered against the rest of the ring. Python has
 * neither, and a bytes copy may be done byte by byte. */
static uint16_t kvmpy_load16(const char *at)
{
    return __atomic_load_n((const uint16_t *)at, __ATOMIC_ACQUIRE);
}

static void kvmpy_store16(char *at, uint16_t value)
{
    __atomic_store_n((uint16_t *)at, value, __ATOMIC_RELEASE);
}

static void kvmpy_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Puts the calling thread, and no other, into a network namespace: os.setns came with Python 3.12. */
static int kvmpy_enter_netns(int fd)
{
    return setns(fd, CLONE_NEWNET) < 0 ? -errno : 0;
}

static int kvmpy_fallocate(int fd, int mode, int64_t offset, int64_t size)
{
    int result;
    do {
        result = fallocate(fd, mode, offset, size);
    } while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : 0;
}

/* statx(2), STATX_DIOALIGN: the alignment of memory, and that of offsets and lengths. By number and place, which are
 * for ever: the headers of Linux 6.0 do not know them, the kernel that runs may. */
static int kvmpy_direct_alignment(int fd, uint32_t *said)
{
    uint32_t answer[256 / sizeof(uint32_t)] = {0};
    const uint32_t dioalign = 0x2000;
    if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, dioalign, answer) < 0)
        return -errno;
    if (!(answer[0] & dioalign))
        return -EOPNOTSUPP;
    said[0] = answer[0x98 / sizeof(uint32_t)];
    said[1] = answer[0x9c / sizeof(uint32_t)];
    return 0;
}
