/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The engine of rtap in plain C, as the upper bound for a binding: one ring, registered files, one
 * registered buffer for the whole arena, RWF_NOWAIT so that every completion is inline, and
 * CQE_SKIP_SUCCESS on writes so that only failures come back.
 */
#ifndef RTAP_BENCH_RING_H
#define RTAP_BENCH_RING_H

#include <liburing.h>

#include "bench.h"

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 0x00000008
#endif

static void ring_open(struct io_uring *ring, unsigned entries, const int *fds, unsigned nfds,
		      uint8_t *arena, size_t slots)
{
	struct iovec iov = { arena, slots * BENCH_SLOT };
	struct io_uring_params params;
	int rc;

	memset(&params, 0, sizeof(params));
	params.flags = IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN;
	rc = io_uring_queue_init_params(entries, ring, &params);
	if (rc == -EINVAL) {
		memset(&params, 0, sizeof(params));
		rc = io_uring_queue_init_params(entries, ring, &params);
	}
	errno = -rc;
	if (rc < 0)
		die("io_uring_queue_init");
	rc = io_uring_register_files(ring, fds, nfds);
	errno = -rc;
	if (rc < 0)
		die("io_uring_register_files");
	rc = io_uring_register_buffers(ring, &iov, 1);
	errno = -rc;
	if (rc < 0)
		die("io_uring_register_buffers");
	io_uring_register_ring_fd(ring); /* saves a descriptor look-up; absent before Linux 5.18 */
}

static inline void ring_write(struct io_uring *ring, int file, void *data, unsigned len)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);

	io_uring_prep_write_fixed(sqe, file, data, len, 0, 0);
	sqe->rw_flags = RWF_NOWAIT;
	sqe->flags = IOSQE_FIXED_FILE | IOSQE_CQE_SKIP_SUCCESS;
	sqe->user_data = UINT64_MAX;
}

static inline void ring_read(struct io_uring *ring, int file, void *data, unsigned len,
			     uint64_t user_data)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);

	io_uring_prep_read_fixed(sqe, file, data, len, 0, 0);
	sqe->rw_flags = RWF_NOWAIT;
	sqe->flags = IOSQE_FIXED_FILE;
	sqe->user_data = user_data;
}

static inline void ring_enter(struct io_uring *ring)
{
	int rc = io_uring_submit(ring);

	if (rc < 0) {
		errno = -rc;
		die("io_uring_submit");
	}
}

#endif
