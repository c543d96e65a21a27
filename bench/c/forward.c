// SPDX-License-Identifier: BSD-3-Clause
/*
 * The closed loop in C: it reads from TAP A and writes to TAP B. The caller redirects B's ingress
 * to A (see rig.py), so preloaded frames go round for ever and the forwarder always has frames.
 *
 *   forward --mode read     read(2) and write(2), a frame at a time
 *   forward --mode uring    64 reads in one io_uring_enter, then the writes in a second one
 *   forward --mode uring1   writes of one batch and reads of the next in the same enter
 *
 * Further commands: "preload N" -> "preloaded N"; "drain" takes every waiting frame off A and
 * answers "drained <frames> <distinct sequence numbers>".
 */
#include <getopt.h>

#include "ring.h"

#define SEQ_MAX 65536

enum mode { MODE_READ, MODE_URING, MODE_URING1 };

struct forwarder {
	int a, b;
	enum mode mode;
	uint8_t *arena;
	unsigned held; /* frames read but not written yet (uring1) */
	unsigned len[BENCH_BATCH];
	uint8_t *data[BENCH_BATCH];
	unsigned bank;
	struct io_uring ring;
};

static void step_read(struct slice *s, void *arg)
{
	struct forwarder *f = arg;

	for (unsigned i = 0; i < BENCH_BATCH; i++) {
		ssize_t n = read(f->a, f->arena, BENCH_SLOT);

		if (n < 0)
			return;
		if (write(f->b, f->arena, (size_t)n) < 0)
			s->errors++;
		else
			s->frames++;
	}
}

static void put_reads(struct forwarder *f)
{
	uint8_t *base = f->arena + (size_t)f->bank * BENCH_BATCH * BENCH_SLOT;

	for (unsigned i = 0; i < BENCH_BATCH; i++)
		ring_read(&f->ring, 0, base + i * BENCH_SLOT, BENCH_SLOT, i);
}

static void put_writes(struct forwarder *f)
{
	for (unsigned i = 0; i < f->held; i++)
		ring_write(&f->ring, 1, f->data[i], f->len[i]);
}

/* Takes the completions: a read gives a held frame; only a failed write completes. */
static unsigned reap(struct forwarder *f, bool reads)
{
	uint8_t *base = f->arena + (size_t)f->bank * BENCH_BATCH * BENCH_SLOT;
	struct io_uring_cqe *cqe;
	unsigned head, n = 0, failed = 0;

	if (reads)
		f->held = 0;
	io_uring_for_each_cqe(&f->ring, head, cqe) {
		n++;
		if (cqe->user_data == UINT64_MAX) {
			failed++;
		} else if (cqe->res > 0) {
			f->data[f->held] = base + cqe->user_data * BENCH_SLOT;
			f->len[f->held++] = (unsigned)cqe->res;
		}
	}
	io_uring_cq_advance(&f->ring, n);
	return failed;
}

static void flush(struct slice *s, void *arg)
{
	struct forwarder *f = arg;
	unsigned failed;

	if (f->mode == MODE_READ || !f->held)
		return;
	put_writes(f);
	ring_enter(&f->ring);
	failed = reap(f, false);
	s->errors += failed;
	s->frames += f->held - failed;
	f->held = 0;
}

static void step_uring(struct slice *s, void *arg)
{
	struct forwarder *f = arg;

	put_reads(f);
	ring_enter(&f->ring);
	reap(f, true);
	flush(s, f);
}

static void step_uring1(struct slice *s, void *arg)
{
	struct forwarder *f = arg;
	unsigned sent = f->held, failed;

	put_writes(f);
	f->bank ^= 1; /* the writes still read the other bank */
	put_reads(f);
	ring_enter(&f->ring);
	failed = reap(f, true);
	s->errors += failed;
	s->frames += sent - failed;
}

static bool command(const char *line, void *arg)
{
	struct forwarder *f = arg;
	uint8_t frame[BENCH_SLOT];
	static bool seen[SEQ_MAX];
	unsigned n, distinct = 0;

	if (sscanf(line, "preload %u", &n) == 1) {
		frame_init(frame, BENCH_ETHERTYPE);
		for (unsigned i = 0; i < n; i++) {
			frame_stamp(frame, i);
			if (write(f->b, frame, BENCH_FRAME) < 0)
				die("preload");
		}
		printf("preloaded %u\n", n);
	} else if (!strncmp(line, "drain", 5)) {
		memset(seen, 0, sizeof(seen));
		for (n = 0; read(f->a, frame, sizeof(frame)) == BENCH_FRAME; n++) {
			uint64_t seq = frame_seq(frame);

			if (seq < SEQ_MAX && !seen[seq]) {
				seen[seq] = true;
				distinct++;
			}
		}
		printf("drained %u %u\n", n, distinct);
	} else {
		return false;
	}
	fflush(stdout);
	return true;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "mode", required_argument, NULL, 'm' },
		{ "in", required_argument, NULL, 'a' },
		{ "out", required_argument, NULL, 'b' },
		{ NULL, 0, NULL, 0 },
	};
	struct forwarder f = { .mode = MODE_URING };
	const char *in = "A", *out = "B", *mode = "uring";
	int opt, fds[2];

	while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (opt) {
		case 'm': mode = optarg; break;
		case 'a': in = optarg; break;
		case 'b': out = optarg; break;
		default: return 2;
		}
	}
	if (!strcmp(mode, "read"))
		f.mode = MODE_READ;
	else if (!strcmp(mode, "uring1"))
		f.mode = MODE_URING1;
	else if (strcmp(mode, "uring")) {
		fprintf(stderr, "--mode is read, uring or uring1, not %s\n", mode);
		return 2;
	}
	fds[0] = f.a = tap_open(in, false, 4096, O_NONBLOCK);
	fds[1] = f.b = tap_open(out, false, 1000, O_NONBLOCK);
	f.arena = arena_new(2 * BENCH_BATCH);
	if (f.mode != MODE_READ)
		ring_open(&f.ring, 2 * BENCH_BATCH, fds, 2, f.arena, 2 * BENCH_BATCH);
	printf("ready %s %s\n", in, out);
	fflush(stdout);
	serve(f.mode == MODE_READ ? step_read : f.mode == MODE_URING ? step_uring : step_uring1,
	      flush, command, &f);
	return 0;
}
