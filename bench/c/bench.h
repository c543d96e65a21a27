/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Shared by the C programs: a TAP of their own, frames with a sequence number, clocks, and the line
 * protocol on stdin/stdout by which one process runs many short slices on command.
 *
 *   go <seconds>   -> "<frames> <cpu_ns> <wall_ns> <errors>"
 *   quit or EOF    -> the process ends and its interfaces with it
 */
#ifndef RTAP_BENCH_H
#define RTAP_BENCH_H

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BENCH_ETHERTYPE 0x88b5 /* IEEE 802, local experimental 1: no protocol takes these frames */
#define BENCH_FRAME 64
#define BENCH_SLOT 2048
#define BENCH_BATCH 64
#define BENCH_SEQ_OFFSET 16 /* 8-aligned in the frame, host byte order */

static void __attribute__((noreturn, format(printf, 1, 2))) die(const char *fmt, ...)
{
	int code = errno;
	va_list ap;

	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, ": %s\n", strerror(code));
	exit(1);
}

static inline uint64_t clock_ns(clockid_t id)
{
	struct timespec ts;

	clock_gettime(id, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Opens (or creates) the TAP, brings it up and sets its queue length. With vnet, each frame has a
 * 10-byte virtio-net header, as in rtap. flags is O_NONBLOCK or 0: on a blocking descriptor the
 * kernel builds packets in a slower way. */
static int tap_open(const char *name, bool vnet, int txqueuelen, int flags)
{
	struct ifreq ifr;
	int sock, fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC | flags);

	if (fd < 0)
		die("open /dev/net/tun");
	memset(&ifr, 0, sizeof(ifr));
	snprintf(ifr.ifr_name, IFNAMSIZ, "%s", name);
	ifr.ifr_flags = IFF_TAP | IFF_NO_PI | (vnet ? IFF_VNET_HDR : 0);
	if (ioctl(fd, TUNSETIFF, &ifr) < 0)
		die("TUNSETIFF %s", name);
	sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (sock < 0)
		die("socket");
	ifr.ifr_qlen = txqueuelen;
	if (ioctl(sock, SIOCSIFTXQLEN, &ifr) < 0)
		die("SIOCSIFTXQLEN %s", name);
	if (ioctl(sock, SIOCGIFFLAGS, &ifr) < 0)
		die("SIOCGIFFLAGS %s", name);
	ifr.ifr_flags |= IFF_UP;
	if (ioctl(sock, SIOCSIFFLAGS, &ifr) < 0)
		die("SIOCSIFFLAGS %s", name);
	close(sock);
	return fd;
}

/* A zeroed, page-aligned arena of n slots. */
static uint8_t *arena_new(size_t n)
{
	void *p = mmap(NULL, n * BENCH_SLOT, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (p == MAP_FAILED)
		die("mmap");
	return p;
}

/* The addresses are locally administered unicast; no interface has the destination. */
static void frame_init(uint8_t *frame, uint16_t ethertype)
{
	static const uint8_t addresses[12] = { 2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1 };
	uint16_t type = htons(ethertype);

	memset(frame, 0, BENCH_FRAME);
	memcpy(frame, addresses, sizeof(addresses));
	memcpy(frame + 12, &type, sizeof(type));
}

static inline void frame_stamp(uint8_t *frame, uint64_t seq)
{
	memcpy(frame + BENCH_SEQ_OFFSET, &seq, sizeof(seq));
}

static inline uint64_t frame_seq(const uint8_t *frame)
{
	uint64_t seq;

	memcpy(&seq, frame + BENCH_SEQ_OFFSET, sizeof(seq));
	return seq;
}

struct slice {
	uint64_t deadline, frames, errors;
};

/* Runs slices on command with step(), which moves one batch and adds to the counts. */
static void __attribute__((unused))
serve(void (*step)(struct slice *, void *), void (*flush)(struct slice *, void *),
      bool (*command)(const char *, void *), void *arg)
{
	char line[64];

	while (fgets(line, sizeof(line), stdin)) {
		struct slice s = { 0, 0, 0 };
		uint64_t cpu, wall;
		double seconds;

		if (sscanf(line, "go %lf", &seconds) != 1) {
			if (!strncmp(line, "quit", 4))
				break;
			if (command && command(line, arg))
				continue;
			fprintf(stderr, "unknown command: %s", line);
			exit(2);
		}
		cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID);
		wall = clock_ns(CLOCK_MONOTONIC);
		s.deadline = wall + (uint64_t)(seconds * 1e9);
		while (clock_ns(CLOCK_MONOTONIC) < s.deadline)
			step(&s, arg);
		if (flush)
			flush(&s, arg);
		wall = clock_ns(CLOCK_MONOTONIC) - wall;
		cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID) - cpu;
		printf("%llu %llu %llu %llu\n", (unsigned long long)s.frames,
		       (unsigned long long)cpu, (unsigned long long)wall,
		       (unsigned long long)s.errors);
		fflush(stdout);
	}
}

#endif
