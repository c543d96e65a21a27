# SPDX-License-Identifier: BSD-3-Clause
"""Kernel and libc externs: virtio_net.h, poll(2), pthread keys, errno values. No code."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "rtap_compat.h" nogil:
    const int RWF_NOWAIT
    const int MFD_CLOEXEC
    const int MFD_ALLOW_SEALING
    const int F_ADD_SEALS
    const int F_GET_SEALS
    const int F_SEAL_SEAL
    const int F_SEAL_SHRINK
    const int F_SEAL_GROW
    const int F_DUPFD_CLOEXEC
    const int F_RDLCK
    const int F_WRLCK
    const int F_UNLCK
    int file_size "rtap_file_size" (int fd, uint64_t *size)
    int lock_byte "rtap_lock_byte" (int fd, int kind, uint32_t at)
    int open_again "rtap_open_again" (int fd)

    # linux/virtio_net.h; little-endian on the wire (TUNSETVNETLE).
    const int VIRTIO_NET_HDR_F_NEEDS_CSUM
    const int VIRTIO_NET_HDR_F_DATA_VALID
    const int VIRTIO_NET_HDR_GSO_NONE
    const int VIRTIO_NET_HDR_GSO_TCPV4
    const int VIRTIO_NET_HDR_GSO_UDP
    const int VIRTIO_NET_HDR_GSO_TCPV6
    const int VIRTIO_NET_HDR_GSO_UDP_L4
    const int VIRTIO_NET_HDR_GSO_ECN

    const int EAGAIN
    const int EBADF
    const int EBADFD
    const int ECANCELED
    const int ECONNREFUSED
    const int EDESTADDRREQ
    const int EHOSTUNREACH
    const int EINTR
    const int EINVAL
    const int EIO
    const int EMSGSIZE
    const int ENOBUFS
    const int ENETDOWN
    const int ENODEV
    const int ENETUNREACH
    const int ENOMEM
    const int EPROTO
    const int EINPROGRESS
    const int EOPNOTSUPP
    const int EPERM
    const int ESHUTDOWN

    struct iovec:
        void *iov_base
        size_t iov_len

    struct msghdr:
        void *msg_name
        uint32_t msg_namelen
        int msg_flags
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
    const int MSG_DONTWAIT
    const int MSG_TRUNC
    struct mmsghdr:
        msghdr msg_hdr
        uint32_t msg_len
    int recvmmsg "rtap_recvmmsg" (int fd, mmsghdr *msgs, unsigned int n)
    int sendmmsg "rtap_sendmmsg" (int fd, mmsghdr *msgs, unsigned int n)
    void set_segment "rtap_set_segment" (msghdr *m, void *control, uint16_t size)
    uint32_t get_segment "rtap_get_segment" (msghdr *m)

    # read(2), write(2), readv(2), writev(2), recvmsg(2), none of them a cancellation point.
    ssize_t read "rtap_read" (int fd, void *buf, size_t n)
    ssize_t write "rtap_write" (int fd, const void *buf, size_t n)
    ssize_t recvmsg "rtap_recvmsg" (int fd, msghdr *msg, int flags)
    ssize_t readv "rtap_readv" (int fd, const iovec *iov, int count)
    ssize_t writev "rtap_writev" (int fd, const iovec *iov, int count)
    # The same, for a descriptor that somebody may have made blocking.
    ssize_t readv_now "rtap_readv_now" (int fd, const iovec *iov, int count)
    ssize_t writev_now "rtap_writev_now" (int fd, const iovec *iov, int count)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    int ftruncate(int fd, long long length)
    ssize_t pread(int fd, void *buf, size_t n, long long offset)
    int usleep(unsigned int microseconds)

cdef extern from "<poll.h>" nogil:
    const short POLLIN
    const short POLLOUT
    const short POLLERR
    const short POLLHUP
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout_ms)

cdef extern from "<sys/mman.h>" nogil:
    const int PROT_READ
    const int PROT_WRITE
    const int MAP_SHARED
    const int MAP_PRIVATE
    const int MAP_ANONYMOUS
    const int MADV_HUGEPAGE
    const int MREMAP_MAYMOVE
    const int MREMAP_FIXED
    void *MAP_FAILED
    void *mmap(void *addr, size_t n, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t n)
    void *mremap(void *addr, size_t n, size_t to, int flags, void *where)
    int madvise(void *addr, size_t n, int advice)
    int memfd_create(const char *name, unsigned int flags)

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned int pthread_key_t
    int pthread_key_create(pthread_key_t *key, void (*destructor)(void *) noexcept)
    void *pthread_getspecific(pthread_key_t key)
    int pthread_setspecific(pthread_key_t key, const void *value)
    int pthread_atfork(void (*prepare)() noexcept, void (*parent)() noexcept,
                       void (*child)() noexcept)

cdef extern from "<sys/eventfd.h>" nogil:
    const int EFD_CLOEXEC
    const int EFD_NONBLOCK
    int eventfd(unsigned int initval, int flags)

cdef extern from "<sys/epoll.h>" nogil:
    const int EPOLL_CLOEXEC
    const int EPOLL_CTL_ADD
    const int EPOLL_CTL_DEL
    const uint32_t EPOLLIN
    const uint32_t EPOLLERR
    ctypedef union epoll_data_t:
        uint32_t u32
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout_ms)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<fcntl.h>" nogil:
    const int O_CLOEXEC
    const int O_WRONLY
    int fcntl(int fd, int command, ...)
    int open_file "open" (const char *path, int flags)
