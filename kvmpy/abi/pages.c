/* Bitmaps of pages, and the pump of a migration: it scans a bitmap, tells zero pages, and moves runs of pages between
 * guest memory and a descriptor (kvmpy/migration/records.py has the records). All of it runs without the GIL, so a call may
 * take as long as a round does; what another thread may change meanwhile is in struct kvmpy_flow, and is read
 * atomically. No call trusts what comes in from a descriptor.
 *
 * Errors are negative errnos: -ECANCELED, -ETIMEDOUT, -EBADMSG (``fault`` says what), else the kernel's. */
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#define KVMPY_PAGE_DATA 1
#define KVMPY_PAGE_ZERO 2
#define KVMPY_PAGE_END 3
#define KVMPY_PAGE_ZSTD 4
#define KVMPY_PAGE_BATCH 5
#define KVMPY_PAGE_RECORD 16      /* bytes of a record's header */
#define KVMPY_MOST_PAGES 1024     /* in one record */
#define KVMPY_MOST_BATCH (1 << 20) /* bytes of the records in one batch */

#define KVMPY_FAULT_KIND 1
#define KVMPY_FAULT_COUNT 2
#define KVMPY_FAULT_ALIGNMENT 3
#define KVMPY_FAULT_RANGE 4
#define KVMPY_FAULT_TRUNCATED 5
#define KVMPY_FAULT_PACKED 6

#define KVMPY_ZSTD_MAGIC 0xfd2fb528u

#define PAGE 4096u
#define BATCH_RECORDS 128
#define BATCH_BYTES (4u << 20)
#define LEAST_BATCH (64u << 10)
/* A channel has whole blocks of 2 MiB, so that a run is not cut up among channels. */
#define BLOCK_SHIFT 9
/* Pages whose bits in KVM's log are cleared in one go, for each channel, and the words for as many as four channels. */
#define WINDOW_PAGES 16384u
#define WINDOW_WORDS 1024
/* Who blocks looks up this often, to see whether it was cancelled. */
#define SLICE_MS 100
/* What a sender that was held up may make good: more would be a burst that the limit is there to prevent. */
#define BURST_NS 50000000

/* Little-endian, as the one processor we run on is. */
struct kvmpy_record { uint64_t gpa; uint32_t pages, kind; };
_Static_assert(sizeof(struct kvmpy_record) == KVMPY_PAGE_RECORD, "struct kvmpy_record");

struct kvmpy_flow {
    int64_t rate;      /* bytes a second of all channels together, 0 for no limit */
    int64_t due;       /* on the monotonic clock, in nanoseconds: when what has been sent is paid for */
    int32_t cancelled;
};

/* One channel's way through the pages of one block of RAM, memory[0] being at gpa. vm is -1 where there is no log to
 * clear; clear_failed says that KVM's refusal was the error. */
struct kvmpy_sweep {
    char *memory;
    uint64_t gpa, pages;
    const uint64_t *bits;
    uint32_t channel, channels;
    int32_t vm;
    uint32_t slot;
    int32_t clear_failed;
    uint64_t data_pages, zero_pages, bytes; /* sent so far */
    uint64_t next, window, window_end;      /* pages: to look at next; the first in own; the first behind it */
    uint64_t own[WINDOW_WORDS];
};

/* One direction of one channel's zstd (kvmpy/migration/zstd.py, which finds the functions): ZSTD_compress2 or
 * ZSTD_decompressDCtx, and room for a record and a batch behind it, as it is and packed. */
struct kvmpy_zstd {
    void *context;
    size_t (*code)(void *context, void *to, size_t room, const void *from, size_t size);
    size_t (*frame_size)(const void *from, size_t size);
    unsigned (*is_error)(size_t result);
    char *batch, *packed;
    uint64_t most; /* bytes of a batch that is sent */
};

struct kvmpy_ram { char *memory; uint64_t gpa, size; };

/* The receiving end of one channel. gpa, pages and kind are the last record's, offset is where in the stream it began,
 * and inner where in a batch. Bytes that came in behind what was asked for wait in ahead[start, end): with room for no
 * more than a header only such as are pages' for sure, so that nobody else's are taken. */
