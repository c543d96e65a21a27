# SPDX-License-Identifier: BSD-3-Clause
"""Rings: one for each thread that bursts, made on its first burst.

A burst is one ``io_uring_enter``: every entry completes before the call returns, so between bursts
a ring is empty and the kernel owns no buffer.  Descriptors and arenas are registered when a ring
first meets them, and forgotten in every ring before they go.

There are two ways to that.  Where a descriptor takes RWF_NOWAIT, every entry carries it.  TAP
descriptors take it from Linux 6.4 on.  Where it is refused, a read that finds no frame waits in the
ring for one, so the last entry of a batch of reads cancels all that still wait.  That takes Linux
5.19.
"""

from libc.errno cimport EAGAIN, EBUSY, EINTR, EINVAL, ENOMEM, ENOSYS, EPERM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset, strerror

cimport rtap._core.compat as _compat
cimport rtap._core.live as _live
from rtap._core.linux cimport (
    ECANCELED, EOPNOTSUPP, O_CLOEXEC, O_WRONLY, RWF_NOWAIT, close, open_file, pthread_atfork,
    pthread_getspecific, pthread_key_create, pthread_key_t, pthread_setspecific, sched_yield, write,
)
from rtap._core.pool cimport fork_generation, pool_on_gone, pool_t
from rtap._tap.liburing cimport (
    IORING_FEAT_CQE_SKIP, IORING_SETUP_COOP_TASKRUN, IORING_SETUP_SUBMIT_ALL,
    IOSQE_CQE_SKIP_SUCCESS, IOSQE_FIXED_FILE, io_uring_cq_advance, io_uring_cq_ready, io_uring_cqe,
    io_uring_get_sqe, io_uring_params, io_uring_peek_batch_cqe, io_uring_prep_read,
    io_uring_prep_write, io_uring_queue_exit, io_uring_queue_init_params, io_uring_register_files,
    io_uring_register_files_update, io_uring_sq_ready, io_uring_sqe, io_uring_submit,
    io_uring_unregister_files, cancel_all_now, prep_cancel_all, register_buffers_sparse,
    update_buffer, wait_completions,
)

import os
import re

cdef enum:
    PIN_AFTER = 16              # bursts from a pool before its arena is pinned
    PIN_ROOM_MAX = 16384        # larger slots gain nothing from it
    PIN_ARENA_MAX = 1 << 30     # the kernel's limit for one registered buffer
    SUBMIT_TRIES = 1000
    FINISH_TRIES = 100          # of FINISH_MS each: then a ring is given up
    FINISH_MS = 10
    FAILURES_MAX = 3            # within a second of each other: then give up
    FAILURES_NS = 1_000_000_000
    PROBE_BYTES = 1 << 17
    CALIBRATION_BATCH = 64
    CALIBRATION_ROUNDS = 32

cdef uring_t *all_rings = NULL
cdef uint32_t list_lock = 0
cdef uint32_t files_made = 0
cdef pthread_key_t ring_key
# Before Linux 6.4 the kernel lets go of one descriptor of a table only after a second.
cdef bint updates_late = (
    [int(n) for n in re.findall(r"\d+", os.uname().release)[:2]] < [6, 4]
    or os.environ.get("RTAP_TEST_RING") == "cancel"
)


cdef void open_table(uring_t *r) noexcept nogil:
    """Gives the ring a table of descriptors with nothing in it."""
    cdef int none[RING_FILES]
    memset(none, 0xff, sizeof(none))
    memset(r.file_ids, 0, sizeof(r.file_ids))
    r.files_ok = io_uring_register_files(&r.ring, none, RING_FILES) == 0


cdef int ring_open(uring_t *r) noexcept nogil:
    cdef io_uring_params params
    cdef int rc
    memset(&params, 0, sizeof(params))
    params.flags = IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN
    rc = io_uring_queue_init_params(RING_ENTRIES, &r.ring, &params)
    if rc == -EINVAL:           # before Linux 5.19
        memset(&params, 0, sizeof(params))
        rc = io_uring_queue_init_params(RING_ENTRIES, &r.ring, &params)
    if rc == -EPERM or rc == -ENOSYS:
        r.refused = rc
    if rc < 0:
        return rc
    memset(r.pools, 0, sizeof(r.pools))
    r.skip_success = params.features & IORING_FEAT_CQE_SKIP != 0
    open_table(r)
    r.buffers_ok = register_buffers_sparse(r.ring.ring_fd, RING_POOLS) == 0
    r.broken = False
    r.open = True
    return 0


