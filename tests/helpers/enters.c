/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Preloaded by test_worker_joint.py and test_ring_cut.py. It reports how many queues have writes in
 * one io_uring_enter, and imitates a kernel that does not take all writes, or all reads.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <liburing.h>
#include <stdarg.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define HDR_LEN 10
#define FILES_MAX 64
#define SYNC_CANCEL 24 /* IORING_REGISTER_SYNC_CANCEL */

enum fault {
	NONE,
	REFUSED, /* every seventh write is too short for a frame: EINVAL */
	FULL,	 /* the writes of one queue go to a full socket: EAGAIN */
	GONE,	 /* they go to a descriptor that is closed: EBADF */
	CUT,	 /* the kernel refuses to go on half-way through the entries */
	READS,	 /* the same with reads */
	NOTHING, /* it takes no reads at all */
	NO_CANCEL, /* a cancel ends nothing */
	OLD,	 /* the kernel does not know a cancel */
	STUCK,	 /* a cancel ends nothing, nor does one that is no entry of a ring */
};

static enum fault fault;
static int times, hits, most, full = -1;
static unsigned long writes;

static void fill(void)
{
	int ends[2];

	if (full >= 0 || socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, ends) != 0)
		return;
	while (write(ends[0], &full, sizeof(full)) > 0)
		;
	full = ends[0];
}

/* Starts to count. The fault strikes the given number of first enters that write (or read) several
 * frames. */
void watch(int kind, int enters)
{
	fill();
	most = hits = 0;
	writes = 0;
	times = enters;
	fault = kind;
}

/* The most files written to in one enter. */
int most_files(void)
{
	return most;
}

/* The number of writes, or enters, that were changed. */
int hit(void)
{
	return hits;
}

static bool is_write(const struct io_uring_sqe *sqe)
{
	return sqe->opcode == IORING_OP_WRITE || sqe->opcode == IORING_OP_WRITE_FIXED ||
	       sqe->opcode == IORING_OP_WRITEV;
}

static bool is_read(const struct io_uring_sqe *sqe)
{
	return sqe->opcode == IORING_OP_READ || sqe->opcode == IORING_OP_READ_FIXED ||
	       sqe->opcode == IORING_OP_READV;
}

static void tamper(struct io_uring_sqe *sqe, int file)
{
	if (fault == REFUSED && ++writes % 7 == 0) {
		sqe->len = sqe->opcode == IORING_OP_WRITEV ? 1 : HDR_LEN;
		hits++;
	}
	if ((fault == FULL || fault == GONE) && sqe->fd == file) {
		sqe->fd = fault == FULL ? full : -1;
		sqe->flags &= ~IOSQE_FIXED_FILE;
		hits++;
	}
}

static void tamper_cancel(struct io_uring_sqe *sqe)
{
	if (sqe->opcode != IORING_OP_ASYNC_CANCEL || times == 0)
		return;
	times--;
	hits++;
	sqe->opcode = fault == OLD ? 255 : IORING_OP_NOP;
}

long syscall(long number, ...)
{
	static long (*next)(long, ...);
	long a[6];
	va_list list;
	int i;

	if (next == NULL)
		next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
	va_start(list, number);
	for (i = 0; i < 6; i++)
		a[i] = va_arg(list, long);
	va_end(list);
	if (fault == STUCK && number == SYS_io_uring_register && a[1] == SYNC_CANCEL) {
		errno = EINVAL;
		return -1;
	}
	return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int io_uring_submit(struct io_uring *ring)
{
	static int (*next)(struct io_uring *);
	unsigned mask = *ring->sq.kring_mask, begin = ring->sq.sqe_head, end = ring->sq.sqe_tail;
	unsigned n = 0, reads = 0, left, i;
	int files[FILES_MAX], n_files = 0, k;

	if (next == NULL)
		next = (int (*)(struct io_uring *))dlsym(RTLD_NEXT, "io_uring_submit");
	for (i = begin; i != end; i++) {
		const struct io_uring_sqe *sqe = &ring->sq.sqes[i & mask];

		reads += is_read(sqe);
		if (!is_write(sqe))
			continue;
		n++;
		for (k = 0; k < n_files && files[k] != sqe->fd; k++)
			;
		if (k == n_files && n_files < FILES_MAX)
			files[n_files++] = sqe->fd;
	}
	if (n_files > most)
		most = n_files;
	if (fault >= NO_CANCEL) {
		for (i = begin; i != end; i++)
			tamper_cancel(&ring->sq.sqes[i & mask]);
		return next(ring);
	}
	if (fault == READS || fault == NOTHING)
		n = reads;
	if (fault == NONE || n < (fault == NOTHING ? 1 : 2) || times == 0)
		return next(ring);
	times--;
	for (i = begin; i != end; i++)
		if (is_write(&ring->sq.sqes[i & mask]))
			tamper(&ring->sq.sqes[i & mask], files[n_files / 2]);
	if (fault < CUT)
		return next(ring);
	hits++;
	left = fault == NOTHING ? end - begin : (end - begin) / 2;
	ring->sq.sqe_tail -= left;
	if (left < end - begin)
		next(ring);
	ring->sq.sqe_tail = end;
	return -EINVAL;
}