struct kvmpy_intake {
    const struct kvmpy_ram *blocks;
    uint32_t count;
    char *ahead;
    uint64_t room, start, end;
    uint64_t gpa;
    uint32_t pages, kind;
    int32_t fault;
    uint64_t offset, inner;
    uint64_t data_pages, zero_pages, bytes; /* received so far */
    struct kvmpy_zstd *zstd;                /* NULL where packed batches are the caller's */
};

/* Bitmaps: whole words, the bits behind size are 0 */

static uint64_t bits_between(uint64_t first, uint64_t end)
{
    uint64_t below = end < 64 ? (1ull << end) - 1 : ~0ull;
    return below & ~0ull << first;
}

/* Atomically, and whatever was stored before by this thread is there for who takes the bit. Others are left out. */
static void kvmpy_bits_set(uint64_t *bits, uint64_t size, uint64_t first, uint64_t count)
{
    if (first >= size)
        return;
    uint64_t end = count < size - first ? first + count : size;
    while (first < end) {
        uint64_t word = first / 64, stop = end < (word + 1) * 64 ? end : (word + 1) * 64;
        __atomic_fetch_or(&bits[word], bits_between(first % 64, stop - word * 64), __ATOMIC_SEQ_CST);
        first = stop;
    }
}

static uint64_t kvmpy_bits_count(const uint64_t *bits, uint64_t size)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < (size + 63) / 64; i++)
        count += __builtin_popcountll(bits[i]);
    return count;
}

static void kvmpy_bits_merge(uint64_t *into, const uint64_t *from, uint64_t size)
{
    for (uint64_t i = 0; i < (size + 63) / 64; i++)
        into[i] |= from[i];
}

/* Move the bits [first, first+size) of a bitmap that others set at the same time to the beginning of ``into``: each is
 * taken atomically, so it is either here or there. */
static void kvmpy_bits_take(uint64_t *into, uint64_t *from, uint64_t first, uint64_t size)
{
    for (uint64_t at = first, end = first + size; at < end;) {
        uint64_t word = at / 64, stop = end < (word + 1) * 64 ? end : (word + 1) * 64;
        if (__atomic_load_n(&from[word], __ATOMIC_RELAXED)) {
            uint64_t mask = bits_between(at % 64, stop - word * 64);
            uint64_t taken = (__atomic_fetch_and(&from[word], ~mask, __ATOMIC_SEQ_CST) & mask) >> at % 64;
            uint64_t to = at - first;
            into[to / 64] |= taken << to % 64;
            if (to % 64 && taken >> (64 - to % 64))
                into[to / 64 + 1] |= taken >> (64 - to % 64);
        }
        at = stop;
    }
}

/* First set bit in [from, end), or end. */
static uint64_t next_bit(const uint64_t *bits, uint64_t from, uint64_t end)
{
    while (from < end) {
        uint64_t word = bits[from / 64] & ~0ull << from % 64;
        if (word) {
            uint64_t found = from / 64 * 64 + __builtin_ctzll(word);
            return found < end ? found : end;
        }
        from = (from / 64 + 1) * 64;
    }
    return end;
}

static int is_zero(const char *page)
{
    const uint64_t *words = (const uint64_t *)page;
    for (unsigned i = 0; i < PAGE / 8; i += 16) {
        uint64_t any = 0;
        for (unsigned j = 0; j < 16; j++)
            any |= words[i + j];
        if (any)
            return 0;
    }
    return 1;
}

/* Time, cancelling, and the limit */

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static int is_cancelled(struct kvmpy_flow *flow)
{
    return __atomic_load_n(&flow->cancelled, __ATOMIC_RELAXED);
}