cdef void files_gone(const uring_t *r) noexcept nogil:
    cdef uint32_t i
    if _live.COUNTS:
        for i in range(<uint32_t>RING_FILES):
            if r.file_ids[i] != 0 and r.file_ids[i] != FILE_FORGOTTEN:
                _live.gone(_live.RING_FILES_KEPT, 1)


cdef void arenas_gone(const uring_t *r) noexcept nogil:
    cdef uint32_t i
    if _live.COUNTS:
        for i in range(<uint32_t>RING_POOLS):
            _live.gone(_live.RING_ARENAS_KEPT, r.pools[i].registered)


cdef void ring_close(uring_t *r) noexcept nogil:
    """What the ring has registered goes with it."""
    if r.open:
        r.open = False
        files_gone(r)
        arenas_gone(r)
        io_uring_queue_exit(&r.ring)


cdef uring_t *adopt_or_make() noexcept nogil:
    """A ring for the calling thread: one whose thread has ended, or a new one."""
    global all_rings
    cdef uring_t *r
    _compat.lock(&list_lock)
    r = all_rings
    while r != NULL and not _compat.cas(&r.idle, 1, 0):
        r = r.next
    if r == NULL:
        r = <uring_t *>calloc(1, sizeof(uring_t))
        if r != NULL:
            r.next = all_rings
            all_rings = r
    _compat.unlock(&list_lock)
    if r != NULL:
        r.refused = 0           # concerned the thread that had it before
        r.failures = 0
        pthread_setspecific(ring_key, r)
        _live.made(_live.RING_THREADS, 1)
    return r


cdef void on_thread_exit(void *ring) noexcept nogil:
    """The next new thread takes the ring over; one in waiting is enough."""
    cdef uring_t *r = <uring_t *>ring
    cdef uring_t *other
    _compat.lock(&list_lock)
    other = all_rings
    while other != NULL:
        if other != r and _compat.load(&other.idle) == 1 and other.open:
            ring_close(r)
            break
        other = other.next
    _compat.store(&r.idle, 1)
    _compat.unlock(&list_lock)
    _live.gone(_live.RING_THREADS, 1)


cdef uring_t *uring_enter(int *error) noexcept nogil:
    """The calling thread's ring, locked for one burst; NULL and -errno when there is none.

    If a thread was once refused io_uring (by a later seccomp filter), it is not tried again."""
    cdef uring_t *r = <uring_t *>pthread_getspecific(ring_key)
    cdef int rc
    if r == NULL:
        r = adopt_or_make()
        if r == NULL:
            error[0] = -ENOMEM
            return NULL
    _compat.lock(&r.lock)
    if not r.open:
        rc = r.refused if r.refused != 0 else ring_open(r)
        if rc < 0:
            _compat.unlock(&r.lock)
            error[0] = rc
            return NULL
    return r


cdef void uring_leave(uring_t *r) noexcept nogil:
    if r.broken:
        ring_close(r)           # this drops entries that were never accepted
    _compat.unlock(&r.lock)


cdef int uring_file(uring_t *r, uint64_t file_id, int fd) noexcept nogil:
    """Index of a descriptor in the ring's table, registered on first use; -1 for none."""
    cdef int index, vacant = -1
    cdef uint32_t start = <uint32_t>(file_id % RING_FILES), i
    if not r.files_ok:
        return -1
    for i in range(<uint32_t>RING_FILES):
        index = (start + i) % RING_FILES
        if r.file_ids[index] == file_id:
            return index
        if r.file_ids[index] == 0 or r.file_ids[index] == FILE_FORGOTTEN:
            if vacant < 0:
                vacant = index
            if r.file_ids[index] == 0:
                break
    if vacant < 0 or io_uring_register_files_update(&r.ring, vacant, &fd, 1) != 1:
        return -1
    r.file_ids[vacant] = file_id
    _live.made(_live.RING_FILES_KEPT, 1)
    return vacant


cdef bint forget_all_files(uring_t *r) noexcept nogil:
    """Drops the whole table; bursts register again what they use."""
    if io_uring_unregister_files(&r.ring) < 0:
        return False
    files_gone(r)
    open_table(r)
    return True


cdef bint forget_one_file(uring_t *r, uint32_t index) noexcept nogil:
    cdef int none = -1
    if io_uring_register_files_update(&r.ring, index, &none, 1) != 1:
        return False
    r.file_ids[index] = FILE_FORGOTTEN
    _live.gone(_live.RING_FILES_KEPT, 1)
    return True


