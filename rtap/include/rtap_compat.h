/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Things that Cython cannot express (atomics, a lock for short critical sections), and
 * kernel constants that older headers lack.  Values are kernel ABI, from
 * linux/if_tun.h, linux/virtio_net.h, linux/io_uring.h, linux/fs.h, linux/memfd.h and linux/fcntl.h.
 */
#ifndef RTAP_COMPAT_H
#define RTAP_COMPAT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#include <linux/fs.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <liburing.h>

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 0x00000008
#endif
#ifndef IOSQE_CQE_SKIP_SUCCESS
#define IOSQE_CQE_SKIP_SUCCESS (1U << 6)
#endif
#ifndef IORING_FEAT_CQE_SKIP
#define IORING_FEAT_CQE_SKIP (1U << 11)
#endif
#ifndef IORING_SETUP_SUBMIT_ALL
#define IORING_SETUP_SUBMIT_ALL (1U << 7)
#endif
#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#endif
#ifndef VIRTIO_NET_HDR_GSO_UDP_L4
#define VIRTIO_NET_HDR_GSO_UDP_L4 5
#endif
#ifndef MFD_CLOEXEC
#define MFD_CLOEXEC 0x0001U
#endif
#ifndef MFD_ALLOW_SEALING
#define MFD_ALLOW_SEALING 0x0002U
#endif
#ifndef F_ADD_SEALS
#define F_ADD_SEALS 1033
#define F_SEAL_SEAL 0x0001
#define F_SEAL_SHRINK 0x0002
#define F_SEAL_GROW 0x0004
#endif
#ifndef F_GET_SEALS
#define F_GET_SEALS 1034
#endif
#ifndef F_OFD_SETLK
#define F_OFD_SETLK 37
#endif

/* -EBADFD has no constant in POSIX; TAP descriptors return it after deletion. */
#ifndef EBADFD
#define EBADFD 77
#endif

/* Assumptions of the code, checked in the checked and in the sanitizer build. */
#ifdef __has_feature
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(RTAP_CHECKED) || defined(__SANITIZE_ADDRESS__)
static inline void rtap_broken(const char *what, const char *function)
{
	fprintf(stderr, "rtap: %s: not true: %s\n", function, what);
	abort();
}
#define rtap_assert(holds) ((holds) ? (void)0 : rtap_broken(#holds, __func__))
#else
#define rtap_assert(holds) ((void)0)
#endif

/* Forbid and allow access to bytes; for the address sanitizer. */
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define RTAP_POISONS 1
#define rtap_poison(p, n) __asan_poison_memory_region(p, n)
#define rtap_unpoison(p, n) __asan_unpoison_memory_region(p, n)
#else
#define RTAP_POISONS 0
#define rtap_poison(p, n) ((void)0)
#define rtap_unpoison(p, n) ((void)0)
#endif

/* Bits of an mbuf's ol_flags that the native functions use, with DPDK's values. */
#define RTAP_RX_L4_CKSUM_BAD	(UINT64_C(1) << 3)
#define RTAP_RX_L4_CKSUM_GOOD	(UINT64_C(1) << 8)
#define RTAP_RX_L4_CKSUM_NONE	(RTAP_RX_L4_CKSUM_BAD | RTAP_RX_L4_CKSUM_GOOD)
#define RTAP_RX_IP_CKSUM_BAD	(UINT64_C(1) << 4)
#define RTAP_RX_IP_CKSUM_GOOD	(UINT64_C(1) << 7)
#define RTAP_RX_OUTER_IP_CKSUM_BAD	(UINT64_C(1) << 5)
#define RTAP_RX_OUTER_L4_CKSUM_BAD	(UINT64_C(1) << 21)
#define RTAP_RX_OUTER_L4_CKSUM_GOOD	(UINT64_C(1) << 22)
#define RTAP_RX_CKSUM_MASK \
	(RTAP_RX_L4_CKSUM_NONE | RTAP_RX_IP_CKSUM_BAD | RTAP_RX_IP_CKSUM_GOOD | \
	 RTAP_RX_OUTER_IP_CKSUM_BAD | RTAP_RX_OUTER_L4_CKSUM_BAD | RTAP_RX_OUTER_L4_CKSUM_GOOD)