/* Wait until ``bytes`` may go. Every channel books its time in ``due``, so they share the limit whatever each sends. */
static int kvmpy_flow_pace(struct kvmpy_flow *flow, uint64_t bytes)
{
    int64_t rate = __atomic_load_n(&flow->rate, __ATOMIC_RELAXED);
    if (is_cancelled(flow))
        return -ECANCELED;
    if (rate <= 0)
        return 0;
    int64_t now = now_ns(), cost = (int64_t)((double)bytes * 1e9 / (double)rate), start;
    int64_t due = __atomic_load_n(&flow->due, __ATOMIC_RELAXED);
    do
        start = due > now - BURST_NS ? due : now - BURST_NS;
    while (!__atomic_compare_exchange_n(&flow->due, &due, start + cost, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    while ((now = now_ns()) < start) {
        int64_t left = start - now < SLICE_MS * 1000000ll ? start - now : SLICE_MS * 1000000ll;
        struct timespec nap = {left / 1000000000, left % 1000000000};
        nanosleep(&nap, NULL);
        if (is_cancelled(flow))
            return -ECANCELED;
        if (__atomic_load_n(&flow->rate, __ATOMIC_RELAXED) != rate) { /* a new limit: what the old one booked is void */
            __atomic_store_n(&flow->due, now_ns(), __ATOMIC_RELAXED);
            return 0;
        }
    }
    return 0;
}

/* A descriptor that must not block: a socket is told with each call, anything else by a flag for as long as we use it. */

struct wire { int fd, is_socket, flags; };

static int wire_open(struct wire *wire, int fd)
{
    int type;
    socklen_t size = sizeof type;
    *wire = (struct wire){.fd = fd, .is_socket = !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size), .flags = -1};
    if (wire->is_socket)
        return 0;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0)
        return -errno;
    if (!(flags & O_NONBLOCK)) {
        if (fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
            return -errno;
        wire->flags = flags;
    }
    return 0;
}

static void wire_close(struct wire *wire)
{
    if (wire->flags >= 0)
        fcntl(wire->fd, F_SETFL, wire->flags);
}

static ssize_t wire_move(struct wire *wire, struct iovec *iov, int count, int out)
{
    if (wire->is_socket) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = count};
        return out ? sendmsg(wire->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
                   : recvmsg(wire->fd, &message, MSG_DONTWAIT);
    }
    return out ? writev(wire->fd, iov, count) : readv(wire->fd, iov, count);
}

/* Until the descriptor is ready: 0, or -ETIMEDOUT, -ECANCELED. A timeout below 0 is none. */
static int wire_wait(struct wire *wire, struct kvmpy_flow *flow, short events, int timeout)
{
    int64_t end = now_ns() + timeout * 1000000ll;
    for (;;) {
        int slice = SLICE_MS;
        if (timeout >= 0) {
            int64_t left = (end - now_ns() + 999999) / 1000000;
            if (left <= 0)
                return -ETIMEDOUT;
            slice = left < SLICE_MS ? (int)left : SLICE_MS;
        }
        if (is_cancelled(flow))
            return -ECANCELED;
        struct pollfd poll_fd = {.fd = wire->fd, .events = events};
        int ready = poll(&poll_fd, 1, slice);
        if (ready > 0)
            return 0;
        if (ready < 0 && errno != EINTR)
            return -errno;
    }
}

/* Move all of the vector, or at least ``need`` bytes of it; a timeout is for no progress. How many bytes; fewer than
 * ``need`` where what we read has ended. */
static int64_t wire_all(struct wire *wire, struct kvmpy_flow *flow, struct iovec *iov, int count, uint64_t need,
                        int timeout, int out)
{
    uint64_t moved = 0;
    while (moved < need) {
        if (is_cancelled(flow))
            return -ECANCELED;
        ssize_t step = wire_move(wire, iov, count, out);
        if (step < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK)
                return -errno;
            int failed = wire_wait(wire, flow, out ? POLLOUT : POLLIN, timeout);
            if (failed)
                return failed;
            continue;
        }
        if (!step && !out)
            break;
        moved += step;
        for (; count && (size_t)step >= iov->iov_len; iov++, count--)
            step -= iov->iov_len;
        if (count) {
            iov->iov_base = (char *)iov->iov_base + step;
            iov->iov_len -= step;
        }
    }
    return moved;
}

static int kvmpy_flow_write(struct kvmpy_flow *flow, int fd, const char *data, uint64_t size, int timeout)
{
    struct wire wire;
    struct iovec iov = {(char *)data, size};
    int failed = wire_open(&wire, fd);
    if (failed)
        return failed;
    int64_t moved = wire_all(&wire, flow, &iov, 1, size, timeout, 1);
    wire_close(&wire);
    return moved < 0 ? (int)moved : 0;
}

/* Sending: find this channel's pages, take them out of KVM's log, then read them */

static int is_own(const struct kvmpy_sweep *s, uint64_t page)
{
    return ((s->gpa / PAGE + page) >> BLOCK_SHIFT) % s->channels == s->channel;
}