cdef void forget_file_here(uring_t *r, uint64_t file_id) noexcept nogil:
    cdef uint32_t i
    for i in range(<uint32_t>RING_FILES):
        if r.file_ids[i] == file_id:
            if not (forget_all_files(r) if updates_late else forget_one_file(r, i)):
                ring_close(r)   # it would keep the interface
            return


cdef void uring_forget_file(uint64_t file_id) noexcept nogil:
    """Drops every ring's reference on a descriptor, so that close(2) closes it."""
    cdef uring_t *r
    _compat.lock(&list_lock)
    r = all_rings
    while r != NULL:
        _compat.lock(&r.lock)
        if r.open:
            forget_file_here(r, file_id)
        _compat.unlock(&r.lock)
        r = r.next
    _compat.unlock(&list_lock)


cdef int uring_buffer(uring_t *r, pool_t *p) noexcept nogil:
    """Index under which a pool's arena is registered; -1 while it is not."""
    cdef uint32_t index = <uint32_t>(p.id % RING_POOLS)
    cdef uring_pool_t *entry = &r.pools[index]
    if entry.id != p.id:
        if entry.registered:
            return -1           # a lasting pool has the place
        entry.id = p.id
        entry.bursts = 0
    if entry.registered:
        return <int>index
    entry.bursts += 1
    if entry.bursts != PIN_AFTER or not r.buffers_ok:
        return -1
    if p.data_room > PIN_ROOM_MAX or p.arena_len > PIN_ARENA_MAX:
        return -1
    if update_buffer(r.ring.ring_fd, index, p.arena, p.arena_len) != 0:
        return -1               # the memory lock limit; without registering it works too
    entry.registered = True
    _live.made(_live.RING_ARENAS_KEPT, 1)
    return <int>index


cdef void forget_pool(uint64_t pool_id) noexcept nogil:
    cdef uint32_t index = <uint32_t>(pool_id % RING_POOLS)
    cdef bint registered
    cdef uring_t *r
    _compat.lock(&list_lock)
    r = all_rings
    while r != NULL:
        _compat.lock(&r.lock)
        if r.open and r.pools[index].id == pool_id:
            registered = r.pools[index].registered
            memset(&r.pools[index], 0, sizeof(uring_pool_t))
            _live.gone(_live.RING_ARENAS_KEPT, registered)
            if registered and update_buffer(r.ring.ring_fd, index, NULL, 0) != 0:
                ring_close(r)   # it would keep the memory
        _compat.unlock(&r.lock)
        r = r.next
    _compat.unlock(&list_lock)


cdef void run_failed(uring_t *r, int rc, bint nothing_taken) noexcept nogil:
    """Marks the ring to be closed, and keeps its thread from making another one that is as
    useless."""
    cdef uint64_t now = _compat.now_ns()
    r.broken = True
    if rc == -EPERM or rc == -ENOSYS:
        r.refused = rc
    if not nothing_taken or rc == -EAGAIN or rc == -EBUSY or rc == -EINTR:
        return
    r.failures = r.failures + 1 if now - r.failed_at < FAILURES_NS else 1
    r.failed_at = now
    if r.failures == FAILURES_MAX:
        r.refused = rc


cdef uint32_t uring_run(uring_t *r, uint32_t n) noexcept nogil:
    """Submits the ``n`` prepared entries and returns how many of the first ones the kernel took.

    It takes fewer than ``n`` only when it refuses to go on.  ``uring_leave`` then closes the ring,
    so that the other entries can never run later on buffers in other use.  When io_uring itself was
    refused, ``uring_enter`` says so from the next burst on."""
    cdef uint32_t left = n, tries = 0
    cdef int rc = 0
    while left > 0:
        rc = io_uring_submit(&r.ring)
        left = io_uring_sq_ready(&r.ring)
        if rc < 0:
            if rc != -EAGAIN and rc != -EBUSY and rc != -EINTR:
                break
            tries += 1
            if tries == SUBMIT_TRIES:
                break
            sched_yield()
    if left > 0:
        run_failed(r, rc, left == n)
    return n - left


cdef void uring_cancel(uring_t *r) noexcept nogil:
    """Prepares one more entry, which cancels every entry before it that waits."""
    cdef io_uring_sqe *sqe = io_uring_get_sqe(&r.ring)
    prep_cancel_all(sqe)
    sqe.user_data = CANCELS


