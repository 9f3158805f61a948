/* The few things Python cannot do itself (docs/adr/0001). cffi releases the GIL around every call, and that is the point of
 * kvmpy_run. Every function returns a negative errno where it fails: errno itself would be lost on the way. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "compat.h"

static long kvmpy_ioctl(int fd, unsigned long request, void *argument)
{
    int result = ioctl(fd, request, argument);
    return result < 0 ? -(long)errno : result;
}

static int kvmpy_run(int fd)
{
    return ioctl(fd, KVM_RUN, 0) < 0 ? -errno : 0;
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