/* This channel's bits of one word, which lies in two blocks where the RAM does not begin at a multiple of 64 pages. */
static uint64_t own_word(const struct kvmpy_sweep *s, uint64_t first)
{
    uint64_t word = s->bits[first / 64], own = 0;
    if (!word || s->channels == 1)
        return word;
    uint64_t cut = 512 - (s->gpa / PAGE + first) % 512;
    if (is_own(s, first))
        own |= word & bits_between(0, cut < 64 ? cut : 64);
    if (cut < 64 && is_own(s, first + cut))
        own |= word & bits_between(cut, 64);
    return own;
}

/* KVM sets these bits again with the next write to their pages: so from here on what we read is what a later round
 * replaces, or is new enough. */
static int clear_window(struct kvmpy_sweep *s)
{
    if (s->vm < 0)
        return 0;
    struct kvm_clear_dirty_log log = {
        .slot = s->slot, .first_page = s->window, .num_pages = s->window_end - s->window, .dirty_bitmap = s->own};
    if (ioctl(s->vm, KVM_CLEAR_DIRTY_LOG, &log) < 0) {
        s->clear_failed = 1;
        return -errno;
    }
    return 0;
}

/* Go on to the next window that has pages of ours: 1, 0 at the end, or an error. */
static int next_window(struct kvmpy_sweep *s)
{
    while (s->window_end < s->pages) {
        uint64_t most = WINDOW_PAGES * (s->channels < 4 ? s->channels : 4), any = 0;
        s->window = s->next = s->window_end;
        s->window_end = s->pages - s->window < most ? s->pages : s->window + most;
        for (uint64_t first = s->window; first < s->window_end; first += 64)
            any |= s->own[(first - s->window) / 64] = own_word(s, first);
        if (any) {
            int failed = clear_window(s);
            return failed ? failed : 1;
        }
    }
    return 0;
}

/* The next pages, at most ``most`` and all zero or none: 1, 0 at the end, or an error. */
static int next_run(struct kvmpy_sweep *s, uint64_t most, struct kvmpy_record *run, char **data)
{
    uint64_t page;
    while ((page = s->window + next_bit(s->own, s->next - s->window, s->window_end - s->window)) >= s->window_end) {
        int more = next_window(s);
        if (more <= 0)
            return more;
    }
    char *memory = s->memory + page * PAGE;
    int zero = is_zero(memory);
    uint64_t count = 1;
    if (most > KVMPY_MOST_PAGES || zero)
        most = KVMPY_MOST_PAGES;
    while (count < most && page + count < s->window_end
           && s->own[(page + count - s->window) / 64] >> (page + count - s->window) % 64 & 1
           && is_zero(memory + count * PAGE) == zero)
        count++;
    s->next = page + count;
    *run = (struct kvmpy_record){s->gpa + page * PAGE, (uint32_t)count, zero ? KVMPY_PAGE_ZERO : KVMPY_PAGE_DATA};
    *data = memory;
    return 1;
}

/* Records ready to go: headers, and between them runs of guest memory itself. */
struct batch {
    struct kvmpy_record records[BATCH_RECORDS];
    struct iovec iov[2 * BATCH_RECORDS];
    int count, iovs;
    uint64_t bytes, data_pages, zero_pages;
};

static void batch_add(struct batch *b, void *data, uint64_t size)
{
    struct iovec *last = b->iovs ? &b->iov[b->iovs - 1] : NULL;
    if (last && (char *)last->iov_base + last->iov_len == data) /* headers without data lie side by side */
        last->iov_len += size;
    else
        b->iov[b->iovs++] = (struct iovec){data, size};
    b->bytes += size;
}

static int batch_fill(struct batch *b, struct kvmpy_sweep *s, struct kvmpy_flow *flow, uint64_t limit)
{
    b->count = b->iovs = 0;
    b->bytes = b->data_pages = b->zero_pages = 0;
    while (b->count < BATCH_RECORDS && b->bytes < limit) {
        struct kvmpy_record *run = &b->records[b->count];
        char *data;
        if (is_cancelled(flow))
            return -ECANCELED;
        int more = next_run(s, (limit - b->bytes + PAGE - 1) / PAGE, run, &data);
        if (more <= 0)
            return more;
        b->count++;
        batch_add(b, run, sizeof *run);
        if (run->kind == KVMPY_PAGE_DATA) {
            batch_add(b, data, (uint64_t)run->pages * PAGE);
            b->data_pages += run->pages;
        } else
            b->zero_pages += run->pages;
    }
    return 0;
}

