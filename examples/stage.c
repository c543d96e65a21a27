/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The stage of examples/sample.py in C; its context is a uint64_t.
 *
 *	cc -O3 -shared -fPIC -I$(python -c 'import rtap; print(rtap.get_include())') \
 *		-o stage.so stage.c
 */
#include <errno.h>
#include <string.h>
#include <rtap_stage.h>

int stage(void *ctx, struct rtap_burst *burst)
{
	uint64_t *count = ctx;
	uint8_t *p, kept[6];
	uint32_t i;

	if (burst->abi != RTAP_STAGE_ABI)
		return -EPROTO;
	for (i = 0; i < burst->n; i++) {
		p = burst->data[i];
		if (burst->len[i] < 36 || p[12] != 8 || p[13] != 0) {
			burst->verdict[i] = RTAP_DROP;
			continue;
		}
		memcpy(kept, p, 6);
		memcpy(p, p + 6, 6);
		memcpy(p + 6, kept, 6);
		burst->verdict[i] = p[35] & 1;
	}
	*count += burst->n;
	return 0;
}