#define RTAP_RX_LRO		(UINT64_C(1) << 16)
/* The receive offloads of a queue that check checksums; also with DPDK's values. */
#define RTAP_RX_OFFLOAD_IPV4_CKSUM	(UINT64_C(1) << 1)
#define RTAP_RX_OFFLOAD_UDP_CKSUM	(UINT64_C(1) << 2)
#define RTAP_RX_OFFLOAD_TCP_CKSUM	(UINT64_C(1) << 3)
#define RTAP_RX_OFFLOAD_CKSUM \
	(RTAP_RX_OFFLOAD_IPV4_CKSUM | RTAP_RX_OFFLOAD_UDP_CKSUM | RTAP_RX_OFFLOAD_TCP_CKSUM)
#define RTAP_RX_IP_CKSUM_MASK \
	(RTAP_RX_IP_CKSUM_BAD | RTAP_RX_IP_CKSUM_GOOD | RTAP_RX_OUTER_IP_CKSUM_BAD)
#define RTAP_TX_UDP_SEG		(UINT64_C(1) << 42)
#define RTAP_TX_TUNNEL_MASK	(UINT64_C(0xf) << 45)
#define RTAP_TX_QINQ		(UINT64_C(1) << 49)
#define RTAP_TX_TCP_SEG		(UINT64_C(1) << 50)
#define RTAP_TX_TCP_CKSUM	(UINT64_C(1) << 52)
#define RTAP_TX_UDP_CKSUM	(UINT64_C(3) << 52)
#define RTAP_TX_L4_MASK		(UINT64_C(3) << 52)
#define RTAP_TX_IP_CKSUM	(UINT64_C(1) << 54)
#define RTAP_TX_VLAN		(UINT64_C(1) << 57)
#define RTAP_TX_CKSUM_REQUESTS \
	(RTAP_TX_UDP_SEG | RTAP_TX_TCP_SEG | RTAP_TX_L4_MASK | RTAP_TX_IP_CKSUM)
#define RTAP_TX_REQUESTS	(RTAP_TX_CKSUM_REQUESTS | RTAP_TX_QINQ | RTAP_TX_VLAN)
/* A frame without any of these is sent as it is: requests, and the flags of keeps_vnet_hdr(). */
#define RTAP_TX_SPECIAL		(RTAP_TX_REQUESTS | RTAP_RX_LRO | RTAP_RX_L4_CKSUM_BAD)

static inline uint32_t rtap_load(const uint32_t *p)
{
	return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}

static inline uint32_t rtap_load_relaxed(const uint32_t *p)
{
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

/* One word of a frame that another thread may be resizing.  Any of its values will do; an atomic
 * load would keep the compiler from folding it into a comparison. */
static inline uint32_t rtap_peek(const uint32_t *p)
{
#ifdef __SANITIZE_THREAD__
	return rtap_load_relaxed(p);
#else
	return *p;
#endif
}

static inline void rtap_store(uint32_t *p, uint32_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELEASE);
}

static inline uint32_t rtap_fetch_add(uint32_t *p, uint32_t v)
{
	return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}

/* Sequentially consistent, as is rtap_cas: of two threads that each write one
 * word and then read the other's, at least one sees the other's write. */
static inline uint32_t rtap_exchange(uint32_t *p, uint32_t v)
{
	return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);
}

/* Subtracts and returns the difference. */
static inline uint32_t rtap_sub_fetch(uint32_t *p, uint32_t v)
{
	return __atomic_sub_fetch(p, v, __ATOMIC_ACQ_REL);
}

/* 1 when *p went from `from` to `to`, else 0. */
static inline int rtap_cas(uint32_t *p, uint32_t from, uint32_t to)
{
	return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
}

/* Position of the highest bit set, from 0; of a number other than 0. */
static inline uint32_t rtap_log2(uint32_t v)
{
	return 31 ^ (uint32_t)__builtin_clz(v);
}

/* Statistics have one writer and many readers: plain stores would tear on
 * 32-bit machines and be a data race everywhere. */
static inline uint64_t rtap_counter_read(const uint64_t *p)
{
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline void rtap_counter_set(uint64_t *p, uint64_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELAXED);
}

