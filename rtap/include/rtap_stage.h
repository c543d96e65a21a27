/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Stages: functions that a worker calls on each burst between a receive queue and the transmit
 * queues, without the GIL.  For C, C++ and other languages that can make C functions;
 * rtap.get_include() names the directory of this file.
 */
#ifndef RTAP_STAGE_H
#define RTAP_STAGE_H

#include <stdint.h>

/* Increases when something here changes its meaning, but not when fields are added at the end. */
#define RTAP_STAGE_ABI 1

/* A verdict: the frame ends here, and the caller frees it. */
#define RTAP_DROP UINT32_MAX

/*
 * n frames as a struct of arrays, valid during the call.  For a chain, data and len are those of
 * its first segment.
 */
struct rtap_burst {
	uint32_t abi;		/* RTAP_STAGE_ABI of the caller */
	uint32_t n;
	uint32_t n_targets;	/* of the route; at least 1 */
	uint32_t reserved;
	uint8_t **data;		/* bytes, which may be written to */
	const uint32_t *len;	/* how many */
	uint64_t *ol_flags;	/* DPDK's RTE_MBUF_F_*; changes stay with the frame */
	uint32_t *verdict;	/* RTAP_DROP, or the index of the target, 0 at first; any other drops */
	void *const *frames;	/* rtap's own */
};

/* Returns 0, or -errno, which ends the route and frees the burst. */
typedef int rtap_stage(void *ctx, struct rtap_burst *burst);

#endif