cdef uint32_t uring_finish(uring_t *r, uint32_t n) noexcept nogil:
    """Sees to it that the ``n`` entries that the kernel took complete, and returns how many have.

    A read that was woken while its cancel ran may be left over, and so may any entry whose cancel
    the kernel did not take: these are cancelled here.  Fewer than ``n`` complete only when the
    kernel refuses to go on.  ``uring_leave`` then closes the ring.  The kernel may use the other
    entries' buffers until some time later, so nobody else may ever get them."""
    cdef uint32_t tries = 0
    while io_uring_cq_ready(&r.ring) < n and tries < FINISH_TRIES:
        cancel_all_now(r.ring.ring_fd)
        # The result says nothing: a wait whose time is over succeeds if any completion is there.
        wait_completions(&r.ring, n, FINISH_MS)
        tries += 1
    if io_uring_cq_ready(&r.ring) < n:
        r.broken = True
    return min(io_uring_cq_ready(&r.ring), n)


cdef uint64_t uring_new_file_id() noexcept nogil:
    return <uint64_t>_compat.fetch_add(&files_made, 1) + 1


cdef void before_fork() noexcept nogil:
    _compat.lock(&list_lock)


cdef void after_fork_in_parent() noexcept nogil:
    _compat.unlock(&list_lock)


cdef void after_fork_in_child() noexcept nogil:
    """The child drops its copies of the rings; it makes its own when it bursts."""
    global all_rings
    cdef uring_t *r = all_rings
    while r != NULL:
        ring_close(r)
        r = r.next
    all_rings = NULL
    pthread_setspecific(ring_key, NULL)
    _compat.unlock(&list_lock)


cdef int probed(uring_t *r, uint32_t n) noexcept nogil:
    """Runs ``n`` prepared entries, of which the first is numbered 0; returns its result, and
    -ENOSYS when one of them does not end."""
    cdef io_uring_cqe *cqes[2]
    cdef int result = -ENOSYS
    cdef uint32_t i
    n = uring_finish(r, uring_run(r, n))
    for i in range(io_uring_peek_batch_cqe(&r.ring, cqes, n)):
        if cqes[i].user_data == 0:
            result = cqes[i].res
    io_uring_cq_advance(&r.ring, n)
    return result


cdef int probe_read(int fd, bint nowait) noexcept nogil:
    """The result of one read through a ring: >= 0, -EAGAIN or -ECANCELED where the kernel can do
    it, with RWF_NOWAIT or else with a cancel behind it.

    A frame that it reads is lost, so use it only where the backlog is thrown away anyway."""
    cdef int result = -ENOSYS
    cdef io_uring_sqe *sqe
    cdef void *buf = malloc(PROBE_BYTES)
    cdef uring_t *r = uring_enter(&result)
    if r != NULL and buf != NULL:
        if not nowait:          # a kernel that lacks this would leave the read waiting
            sqe = io_uring_get_sqe(&r.ring)
            prep_cancel_all(sqe)
            sqe.user_data = 0
            result = probed(r, 1)
        if nowait or result != -EINVAL:
            sqe = io_uring_get_sqe(&r.ring)
            io_uring_prep_read(sqe, fd, buf, PROBE_BYTES, 0)
            sqe.rw_flags = RWF_NOWAIT if nowait else 0
            sqe.user_data = 0
            if not nowait:
                uring_cancel(r)
            result = probed(r, 1 if nowait else 2)
        if r.broken:
            buf = NULL          # the kernel may write into it until the ring has ended
    if r != NULL:
        uring_leave(r)
    free(buf)
    return result


cdef inline bint works(int rc) noexcept:
    return rc >= 0 or rc == -EAGAIN or rc == -ECANCELED


cdef dict known = {}            # (fork generation, packet, forced) -> (refusal, nowait)