static inline void rtap_counter_add(uint64_t *p, uint64_t v)
{
	__atomic_store_n(p, __atomic_load_n(p, __ATOMIC_RELAXED) + v, __ATOMIC_RELAXED);
}

/* A lock for critical sections of well under a microsecond, usable with and
 * without the GIL.  A waiter yields, so that a preempted holder can finish. */
static inline int rtap_trylock(uint32_t *lock)
{
	return rtap_load_relaxed(lock) == 0 &&
	       __atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE) == 0;
}

static inline void rtap_lock(uint32_t *lock)
{
	unsigned int spins = 0;

	while (!rtap_trylock(lock)) {
		if (++spins >= 64) {
			sched_yield();
			spins = 0;
		}
	}
}

static inline void rtap_unlock(uint32_t *lock)
{
	rtap_store(lock, 0);
}

/* Around steps that the GIL makes atomic in other builds. */
static inline void rtap_step_lock(uint32_t *lock)
{
#ifdef Py_GIL_DISABLED
	rtap_lock(lock);
#else
	(void)lock;
#endif
}

static inline void rtap_step_unlock(uint32_t *lock)
{
#ifdef Py_GIL_DISABLED
	rtap_unlock(lock);
#else
	(void)lock;
#endif
}

/* glibc makes read and write cancellation points, which costs each call two atomic
 * operations in a threaded process.  Nobody cancels our threads. */
static inline ssize_t rtap_read(int fd, void *buf, size_t n)
{
	return syscall(SYS_read, fd, buf, n);
}

static inline ssize_t rtap_recvmsg(int fd, struct msghdr *msg, int flags)
{
	return syscall(SYS_recvmsg, fd, msg, flags);
}

/* Many messages in one call, none of which waits. */
static inline int rtap_recvmmsg(int fd, struct mmsghdr *msgs, unsigned int n)
{
	return (int)syscall(SYS_recvmmsg, fd, msgs, n, MSG_DONTWAIT, NULL);
}

