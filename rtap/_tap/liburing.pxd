# SPDX-License-Identifier: BSD-3-Clause
"""liburing externs, the part rtap uses (liburing 2.0 and newer; see io_uring_setup(2))."""

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t, uint8_t

from rtap._core.linux cimport iovec, msghdr

cdef extern from "rtap_compat.h" nogil:
    const unsigned int IORING_SETUP_SUBMIT_ALL
    const unsigned int IORING_SETUP_COOP_TASKRUN
    const unsigned int IORING_FEAT_CQE_SKIP
    const unsigned int IOSQE_FIXED_FILE
    const unsigned int IOSQE_IO_LINK
    const unsigned int IOSQE_CQE_SKIP_SUCCESS

    struct io_uring_sqe:
        uint8_t flags
        int rw_flags
        uint64_t user_data

    struct io_uring_cqe:
        uint64_t user_data
        int32_t res

    struct io_uring_params:
        uint32_t flags
        uint32_t features
        uint32_t sq_entries

    struct io_uring:
        int ring_fd

    int io_uring_queue_init_params(unsigned int entries, io_uring *ring, io_uring_params *p)
    void io_uring_queue_exit(io_uring *ring)
    int io_uring_register_files(io_uring *ring, const int *files, unsigned int n)
    int io_uring_register_files_update(io_uring *ring, unsigned int off, int *files, unsigned int n)
    int io_uring_unregister_files(io_uring *ring)
    int register_buffers_sparse "rtap_register_buffers_sparse" (int ring_fd, uint32_t n)
    int update_buffer "rtap_update_buffer" (int ring_fd, uint32_t index, void *base, size_t n)
    void prep_cancel_all "rtap_prep_cancel_all" (io_uring_sqe *sqe)
    int cancel_all_now "rtap_cancel_all_now" (int ring_fd)
    int wait_completions "rtap_wait_completions" (io_uring *ring, unsigned int n, int ms)

    io_uring_sqe *io_uring_get_sqe(io_uring *ring)
    unsigned int io_uring_sq_ready(const io_uring *ring)
    unsigned int io_uring_cq_ready(const io_uring *ring)
    int io_uring_submit(io_uring *ring)
    int io_uring_submit_and_wait(io_uring *ring, unsigned int wait_nr)
    unsigned int io_uring_peek_batch_cqe(io_uring *ring, io_uring_cqe **cqes, unsigned int n)
    void io_uring_cq_advance(io_uring *ring, unsigned int n)

    void io_uring_prep_read(io_uring_sqe *sqe, int fd, void *buf, unsigned int n, uint64_t offset)
    void io_uring_prep_write(io_uring_sqe *sqe, int fd, const void *buf, unsigned int n,
                             uint64_t offset)
    void io_uring_prep_readv(io_uring_sqe *sqe, int fd, const iovec *iov, unsigned int n,
                             uint64_t offset)
    void io_uring_prep_writev(io_uring_sqe *sqe, int fd, const iovec *iov, unsigned int n,
                              uint64_t offset)
    void io_uring_prep_recvmsg(io_uring_sqe *sqe, int fd, msghdr *msg, unsigned int flags)
    void io_uring_prep_read_fixed(io_uring_sqe *sqe, int fd, void *buf, unsigned int n,
                                  uint64_t offset, int buf_index)
    void io_uring_prep_write_fixed(io_uring_sqe *sqe, int fd, const void *buf, unsigned int n,
                                   uint64_t offset, int buf_index)