cdef tuple uring_way(int fd, bint packet):
    """(refusal, nowait): why the uring engine cannot serve TAP descriptors, or packet sockets, or
    "", and whether they take RWF_NOWAIT.  Each process asks the kernel once."""
    cdef str kind = "packet sockets" if packet else "TAP descriptors"
    cdef bint forced = os.environ.get("RTAP_TEST_RING") == "cancel"
    cdef bint nowait = not forced
    cdef tuple key = (fork_generation(), packet, forced)
    cdef int rc = -EOPNOTSUPP
    cdef uring_t *own = <uring_t *>pthread_getspecific(ring_key)
    if own != NULL and own.refused != 0:
        return f"io_uring is blocked here ({strerror(-own.refused).decode()})", nowait
    cached = known.get(key)
    if cached is not None:
        return cached
    with nogil:
        if nowait:
            rc = probe_read(fd, True)
        if rc == -EOPNOTSUPP:
            nowait = False
            rc = probe_read(fd, False)
    if works(rc):
        reason = ""
    elif rc == -ENOSYS or rc == -EPERM:
        reason = f"io_uring is blocked here ({strerror(-rc).decode()})"
    elif rc == -EINVAL and not nowait:
        reason = f"io_uring reads on {kind} need Linux 5.19"
    else:
        reason = f"io_uring reads on {kind} fail here ({strerror(-rc).decode()})"
    if reason == "" or rc == -ENOSYS or rc == -EPERM or (rc == -EINVAL and not nowait):
        # Other errors may concern only this descriptor or this moment.
        known[key] = reason, nowait
    return reason, nowait


cdef uint64_t null_by_ring(int fd, uint64_t file_id, void *buf) noexcept nogil:
    """Nanoseconds for CALIBRATION_BATCH one-entry writes to /dev/null in one enter; 0: failed."""
    cdef io_uring_cqe *cqes[CALIBRATION_BATCH]
    cdef uint64_t t0, t1 = 0
    cdef io_uring_sqe *sqe
    cdef uint32_t _, i, n
    cdef int rc, index
    cdef uring_t *r = uring_enter(&rc)
    if r == NULL:
        return 0
    index = uring_file(r, file_id, fd)
    t0 = _compat.now_ns()
    for _ in range(<uint32_t>CALIBRATION_BATCH):
        sqe = io_uring_get_sqe(&r.ring)
        io_uring_prep_write(sqe, fd if index < 0 else index, buf, 64, 0)
        sqe.rw_flags = RWF_NOWAIT
        sqe.flags = 0 if index < 0 else <uint8_t>IOSQE_FIXED_FILE
        sqe.flags |= <uint8_t>IOSQE_CQE_SKIP_SUCCESS if r.skip_success else 0
    if uring_run(r, CALIBRATION_BATCH) == CALIBRATION_BATCH:
        t1 = _compat.now_ns()
    n = io_uring_peek_batch_cqe(&r.ring, cqes, CALIBRATION_BATCH)
    for i in range(n):
        if cqes[i].res < 0:
            t1 = 0
    io_uring_cq_advance(&r.ring, n)
    uring_leave(r)
    return t1 - t0 if t1 > t0 else 0


cdef uint64_t null_by_syscall(int fd, void *buf) noexcept nogil:
    cdef uint64_t t0 = _compat.now_ns()
    cdef uint32_t _
    for _ in range(<uint32_t>CALIBRATION_BATCH):
        if write(fd, buf, 64) != 64:
            return 0
    return _compat.now_ns() - t0


cdef uint64_t[2] known_costs    # valid once costs_known is set; until then every caller measures
cdef uint32_t costs_known = 0


cdef tuple uring_costs():
    """(ns by ring, ns by system call): the least time into the kernel and back for one write,
    measured once on /dev/null.  (0, 0) if it could not be measured."""
    cdef uint64_t file_id = uring_new_file_id()
    cdef uint64_t ring = <uint64_t>-1, call = <uint64_t>-1, a = 0, b = 0
    cdef uint8_t buf[64]
    cdef int fd, _
    if _compat.load(&costs_known) == 0:
        memset(buf, 0, sizeof(buf))
        with nogil:
            fd = open_file("/dev/null", O_WRONLY | O_CLOEXEC)
            for _ in range(<int>CALIBRATION_ROUNDS):
                a = null_by_ring(fd, file_id, buf)
                b = null_by_syscall(fd, buf)
                if a == 0 or b == 0:
                    break
                ring = min(ring, a)
                call = min(call, b)
            uring_forget_file(file_id)
            if fd >= 0:
                close(fd)
        if a == 0 or b == 0:
            ring = call = 0
        _compat.counter_set(&known_costs[0], ring // CALIBRATION_BATCH)
        _compat.counter_set(&known_costs[1], call // CALIBRATION_BATCH)
        _compat.store(&costs_known, 1)
    return _compat.counter_read(&known_costs[0]), _compat.counter_read(&known_costs[1])


if pthread_key_create(&ring_key, on_thread_exit) != 0:
    raise MemoryError("no pthread key left for the rings")
if pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child) != 0:
    raise MemoryError("cannot watch for fork")
pool_on_gone(forget_pool)