static inline int rtap_sendmmsg(int fd, struct mmsghdr *msgs, unsigned int n)
{
	return (int)syscall(SYS_sendmmsg, fd, msgs, n, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* The control message that says where datagrams end in one buffer: UDP_SEGMENT
 * and UDP_GRO of linux/udp.h, which older headers lack. */
#define RTAP_SOL_UDP 17
#define RTAP_UDP_SEGMENT 103
#define RTAP_UDP_GRO 104

static inline void rtap_set_segment(struct msghdr *m, void *control, uint16_t size)
{
	struct cmsghdr *c = (struct cmsghdr *)control;

	memset(control, 0, CMSG_SPACE(sizeof(size)));
	m->msg_control = control;
	m->msg_controllen = CMSG_SPACE(sizeof(size));
	c->cmsg_level = RTAP_SOL_UDP;
	c->cmsg_type = RTAP_UDP_SEGMENT;
	c->cmsg_len = CMSG_LEN(sizeof(size));
	memcpy(CMSG_DATA(c), &size, sizeof(size));
}

/* 0 when the message is one datagram. */
static inline uint32_t rtap_get_segment(struct msghdr *m)
{
	struct cmsghdr *c;
	int size;

	for (c = CMSG_FIRSTHDR(m); c != NULL; c = CMSG_NXTHDR(m, c)) {
		if (c->cmsg_level == RTAP_SOL_UDP && c->cmsg_type == RTAP_UDP_GRO &&
		    c->cmsg_len >= CMSG_LEN(sizeof(size))) {
			memcpy(&size, CMSG_DATA(c), sizeof(size));
			return size > 0 ? (uint32_t)size : 0;
		}
	}
	return 0;
}

static inline int rtap_getsockname(int fd, void *address, unsigned int *n)
{
	return getsockname(fd, (struct sockaddr *)address, n);
}

static inline ssize_t rtap_write(int fd, const void *buf, size_t n)
{
	return syscall(SYS_write, fd, buf, n);
}

static inline ssize_t rtap_readv(int fd, const struct iovec *iov, int count)
{
	return syscall(SYS_readv, fd, iov, count);
}

static inline ssize_t rtap_writev(int fd, const struct iovec *iov, int count)
{
	return syscall(SYS_writev, fd, iov, count);
}

/* The same for a descriptor that somebody else may have made blocking; these never block.
 * With RWF_NOWAIT preadv2(2) takes 60 to 90 ns more than read(2).  A kernel that lacks it on TAP
 * descriptors (before Linux 6.4) is polled first. */
static inline ssize_t rtap_vectored_now(long nowait, long plain, short events, int fd,
					const struct iovec *iov, int count)
{
	struct pollfd ready = {fd, events, 0};
	ssize_t n = syscall(nowait, fd, iov, count, -1L, -1L, RWF_NOWAIT);

	if (n >= 0 || (errno != EOPNOTSUPP && errno != ENOSYS))
		return n;
	if (poll(&ready, 1, 0) <= 0) {
		errno = EAGAIN;
		return -1;
	}
	return syscall(plain, fd, iov, count);
}

static inline ssize_t rtap_readv_now(int fd, const struct iovec *iov, int count)
{
	return rtap_vectored_now(SYS_preadv2, SYS_readv, POLLIN, fd, iov, count);
}

static inline ssize_t rtap_writev_now(int fd, const struct iovec *iov, int count)
{
	return rtap_vectored_now(SYS_pwritev2, SYS_writev, POLLOUT, fd, iov, count);
}

/* A sparse table of registered buffers (io_uring_register(2), Linux 5.19).  liburing
 * wraps it from 2.2 on; with these two, 2.0 will do.  0 or -errno. */
#ifndef __NR_io_uring_register
#define __NR_io_uring_register 427
#endif

static inline int rtap_register_buffers_sparse(int ring_fd, uint32_t n)
{
	struct { uint32_t nr, flags; uint64_t resv2, data, tags; } reg;

	memset(&reg, 0, sizeof(reg));
	reg.nr = n;
	reg.flags = 1U;		/* IORING_RSRC_REGISTER_SPARSE */
	return syscall(__NR_io_uring_register, ring_fd, 15 /* IORING_REGISTER_BUFFERS2 */,
		       &reg, sizeof(reg)) < 0 ? -errno : 0;
}

/* Puts a buffer at an index of that table; NULL, 0 removes it. */
static inline int rtap_update_buffer(int ring_fd, uint32_t index, void *base, size_t len)
{
	struct { uint32_t offset, resv; uint64_t data, tags; uint32_t nr, resv2; } up;
	struct iovec iov = { base, len };

	memset(&up, 0, sizeof(up));
	up.offset = index;
	up.data = (uint64_t)(uintptr_t)&iov;
	up.nr = 1;
	return syscall(__NR_io_uring_register, ring_fd, 16 /* IORING_REGISTER_BUFFERS_UPDATE */,
		       &up, sizeof(up)) < 0 ? -errno : 0;
}

/* Makes an entry cancel everything that is armed on its ring; from Linux 5.19 on. */
static inline void rtap_prep_cancel_all(struct io_uring_sqe *sqe)
{
	io_uring_prep_nop(sqe);
	sqe->opcode = IORING_OP_ASYNC_CANCEL;
	sqe->cancel_flags = 5U;		/* IORING_ASYNC_CANCEL_ALL | IORING_ASYNC_CANCEL_ANY */
}

/* The same without an entry, for a ring that takes no more; from Linux 6.0 on. */
static inline int rtap_cancel_all_now(int ring_fd)
{
	struct {
		uint64_t addr;
		int32_t fd;
		uint32_t flags;
		int64_t seconds, nanoseconds;
		uint64_t pad[4];
	} reg;

	memset(&reg, 0, sizeof(reg));
	reg.flags = 5U;
	reg.seconds = 1;
	return syscall(__NR_io_uring_register, ring_fd, 24 /* IORING_REGISTER_SYNC_CANCEL */,
		       &reg, 1) < 0 ? -errno : 0;
}

/* Waits until that many completions are there, but not for long. */
static inline int rtap_wait_completions(struct io_uring *ring, unsigned int n, int ms)
{
	struct __kernel_timespec ts = { 0, ms * 1000000L };
	struct io_uring_cqe *cqe;

	return io_uring_wait_cqes(ring, &cqe, n, &ts, NULL);
}

/* Words that processes share.  Whatever another one writes there, each is read once. */
static inline uint64_t rtap_load64(const uint64_t *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static inline void rtap_store64(uint64_t *p, uint64_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELEASE);
}

static inline int rtap_cas64(uint64_t *p, uint64_t from, uint64_t to)
{
	return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
}

static inline void rtap_add64(uint64_t *p, uint64_t v)
{
	__atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}

static inline void rtap_snapshot(uint64_t *to, const uint64_t *from, uint32_t words)
{
	while (words--)
		*to++ = __atomic_load_n(from++, __ATOMIC_RELAXED);
}

static inline uint8_t rtap_exchange8(uint8_t *p, uint8_t v)
{
	return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL);
}

static inline void rtap_store8(uint8_t *p, uint8_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELEASE);
}