static int send_batch(struct batch *b, struct kvmpy_sweep *s, struct kvmpy_flow *flow, struct wire *wire, int timeout)
{
    int failed = kvmpy_flow_pace(flow, b->bytes);
    if (failed)
        return failed;
    int64_t moved = wire_all(wire, flow, b->iov, b->iovs, b->bytes, timeout, 1);
    if (moved < 0)
        return (int)moved;
    s->data_pages += b->data_pages;
    s->zero_pages += b->zero_pages;
    s->bytes += b->bytes;
    return 0;
}

/* Send this channel's pages of the block, from guest memory as it is. */
static int kvmpy_sweep_send(struct kvmpy_sweep *s, struct kvmpy_flow *flow, int fd, int timeout)
{
    struct batch batch;
    struct wire wire;
    int failed = wire_open(&wire, fd);
    if (failed)
        return failed;
    do {
        /* With a limit, a fiftieth of a second's worth: it should be a steady flow. */
        int64_t limit = __atomic_load_n(&flow->rate, __ATOMIC_RELAXED) / 50;
        limit = limit <= 0 || limit > BATCH_BYTES ? BATCH_BYTES : limit < LEAST_BATCH ? LEAST_BATCH : limit;
        failed = batch_fill(&batch, s, flow, limit);
        if (!failed && batch.count)
            failed = send_batch(&batch, s, flow, &wire, timeout);
    } while (!failed && batch.count);
    wire_close(&wire);
    return failed;
}

/* The same records into a buffer of our own, for what must not read memory that changes: how many bytes, 0 at the end. */
static int64_t kvmpy_sweep_copy(struct kvmpy_sweep *s, struct kvmpy_flow *flow, char *buffer, uint64_t room)
{
    uint64_t used = 0;
    while (room - used >= KVMPY_PAGE_RECORD + PAGE) {
        struct kvmpy_record run;
        char *data;
        if (is_cancelled(flow))
            return -ECANCELED;
        int more = next_run(s, (room - used - KVMPY_PAGE_RECORD) / PAGE, &run, &data);
        if (more < 0)
            return more;
        if (!more)
            break;
        memcpy(buffer + used, &run, sizeof run);
        used += sizeof run;
        if (run.kind == KVMPY_PAGE_DATA) {
            memcpy(buffer + used, data, (size_t)run.pages * PAGE);
            used += (uint64_t)run.pages * PAGE;
            s->data_pages += run.pages;
        } else
            s->zero_pages += run.pages;
    }
    return (int64_t)used;
}

/* A batch of ``size`` bytes behind its record: packed, where that makes it smaller. */
static struct iovec frame_batch(struct kvmpy_zstd *z, uint64_t size)
{
    struct kvmpy_record record = {size, (uint32_t)size, KVMPY_PAGE_BATCH};
    char *frame = z->batch;
    size_t packed =
        z->code(z->context, z->packed + KVMPY_PAGE_RECORD, size - 1, z->batch + KVMPY_PAGE_RECORD, size);
    if (!z->is_error(packed)) {
        record.pages = (uint32_t)packed;
        record.kind = KVMPY_PAGE_ZSTD;
        frame = z->packed;
    }
    memcpy(frame, &record, sizeof record);
    return (struct iovec){frame, sizeof record + record.pages};
}

/* Send this channel's pages of the block in packed batches. */
static int kvmpy_sweep_pack(struct kvmpy_sweep *s, struct kvmpy_flow *flow, struct kvmpy_zstd *z, int fd, int timeout)
{
    struct wire wire;
    int64_t result = wire_open(&wire, fd);
    if (result)
        return (int)result;
    while ((result = kvmpy_sweep_copy(s, flow, z->batch + KVMPY_PAGE_RECORD, z->most)) > 0) {
        struct iovec frame = frame_batch(z, result);
        uint64_t size = frame.iov_len;
        result = kvmpy_flow_pace(flow, size);
        if (!result)
            result = wire_all(&wire, flow, &frame, 1, size, timeout, 1);
        if (result < 0)
            break;
        s->bytes += size;
    }
    wire_close(&wire);
    return (int)result;
}

/* Receiving: every record is checked before anything of it touches guest memory */

static int fault(struct kvmpy_intake *in, int what)
{
    in->fault = what;
    return -EBADMSG;
}

