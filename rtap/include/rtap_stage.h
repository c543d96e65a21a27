/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Stages: functions that a worker calls on each burst between a receive queue and the transmit
 * queues, without the GIL.  For C, C++ and whatever can make a C function; rtap.get_include() says
 * where this file is.
 */
#ifndef RTAP_STAGE_H
#define RTAP_STAGE_H

#include <stdint.h>

/* Goes up when something here changes its meaning.  Fields may be added at the end without. */
#define RTAP_STAGE_ABI 1

/* A verdict: the frame ends here, and is freed by whoever called. */
#define RTAP_DROP UINT32_MAX

/*
 * n frames as a struct of arrays, valid during the call.  Of a frame that is a chain, data and len
 * are the first segment's.
 */
struct rtap_burst {
	uint32_t abi;		/* RTAP_STAGE_ABI of the caller */
	uint32_t n;
	uint32_t n_targets;	/* of the route; at least 1 */
	uint32_t reserved;
	uint8_t **data;		/* bytes, which may be written to */
	const uint32_t *len;	/* how many */
	uint64_t *ol_flags;	/* DPDK's RTE_MBUF_F_*; what is written goes with the frame */
	uint32_t *verdict;	/* RTAP_DROP, or the index of the target, 0 at first; any other drops */
	void *const *frames;	/* rtap's own */
};

/* Returns 0, or -errno, which ends the route and frees the burst. */
typedef int rtap_stage(void *ctx, struct rtap_burst *burst);

#endif
