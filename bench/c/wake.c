// SPDX-License-Identifier: BSD-3-Clause
/*
 * Measures how long the kernel takes to wake a thread. One thread sleeps some milliseconds, notes
 * the time and writes to an eventfd. Another, on another core, waits in epoll_wait(2) and notes the
 * time when it returns.
 *
 *   wake COUNT CPU OTHER    -> COUNT lines, nanoseconds from before the write to after the wait
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

static int event, epoll, waiter_cpu;
static uint64_t woke;

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		perror("sched_setaffinity"), exit(1);
}

static void *waiter(void *arg)
{
	struct epoll_event e;
	uint64_t value, at;

	pin(waiter_cpu);
	for (;;) {
		if (epoll_wait(epoll, &e, 1, 20) != 1)
			continue;
		at = now();
		if (read(event, &value, sizeof(value)) != sizeof(value) || value > 1)
			return arg;
		__atomic_store_n(&woke, at, __ATOMIC_RELEASE);
	}
}

int main(int argc, char **argv)
{
	struct epoll_event e = { .events = EPOLLIN };
	uint64_t one = 1, end = 2, began, at;
	pthread_t thread;

	if (argc != 4)
		return fprintf(stderr, "usage: wake COUNT CPU OTHER\n"), 2;
	waiter_cpu = atoi(argv[2]);
	pin(atoi(argv[3]));
	event = eventfd(0, EFD_CLOEXEC);
	epoll = epoll_create1(EPOLL_CLOEXEC);
	if (event < 0 || epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, event, &e) ||
	    pthread_create(&thread, NULL, waiter, NULL))
		return perror("wake"), 1;
	srand(1);
	for (int i = 0; i < atoi(argv[1]); i++) {
		usleep(2000 + (unsigned)rand() % 4000);
		__atomic_store_n(&woke, 0, __ATOMIC_RELAXED);
		began = now();
		if (write(event, &one, sizeof(one)) != sizeof(one))
			return 1;
		while (!(at = __atomic_load_n(&woke, __ATOMIC_ACQUIRE)))
			;
		printf("%llu\n", (unsigned long long)(at - began));
	}
	if (write(event, &end, sizeof(end)) != sizeof(end))
		return 1;
	return pthread_join(thread, NULL) != 0;
}
