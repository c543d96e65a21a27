# SPDX-License-Identifier: BSD-3-Clause
"""A worker's loop.  Each pass serves the busy routes; the idle ones cost it nothing.

When a route's queue was empty a few times, the route is parked: its descriptor goes into an epoll
set.  The worker polls the set now and then, and waits on it when no route is busy.  Being in that
set costs the sender 140 ns for each frame, so a route that has frames again leaves it.  No wake-up
is lost: epoll_ctl(2) checks the descriptor as it adds it, and reports it as long as frames are
there.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

cimport rtap._core.compat as _compat
from rtap._core.linux cimport (
    ENOMEM, EPOLLIN, EPOLL_CTL_ADD, EPOLL_CTL_DEL, epoll_ctl, epoll_event, epoll_wait, sched_yield,
    usleep, write,
)
from rtap._core.pool cimport mbuf_free_bulk, mbuf_t
from rtap._core.queue cimport QUEUE_STARTED, rx_share_t, tx_share_t
from rtap._core.tx_queue cimport tx_alone
from rtap._frames.segment cimport SPLIT_MAX
from rtap.stages._runner cimport (
    STAGE_SPLITS, chain_drop, chain_holds, chain_run, scratch_alloc, scratch_free, stage_free,
    stage_t,
)

cdef enum:
    PARK_AFTER = 16             # empty bursts
    FEW = 4                     # so many stay in the passes while the worker is awake
    SHARES_MAX = 64             # queues of one kernel entry
    LOOK_MAX = 64               # parked routes brought back at once
    LOOK_NS = 20_000            # between two polls of them while others are busy
    SPIN_NS = 100_000           # an adaptive worker polls this long, yielding, before it sleeps
    SLEEP_MS = 20               # a stopped queue is released within this time,
    SCAN_NS = 10_000_000
    HURRY_NS = 50_000_000       # and the next ones within a millisecond
    FRUITLESS_US = 200          # when frames cannot be taken: no buffers, a full target


cdef int worker_alloc(worker_t *w, uint32_t n_routes, uint32_t n_targets, uint32_t n_stages,
                      uint32_t stage_flags) noexcept nogil:
    """Allocates routes, targets and stages, in place of earlier ones; 0 or -ENOMEM.  stage_flags:
    the flags of all stages together."""
    cdef uint32_t i
    worker_free(w)
    w.room = max(w.burst, <uint32_t>SPLIT_MAX) if stage_flags & STAGE_SPLITS else w.burst
    w.routes = <route_t *>calloc(n_routes, sizeof(route_t))
    w.targets = <target_t *>calloc(n_targets, sizeof(target_t))
    w.frames = <mbuf_t **>calloc(<size_t>n_targets * w.room, sizeof(mbuf_t *))
    w.shares = <tx_share_t *>calloc(n_targets, sizeof(tx_share_t))
    w.stages = <stage_t *>calloc(max(n_stages, 1), sizeof(stage_t))
    w.busy = <uint32_t *>calloc(n_routes, sizeof(uint32_t))
    if (w.routes == NULL or w.targets == NULL or w.frames == NULL or w.busy == NULL
            or w.shares == NULL or w.stages == NULL
            or scratch_alloc(&w.scratch, w.room, stage_flags) != 0):
        worker_free(w)
        return -ENOMEM
    for i in range(n_targets):
        w.targets[i].frames = w.frames + <size_t>i * w.room
    return 0


cdef void worker_free(worker_t *w) noexcept nogil:
    cdef uint32_t i
    for i in range(w.n_stages):
        stage_free(&w.stages[i])
    free(w.routes)
    free(w.targets)
    free(w.frames)
    free(w.shares)
    free(w.stages)
    free(w.busy)
    scratch_free(&w.scratch)
    w.routes = NULL
    w.targets = NULL
    w.frames = NULL
    w.shares = NULL
    w.stages = NULL
    w.busy = NULL
    w.n_routes = w.n_stages = 0


cdef void target_leave(worker_t *w, target_t *ended) noexcept nogil:
    """Gives up a tx queue: to another route that still uses it, or for good.  A thread that stops a
    queue waits for that."""
    cdef route_t *r
    cdef uint64_t bytes
    cdef uint32_t i, j
    cdef int error = 0
    if not ended.owns:
        return
    ended.owns = False
    for i in range(w.n_routes):
        r = &w.routes[i]
        if r.active == 0:
            continue
        for j in range(r.n_targets):
            if r.targets[j].tx == ended.tx:
                r.targets[j].owns = True
                return
    if ended.tx.waiting != 0:   # nobody else will send them
        bytes = ended.tx.bytes
        ended.tx.burst(ended.tx, NULL, 0, &error)
        _compat.counter_add(&ended.bytes, ended.tx.bytes - bytes)
        if ended.tx.waiting != 0:
            ended.tx.abandon(ended.tx)
    _compat.store(&ended.tx.gate.owned, 0)


cdef void drop_rest(target_t *t) noexcept nogil:
    if t.n > 0:
        mbuf_free_bulk(t.frames, t.n)
        _compat.counter_add(&t.drops, t.n)
        t.n = 0


cdef void unpark(worker_t *w, route_t *r) noexcept nogil:
    cdef epoll_event unused
    epoll_ctl(w.epoll_fd, EPOLL_CTL_DEL, r.rx.fd, &unused)
    _compat.store(&r.parked, 0)
    r.empties = 0
    r.woken = True


cdef void route_end(worker_t *w, route_t *r, int error, uint32_t failed) noexcept nogil:
    cdef uint64_t one = 1
    cdef uint32_t i
    if r.parked != 0:
        unpark(w, r)
    for i in range(r.n_targets):
        drop_rest(&r.targets[i])
    chain_drop(r.stages, r.n_stages)
    r.failed = failed
    _compat.store(&r.error, error)
    _compat.store(&r.active, 0)
    w.n_active -= 1
    for i in range(r.n_targets):
        target_leave(w, &r.targets[i])
    _compat.store(&r.rx.gate.owned, 0)
    if _compat.load_relaxed(&w.stop) == 0:
        _compat.store(&r.gave_up, 1)
        write(w.event_fd, &one, sizeof(one))


cdef bint route_runs(worker_t *w, route_t *r) noexcept nogil:
    """False when one of its queues was stopped; the route has then ended."""
    cdef bint runs = _compat.load_relaxed(&r.rx.gate.state) == QUEUE_STARTED
    cdef uint32_t i
    for i in range(r.n_targets):
        runs = runs and _compat.load_relaxed(&r.targets[i].tx.gate.state) == QUEUE_STARTED
    if not runs:
        route_end(w, r, 0, FROM_SOURCE)
        w.hurry_until = _compat.now_ns() + <uint64_t>HURRY_NS
    return runs


cdef bint park(worker_t *w, uint32_t index) noexcept nogil:
    cdef route_t *r = &w.routes[index]
    cdef epoll_event event
    r.empties = 0
    if r.rx.fd >= 0 and r.rx.idle != NULL and r.rx.idle(r.rx, 0):
        w.found = True
        return False
    event.events = EPOLLIN
    event.data.u32 = index + 1          # 0 is the wake-up
    if r.rx.fd < 0 or epoll_ctl(w.epoll_fd, EPOLL_CTL_ADD, r.rx.fd, &event) != 0:
        return False
    _compat.store(&r.parked, 1)
    return True


cdef bint look(worker_t *w, int timeout_ms) noexcept nogil:
    """Brings back parked routes that have frames, and waits up to the timeout for the first; true
    when there were any."""
    cdef epoll_event events[LOOK_MAX]
    cdef uint32_t index
    cdef int n = epoll_wait(w.epoll_fd, events, LOOK_MAX, timeout_ms), i
    for i in range(n):
        if events[i].data.u32 == 0:
            continue
        index = events[i].data.u32 - 1
        unpark(w, &w.routes[index])
        w.busy[w.n_busy] = index
        w.n_busy += 1
    return n > 0


cdef bint in_hand(const route_t *r) noexcept nogil:
    """Whether frames wait at a target."""
    cdef uint32_t i
    for i in range(r.n_targets):
        if r.targets[i].n > 0:
            return True
    return False


cdef bint to_send(const route_t *r) noexcept nogil:
    """Whether frames wait at a target or, as pieces of a super-frame, in its queue; these are sent
    without new frames."""
    cdef uint32_t i
    if r.active != 0:
        for i in range(r.n_targets):
            if r.targets[i].n > 0 or r.targets[i].tx.waiting != 0:
                return True
    return False


cdef inline bint unfinished(const route_t *r) noexcept nogil:
    """Whether frames wait at a target or in a stage; then no new ones are taken."""
    return in_hand(r) or r.n_stages > 0 and chain_holds(r.stages, r.n_stages)


cdef void shares_send(tx_share_t *shares, uint32_t n) noexcept nogil:
    """Sends shares in this order, with as many in one kernel entry as their queues allow."""
    cdef uint32_t done = 0, end = 0, served, i
    cdef uint64_t each
    while done < n:
        while end < n and shares[end].q.many == shares[done].q.many:
            end += 1
        each = _compat.cycles()
        # A share that could not join the earlier ones may be prepared already: its queue knows.
        if shares[done].q.many == NULL or (
                end == done + 1 and shares[done].ready + shares[done].sent == 0):
            tx_alone(&shares[done])
            served = 1
        else:
            served = shares[done].q.many(shares + done, end - done)
        each = (_compat.cycles() - each) // served
        for i in range(done, done + served):
            shares[i].cycles = each
        done += served


cdef bint route_settle(worker_t *w, route_t *r) noexcept nogil:
    """Finishes a send of all frames that the route had in hand; true when frames moved."""
    cdef tx_share_t *s
    cdef uint32_t failed = 0, i
    cdef uint64_t cycles = 0
    cdef bint moved = False
    cdef int error = 0
    cdef target_t *t
    for i in range(r.n_targets):
        t = &r.targets[i]
        s = t.share
        if s == NULL:
            continue
        t.n -= s.sent
        moved |= s.sent > 0 or s.bytes > 0
        cycles += s.cycles
        _compat.counter_add(&t.packets, s.sent - s.lost)
        _compat.counter_add(&t.bytes, s.bytes)
        _compat.counter_add(&t.drops, s.lost)
        if s.error != 0:
            if error == 0:
                error = s.error
                failed = i
        elif t.n > 0 and r.retry:
            _compat.counter_add(&t.retries, 1)
            w.starved = True
        else:
            drop_rest(t)
        if t.tx.waiting != 0:
            w.starved = True
    if moved:
        _compat.counter_add(&r.cycles, cycles)
    if error != 0:
        route_end(w, r, error, failed)
    return moved


cdef bint routes_send(worker_t *w, route_t **routes, uint32_t k) noexcept nogil:
    """Sends the frames that the routes have in hand; true when frames moved."""
    cdef tx_share_t *s = w.shares
    cdef bint moved = False
    cdef uint32_t i, j
    cdef target_t *t
    for i in range(k):
        for j in range(routes[i].n_targets):
            t = &routes[i].targets[j]
            t.share = NULL
            if routes[i].active != 0 and (t.n > 0 or t.tx.waiting != 0):
                s.q = t.tx
                s.v = t.frames
                s.n = t.n
                s.ready = s.sent = s.lost = 0
                s.error = 0
                t.share = s
                s += 1
    shares_send(w.shares, <uint32_t>(s - w.shares))
    for i in range(k):          # routes end only after the kernel has handled every share
        moved |= route_settle(w, routes[i])
    return moved


cdef bint run_stages(worker_t *w, route_t *r, uint32_t n) noexcept nogil:
    """Runs the stages over the frames at the first target, or with n = 0 over those that wait in
    a stage, and distributes them to the targets; false when a stage has failed."""
    cdef target_t *first = &r.targets[0]
    cdef mbuf_t **frames = first.frames
    cdef uint32_t failed = 0, i
    cdef target_t *t
    cdef int rc = chain_run(r.stages, r.n_stages, r.n_targets, &w.scratch, frames, &n, &failed)
    if rc != 0:
        route_end(w, r, -rc, FROM_STAGE | failed)
        return False
    if r.n_targets == 1:
        first.n = n
        return True
    for i in range(n):          # frames for the first target stay in place, or move forward
        t = &r.targets[w.scratch.verdict[i]]
        t.frames[t.n] = frames[i]
        t.n += 1
    return True


cdef bint route_forward(worker_t *w, route_t *r, uint32_t n, uint64_t bytes,
                        int error) noexcept nogil:
    """Handles the ``n`` frames of a burst, which lie at the route's first target; true when there
    were any.  The route then has the resulting frames in hand."""
    if n == 0 and error != 0:
        route_end(w, r, error, FROM_SOURCE)
    elif n == 0 and r.rx.nombuf != r.nombuf:
        r.nombuf = r.rx.nombuf
        w.starved = True
    elif n == 0:
        r.empties += 1
        if r.woken:
            r.woken = False
            r.fruitless += 1
            if r.fruitless > 1:     # readable, but not for us: do not spin
                w.starved = True
    else:
        r.empties = 0
        r.woken = False
        r.fruitless = 0
        _compat.counter_add(&r.packets, n)
        _compat.counter_add(&r.bytes, bytes)
        if r.n_stages == 0:
            r.targets[0].n = n
        else:
            run_stages(w, r, n)
    return n > 0


cdef bint route_serve(worker_t *w, route_t *r) noexcept nogil:
    """One burst along one route; true when frames moved."""
    cdef uint64_t began = _compat.cycles(), bytes = r.rx.bytes
    cdef bint moved = False
    cdef uint32_t n
    cdef int error = 0
    if not unfinished(r):
        n = r.rx.burst(r.rx, r.targets[0].frames, w.burst, &error)
        moved = route_forward(w, r, n, r.rx.bytes - bytes, error)
    elif not in_hand(r):
        moved = run_stages(w, r, 0)
    if moved:
        _compat.counter_add(&r.cycles, _compat.cycles() - began)
    if to_send(r):
        moved |= routes_send(w, &r, 1)
    return moved


cdef bint serve_together(worker_t *w, route_t **routes, uint32_t k) noexcept nogil:
    """One burst along each of ``k`` routes whose queues are read in one kernel entry, or in as
    few as possible; the frames of one entry are sent before the next."""
    cdef rx_share_t shares[SHARES_MAX]
    cdef uint64_t bytes[SHARES_MAX]
    cdef uint32_t done = 0, served, i
    cdef uint64_t began, share
    cdef bint moved = False
    for i in range(k):
        shares[i].q = routes[i].rx
        shares[i].out = routes[i].targets[0].frames
        shares[i].n = w.burst
        shares[i].got = 0
        shares[i].error = 0
        bytes[i] = routes[i].rx.bytes
    while done < k:
        began = _compat.cycles()
        served = routes[done].rx.many(shares + done, k - done)
        share = (_compat.cycles() - began) // served
        for i in range(done, done + served):
            began = _compat.cycles()
            if route_forward(w, routes[i], shares[i].got, routes[i].rx.bytes - bytes[i],
                             shares[i].error):
                _compat.counter_add(&routes[i].cycles, share + _compat.cycles() - began)
                moved = True
        routes_send(w, routes + done, served)
        done += served
    return moved


cdef bint serve_busy(worker_t *w) noexcept nogil:
    """One pass; true when frames moved."""
    cdef route_t *together[SHARES_MAX]
    cdef uint32_t i, k = 0
    cdef bint moved = False
    cdef route_t *r
    for i in range(w.n_busy):
        r = &w.routes[w.busy[i]]
        if not route_runs(w, r):
            continue
        if w.n_busy == 1 or r.rx.many == NULL or unfinished(r):
            moved |= route_serve(w, r)
            continue
        if k > 0 and (k == SHARES_MAX or together[0].rx.many != r.rx.many):
            moved |= serve_together(w, together, k)
            k = 0
        together[k] = r
        k += 1
    if k > 0:
        moved |= serve_together(w, together, k)
    return moved


cdef void sort_out(worker_t *w, uint32_t park_after) noexcept nogil:
    """Takes routes out of the pass that have ended, or were empty so many times in a row."""
    cdef uint32_t kept = 0, i
    cdef route_t *r
    for i in range(w.n_busy):
        r = &w.routes[w.busy[i]]
        if r.active == 0 or (r.empties >= park_after and not to_send(r)
                             and park(w, w.busy[i])):
            continue
        w.busy[kept] = w.busy[i]
        kept += 1
    w.n_busy = kept


cdef bint scan_parked(worker_t *w, uint64_t now) noexcept nogil:
    """Ends parked routes whose queues were stopped, and brings back those that have to be
    revisited; true when there were any of these, which the next pass has to serve."""
    cdef uint64_t every = 1_000_000 if now < w.hurry_until else SCAN_NS
    cdef bint found = False
    cdef route_t *r
    cdef uint32_t i
    if now - w.scanned < every:
        return False
    w.scanned = now
    for i in range(w.n_routes):
        r = &w.routes[i]
        if r.active != 0 and r.parked != 0 and route_runs(w, r) and (r.rx.revisit or to_send(r)):
            unpark(w, r)
            r.woken = False
            w.busy[w.n_busy] = i
            w.n_busy += 1
            found = True
    return found


cdef void take_turns(worker_t *w) noexcept nogil:
    """Makes another route the first of a pass.  Queues that share a kernel entry take their buffers
    in this order, and an empty queue would keep the last buffers from the queues behind it."""
    cdef uint32_t first = w.busy[0], i
    for i in range(1, w.n_busy):
        w.busy[i - 1] = w.busy[i]
    w.busy[w.n_busy - 1] = first


cdef void worker_loop(worker_t *w) noexcept nogil:
    cdef uint64_t idle_since = 0, now
    cdef bint slept = False, moved  # in vain
    cdef uint32_t i
    w.n_busy = 0
    w.n_active = w.n_routes
    w.looked = w.scanned = w.hurry_until = 0
    for i in range(w.n_routes):
        w.busy[i] = i
        w.routes[i].nombuf = w.routes[i].rx.nombuf
    w.n_busy = w.n_routes
    while _compat.load_relaxed(&w.stop) == 0:
        w.starved = w.found = False
        moved = serve_busy(w)
        if not moved and w.n_busy <= FEW:
            # They wait together for the next frame of one of them; no busy route pays for that.
            for i in range(w.n_busy):
                w.routes[w.busy[i]].empties = 0
        sort_out(w, PARK_AFTER)
        if w.starved and w.n_busy > 1:
            take_turns(w)
        now = _compat.now_ns()
        if scan_parked(w, now):
            continue            # before they are parked again
        if w.n_active == 0:
            break
        if w.n_active > w.n_busy and (not moved or now - w.looked > LOOK_NS):
            w.looked = now
            moved |= look(w, 0) and not w.starved
        if moved:
            idle_since = 0
            slept = False
            continue
        if w.wait == WAIT_POLL:
            continue
        if w.starved:           # a full target does not report when it has room
            usleep(FRUITLESS_US)
            continue
        if idle_since == 0:
            idle_since = now
        if w.wait == WAIT_ADAPTIVE and not slept and now - idle_since < SPIN_NS:
            sched_yield()
            continue
        idle_since = 0
        sort_out(w, 0)
        if w.n_busy == 0:
            slept = not look(w, 1 if now < w.hurry_until else SLEEP_MS)
        elif not w.found:       # cannot be waited on
            usleep(FRUITLESS_US)
    for i in range(w.n_routes):
        if w.routes[i].active != 0:
            route_end(w, &w.routes[i], 0, FROM_SOURCE)
