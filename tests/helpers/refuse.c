/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Preloaded by test_gso_fallback.py and others. It imitates a kernel that does not split some kinds
 * of super-frame. When a super-frame of a refused kind is written to a TAP device, the write is
 * shortened to the virtio-net header, for which the kernel itself returns EINVAL. It also imitates
 * a kernel without RWF_NOWAIT, one with a slow system call, and one that is full for a moment.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <liburing.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define HDR_LEN 10

static int kinds;		/* bit N: gso_type N, the ECN bit aside */
static unsigned long longer_than;
static int hits;
static int refuses_nowait;
static int slow;
static int full_at;

/* So that engine="auto" takes io_uring. */
void slow_writes(int on)
{
	slow = on;
}

/* The n-th write to a TAP device from now on finds no room, and neither does the next: pieces are
 * retried once. */
void full_at_write(int n)
{
	full_at = n + 1;
}

void refuse_nowait(void)
{
	hits = 0;
	refuses_nowait = 1;
}

void refuse_kinds(int mask, unsigned long length)
{
	kinds = mask;
	longer_than = length;
	hits = 0;
}

int refused_so_far(void)
{
	return hits;
}

static int refuse(const void *start, unsigned long length)
{
	const uint8_t *hdr = start;

	if (length < HDR_LEN || length <= longer_than || hdr[0] != 1 ||
	    !(kinds & 1 << (hdr[1] & 0x1f)) || (hdr[1] & 0x1f) == 0)
		return 0;
	hits++;
	return 1;
}

static unsigned long total(const struct iovec *iov, unsigned long n)
{
	unsigned long sum = 0;

	while (n-- > 0)
		sum += iov[n].iov_len;
	return sum;
}

static int is_tap(int fd)
{
	struct ifreq request;

	return ioctl(fd, TUNGETIFF, &request) == 0;
}

long syscall(long number, ...)
{
	static long (*next)(long, ...);
	long a[6];
	va_list args;
	int i;

	if (next == NULL)
		next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
	va_start(args, number);
	for (i = 0; i < 6; i++)
		a[i] = va_arg(args, long);
	va_end(args);
	if (slow && number == SYS_write)
		usleep(20);
	if (refuses_nowait && (number == SYS_preadv2 || number == SYS_pwritev2)) {
		hits++;
		errno = EOPNOTSUPP;
		return -1;
	}
	if (full_at > 0 && (number == SYS_write || number == SYS_writev) && is_tap((int)a[0]) &&
	    --full_at < 2) {
		errno = EAGAIN;
		return -1;
	}
	if (kinds != 0 && number == SYS_write && is_tap((int)a[0]) &&
	    refuse((const void *)a[1], (unsigned long)a[2]))
		a[2] = HDR_LEN;
	if (kinds != 0 && number == SYS_writev && is_tap((int)a[0]) &&
	    refuse(((const struct iovec *)a[1])->iov_base,
		   total((const struct iovec *)a[1], (unsigned long)a[2])))
		a[2] = 1;
	return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int io_uring_submit(struct io_uring *ring)
{
	static int (*next)(struct io_uring *);
	unsigned int i, mask = *ring->sq.kring_mask;

	if (next == NULL)
		next = (int (*)(struct io_uring *))dlsym(RTLD_NEXT, "io_uring_submit");
	for (i = ring->sq.sqe_head; kinds != 0 && i != ring->sq.sqe_tail; i++) {
		struct io_uring_sqe *sqe = &ring->sq.sqes[i & mask];
		const struct iovec *iov = (const struct iovec *)(uintptr_t)sqe->addr;

		if (sqe->opcode == IORING_OP_WRITEV && refuse(iov->iov_base, total(iov, sqe->len)))
			sqe->len = 1;
		else if ((sqe->opcode == IORING_OP_WRITE ||
			  sqe->opcode == IORING_OP_WRITE_FIXED) &&
			 refuse((const void *)(uintptr_t)sqe->addr, sqe->len))
			sqe->len = HDR_LEN;
	}
	return next(ring);
}