/* Where a run of pages lies in our memory. */
static int locate(struct kvmpy_intake *in, char **memory)
{
    uint64_t size = (uint64_t)in->pages * PAGE;
    if (!in->pages || in->pages > KVMPY_MOST_PAGES)
        return fault(in, KVMPY_FAULT_COUNT);
    if (in->gpa % PAGE)
        return fault(in, KVMPY_FAULT_ALIGNMENT);
    for (uint32_t i = 0; i < in->count; i++) {
        const struct kvmpy_ram *ram = &in->blocks[i];
        if (in->gpa >= ram->gpa && in->gpa - ram->gpa < ram->size && size <= ram->size - (in->gpa - ram->gpa)) {
            *memory = ram->memory + (in->gpa - ram->gpa);
            return 0;
        }
    }
    return fault(in, KVMPY_FAULT_RANGE);
}

/* A page that is zero already is only read: memory that was never written stays unpopulated, but for a memfd's. */
static void wipe(struct kvmpy_intake *in, char *memory)
{
    for (uint32_t i = 0; i < in->pages; i++)
        if (!is_zero(memory + (uint64_t)i * PAGE))
            memset(memory + (uint64_t)i * PAGE, 0, PAGE);
    in->zero_pages += in->pages;
}

/* Read and check a header, and do what a ZERO record says. Its kind, and for DATA where it goes. */
static int accept_header(struct kvmpy_intake *in, const char *header, char **memory)
{
    struct kvmpy_record record;
    int failed;
    memcpy(&record, header, sizeof record);
    in->gpa = record.gpa;
    in->pages = record.pages;
    in->kind = record.kind;
    switch (in->kind) {
    case KVMPY_PAGE_DATA:
    case KVMPY_PAGE_ZERO:
        failed = locate(in, memory);
        if (failed)
            return failed;
        if (in->kind == KVMPY_PAGE_ZERO)
            wipe(in, *memory);
        break;
    case KVMPY_PAGE_END:
        if (in->pages)
            return fault(in, KVMPY_FAULT_COUNT);
        break;
    case KVMPY_PAGE_ZSTD: /* gpa is the size of the batch once it is unpacked, pages is its size now */
    case KVMPY_PAGE_BATCH:
        if (!in->gpa || in->gpa > KVMPY_MOST_BATCH || !in->pages || in->pages > KVMPY_MOST_BATCH
            || (in->kind == KVMPY_PAGE_BATCH && in->gpa != in->pages))
            return fault(in, KVMPY_FAULT_COUNT);
        break;
    default:
        return fault(in, KVMPY_FAULT_KIND);
    }
    return (int)in->kind;
}

/* Check one header for a reader that fetches the rest itself. */
static int kvmpy_intake_header(struct kvmpy_intake *in, const char *header)
{
    char *memory;
    return accept_header(in, header, &memory);
}

/* Get ``size`` bytes, and where ``more`` may be taken, what else is there: how many of the ``size``, fewer at the end. */
static int64_t fetch(struct kvmpy_intake *in, struct kvmpy_flow *flow, struct wire *wire, char *to, uint64_t size,
                     int more, int timeout)
{
    uint64_t have = in->end - in->start < size ? in->end - in->start : size;
    memcpy(to, in->ahead + in->start, have);
    in->start += have;
    if (have == size)
        return (int64_t)size;
    struct iovec iov[2] = {{to + have, size - have}, {in->ahead, in->room}};
    int64_t got = wire_all(wire, flow, iov, more ? 2 : 1, size - have, timeout, 0);
    if (got < 0 || have + got < size)
        return got < 0 ? got : (int64_t)have + got;
    in->start = 0;
    in->end = have + got - size;
    return (int64_t)size;
}

/* Do what a batch of records says; the batch is ours, and nobody changes it. A hostile one may take long: many records
 * of pages that are zero. */
