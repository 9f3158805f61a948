/* The few things Python cannot do itself (docs/adr/0001). cffi releases the GIL around every call, and that is the point of
 * kvmpy_run. Every function returns a negative errno where it fails: errno itself would be lost on the way. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
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
