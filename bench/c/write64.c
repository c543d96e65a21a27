// SPDX-License-Identifier: BSD-3-Clause
/*
 * Sends 64-byte frames, no two alike, into a TAP, as fast as C can.
 *
 *   write64 --mode write   one write(2) per frame, the baseline
 *   write64 --mode uring   64 frames per io_uring_enter, the upper bound of rtap's engine
 *
 * --ifname NAME opens a TAP of its own, --fd N takes an inherited descriptor; --vnet puts a
 * virtio-net header before each frame, --ethertype HEX replaces 0x88b5, --blocking leaves
 * O_NONBLOCK off the descriptor that --ifname opens.
 */
#include <getopt.h>

#include "ring.h"

struct sender {
	int fd;
	unsigned offset; /* of the frame behind its virtio-net header */
	uint64_t seq;
	uint8_t *arena;
	struct io_uring ring;
};

static void step_write(struct slice *s, void *arg)
{
	struct sender *tx = arg;

	for (unsigned i = 0; i < BENCH_BATCH; i++) {
		uint8_t *slot = tx->arena + i * BENCH_SLOT;

		frame_stamp(slot + tx->offset, tx->seq++);
		if (write(tx->fd, slot, tx->offset + BENCH_FRAME) < 0)
			s->errors++;
		else
			s->frames++;
	}
}

static void step_uring(struct slice *s, void *arg)
{
	struct sender *tx = arg;
	struct io_uring_cqe *cqe;
	unsigned head, failed = 0;

	for (unsigned i = 0; i < BENCH_BATCH; i++) {
		uint8_t *slot = tx->arena + i * BENCH_SLOT;

		frame_stamp(slot + tx->offset, tx->seq++);
		ring_write(&tx->ring, 0, slot, tx->offset + BENCH_FRAME);
	}
	ring_enter(&tx->ring);
	io_uring_for_each_cqe(&tx->ring, head, cqe)
		failed++;
	io_uring_cq_advance(&tx->ring, failed);
	s->errors += failed;
	s->frames += BENCH_BATCH - failed;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "mode", required_argument, NULL, 'm' },   { "ifname", required_argument, NULL, 'i' },
		{ "fd", required_argument, NULL, 'f' },	    { "vnet", no_argument, NULL, 'v' },
		{ "ethertype", required_argument, NULL, 'e' }, { "blocking", no_argument, NULL, 'b' },
		{ NULL, 0, NULL, 0 },
	};
	struct sender tx = { .fd = -1 };
	const char *mode = "write", *ifname = "cwrite0";
	uint16_t ethertype = BENCH_ETHERTYPE;
	bool vnet = false, blocking = false;
	int opt;

	while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (opt) {
		case 'm': mode = optarg; break;
		case 'i': ifname = optarg; break;
		case 'f': tx.fd = atoi(optarg); break;
		case 'v': vnet = true; break;
		case 'b': blocking = true; break;
		case 'e': ethertype = (uint16_t)strtoul(optarg, NULL, 16); break;
		default: return 2;
		}
	}
	if (tx.fd < 0)
		tx.fd = tap_open(ifname, vnet, 1000, blocking ? 0 : O_NONBLOCK);
	tx.offset = vnet ? 10 : 0;
	tx.arena = arena_new(BENCH_BATCH);
	for (unsigned i = 0; i < BENCH_BATCH; i++)
		frame_init(tx.arena + i * BENCH_SLOT + tx.offset, ethertype);
	if (!strcmp(mode, "uring")) {
		ring_open(&tx.ring, BENCH_BATCH, &tx.fd, 1, tx.arena, BENCH_BATCH);
	} else if (strcmp(mode, "write")) {
		fprintf(stderr, "--mode is write or uring, not %s\n", mode);
		return 2;
	}
	printf("ready %s\n", ifname);
	fflush(stdout);
	serve(strcmp(mode, "uring") ? step_write : step_uring, NULL, NULL, &tx);
	return 0;
}