static int kvmpy_intake_apply(struct kvmpy_intake *in, struct kvmpy_flow *flow, const char *batch, uint64_t size)
{
    char *memory = NULL;
    uint64_t at = 0;
    while (at < size) {
        in->inner = at;
        if (is_cancelled(flow))
            return -ECANCELED;
        if (size - at < KVMPY_PAGE_RECORD)
            return fault(in, KVMPY_FAULT_TRUNCATED);
        int kind = accept_header(in, batch + at, &memory);
        if (kind < 0)
            return kind;
        if (kind != KVMPY_PAGE_DATA && kind != KVMPY_PAGE_ZERO)
            return fault(in, KVMPY_FAULT_KIND);
        at += KVMPY_PAGE_RECORD;
        if (kind == KVMPY_PAGE_DATA) {
            uint64_t length = (uint64_t)in->pages * PAGE;
            if (size - at < length)
                return fault(in, KVMPY_FAULT_TRUNCATED);
            memcpy(memory, batch + at, length);
            in->data_pages += in->pages;
            at += length;
        }
    }
    in->inner = 0;
    return 0;
}

/* Get a packed batch and do what it says. It is one whole frame, of what it says to be; else PACKED is the fault, and
 * the caller finds out why. */
static int take_packed(struct kvmpy_intake *in, struct kvmpy_flow *flow, struct wire *wire, int timeout)
{
    struct kvmpy_zstd *z = in->zstd;
    uint64_t size = in->gpa, length = in->pages;
    uint32_t magic = 0;
    /* Behind the batch comes another record for sure. */
    int64_t got = fetch(in, flow, wire, z->packed, length, 1, timeout);
    if (got < (int64_t)length)
        return got < 0 ? (int)got : fault(in, KVMPY_FAULT_TRUNCATED);
    memcpy(&magic, z->packed, length < sizeof magic ? length : sizeof magic);
    if (magic != KVMPY_ZSTD_MAGIC || z->frame_size(z->packed, length) != length
        || z->code(z->context, z->batch, size, z->packed, length) != size)
        return fault(in, KVMPY_FAULT_PACKED);
    int failed = kvmpy_intake_apply(in, flow, z->batch, size);
    if (failed)
        return failed;
    in->bytes += length;
    in->offset += length;
    return 0;
}

/* Move pages into guest memory until a record comes that is the caller's, and return its kind; 0 where the stream ends
 * between two records. ``idle`` is the timeout between records, ``timeout`` the one within. */
static int take_records(struct kvmpy_intake *in, struct kvmpy_flow *flow, struct wire *wire, int timeout, int idle)
{
    for (;;) {
        char header[KVMPY_PAGE_RECORD], *memory = NULL;
        int failed = in->start == in->end ? wire_wait(wire, flow, POLLIN, idle) : 0;
        if (failed)
            return failed;
        if (is_cancelled(flow))
            return -ECANCELED;
        int64_t got = fetch(in, flow, wire, header, sizeof header, in->room > sizeof header, timeout);
        if (got < (int64_t)sizeof header)
            return got <= 0 ? (int)got : fault(in, KVMPY_FAULT_TRUNCATED);
        int kind = accept_header(in, header, &memory);
        if (kind == KVMPY_PAGE_DATA) {
            /* Behind the pages comes another record for sure. */
            int64_t size = (int64_t)in->pages * PAGE;
            got = fetch(in, flow, wire, memory, size, 1, timeout);
            if (got < size)
                return got < 0 ? (int)got : fault(in, KVMPY_FAULT_TRUNCATED);
            in->data_pages += in->pages;
            in->bytes += size;
            in->offset += size;
        } else if (kind == KVMPY_PAGE_ZSTD && in->zstd) {
            failed = take_packed(in, flow, wire, timeout);
            if (failed)
                return failed;
        } else if (kind != KVMPY_PAGE_ZERO)
            return kind;
        in->bytes += sizeof header;
        in->offset += sizeof header;
    }
}

static int kvmpy_intake_run(struct kvmpy_intake *in, struct kvmpy_flow *flow, int fd, int timeout, int idle)
{
    struct wire wire;
    int result = wire_open(&wire, fd);
    if (result)
        return result;
    result = take_records(in, flow, &wire, timeout, idle);
    wire_close(&wire);
    return result;
}

/* Get the bytes that belong to the record at hand. */
static int kvmpy_intake_read(struct kvmpy_intake *in, struct kvmpy_flow *flow, int fd, char *to, uint64_t size,
                             int timeout)
{
    struct wire wire;
    int result = wire_open(&wire, fd);
    if (result)
        return result;
    int64_t got = fetch(in, flow, &wire, to, size, 0, timeout);
    wire_close(&wire);
    return got < 0 ? (int)got : (uint64_t)got < size ? fault(in, KVMPY_FAULT_TRUNCATED) : 0;
}