static inline uint32_t rtap_fetch_or(uint32_t *p, uint32_t v)
{
	return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);
}

static inline uint32_t rtap_fetch_and(uint32_t *p, uint32_t v)
{
	return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);
}

static inline void rtap_fence(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* In a loop that waits for another core. */
static inline void rtap_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
	__asm__ volatile("yield" ::: "memory");
#else
	__asm__ volatile("" ::: "memory");
#endif
}

static inline void rtap_prefetch(const void *p)
{
	__builtin_prefetch(p, 1);
}

/* Whether other processes see a 64-bit word change in one step. */
static inline int rtap_whole_words(void)
{
	return __atomic_always_lock_free(sizeof(uint64_t), 0);
}

/* The size of a file; 0 or -errno. */
static inline int rtap_file_size(int fd, uint64_t *size)
{
	struct stat st;

	if (fstat(fd, &st) != 0)
		return -errno;
	*size = (uint64_t)st.st_size;
	return 0;
}

/* Locks one byte of a file for an open file description, or unlocks it, without waiting: 0 or
 * -errno.  The kernel drops the lock when the description's last descriptor is closed. */
static inline int rtap_lock_byte(int fd, int kind, uint32_t at)
{
	struct flock lock;

	memset(&lock, 0, sizeof(lock));
	lock.l_type = (short)kind;
	lock.l_whence = SEEK_SET;
	lock.l_start = (off_t)at;
	lock.l_len = 1;
	return fcntl(fd, F_OFD_SETLK, &lock) == 0 ? 0 : -errno;
}

/* Another open file description of the same file; a descriptor, or -errno. */
static inline int rtap_open_again(int fd)
{
	char path[32];
	int again;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	again = open(path, O_RDWR | O_CLOEXEC);
	return again >= 0 ? again : -errno;
}

/* Sleep while a word that processes share has a value, and wake all that do. */
static inline void rtap_futex_wait(uint32_t *word, uint32_t value, int ms)
{
#if defined(SYS_futex_time64) && !defined(SYS_futex)
	int64_t ts[2] = { ms / 1000, ms % 1000 * 1000000 };

	syscall(SYS_futex_time64, word, 0 /* FUTEX_WAIT */, value, ts, NULL, 0);
#else
	long ts[2] = { ms / 1000, ms % 1000 * 1000000L };

	syscall(SYS_futex, word, 0 /* FUTEX_WAIT */, value, ts, NULL, 0);
#endif
}

static inline void rtap_futex_wake(uint32_t *word)
{
#if defined(SYS_futex_time64) && !defined(SYS_futex)
	syscall(SYS_futex_time64, word, 1 /* FUTEX_WAKE */, INT32_MAX, NULL, NULL, 0);
#else
	syscall(SYS_futex, word, 1 /* FUTEX_WAKE */, INT32_MAX, NULL, NULL, 0);
#endif
}

/* CLOCK_MONOTONIC in nanoseconds. */
static inline uint64_t rtap_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* For counters that several threads add to. */
static inline void rtap_shared_add(uint64_t *p, uint64_t v)
{
	__atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}

/* A counter that is cheap to read and steady: the processor's own, or nanoseconds. */
static inline uint64_t rtap_cycles(void)
{
#if defined(__x86_64__) || defined(__i386__)
	return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
	uint64_t n;

	__asm__ volatile("mrs %0, cntvct_el0" : "=r"(n));
	return n;
#else
	return rtap_now_ns();
#endif
}

#endif
