/* Preloaded into a VMM, kvmpy or QEMU: the time of the first of each of the ioctls that tell how far its start has come.
 * One line "NAME NANOSECONDS" (CLOCK_MONOTONIC) for each goes to the file that KVMPY_BENCH_STAMPS names. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static const struct { unsigned long request; const char *name; } marks[] = {
    {KVM_GET_API_VERSION, "kvm"}, {KVM_CREATE_VM, "vm"}, {KVM_CREATE_VCPU, "vcpu"}, {KVM_RUN, "run"},
};
enum { MARKS = sizeof marks / sizeof *marks };
static int seen[MARKS];
static int out = -1;
static int (*next_ioctl)(int, unsigned long, ...);

static void stamp(const char *name)
{
    struct timespec now;
    char line[64];
    clock_gettime(CLOCK_MONOTONIC, &now);
    int length = snprintf(line, sizeof line, "%s %lld\n", name, now.tv_sec * 1000000000LL + now.tv_nsec);
    if (write(out, line, length) < 0)
        abort();
}

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("KVMPY_BENCH_STAMPS");
    next_ioctl = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    out = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    if (out >= 0)
        stamp("loaded");
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    for (int i = 0; out >= 0 && i < MARKS; i++)
        if (request == marks[i].request && !__atomic_exchange_n(&seen[i], 1, __ATOMIC_RELAXED))
            stamp(marks[i].name);
    return next_ioctl(fd, request, argument);
}
