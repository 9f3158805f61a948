/* What the build host's kernel headers may be too old to know (Debian 12 has 6.1). A header never decides what kvmpy can do:
 * the running kernel is asked at run time, so its names are supplied here where they are missing. */
#ifndef KVMPY_COMPAT_H
#define KVMPY_COMPAT_H

#include <dlfcn.h>
#include <sys/socket.h>
#include <linux/ethtool.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/kvm.h>
#include <linux/sockios.h>
#include <linux/vfio.h>
#include <linux/vhost.h>

#ifndef KVM_CAP_MEMORY_FAULT_INFO /* Linux 6.8 */
#define KVM_CAP_MEMORY_FAULT_INFO 232
#endif
#ifndef KVM_CAP_PRE_FAULT_MEMORY /* Linux 6.11 */
#define KVM_CAP_PRE_FAULT_MEMORY 236
#endif

#ifndef TUN_F_USO4 /* Linux 6.2 */
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif

_Static_assert(sizeof(struct kvm_regs) == 144, "struct kvm_regs");
_Static_assert(sizeof(struct kvm_sregs) == 312, "struct kvm_sregs");
_Static_assert(sizeof(struct kvm_userspace_memory_region) == 32, "struct kvm_userspace_memory_region");

#endif
