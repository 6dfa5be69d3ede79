/* What both kinds of connection do with their descriptor: reading, writing, closing.
 *
 * A send is direct while nothing waits in `out`; after a short one the tail is copied there, and everything later goes
 * the same way until the socket has taken it. So a direct send can never land in the middle of a queued one.
 */
#include "py_core.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

uint64_t asc_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

bool buffer_append(asc_buffer *b, const char *bytes, size_t len, size_t headroom)
{
    if (b->bytes == NULL || b->len == 0)
        b->off = headroom;
    size_t end = b->off + b->len;
    if (len > SIZE_MAX / 4 - end)
        return false;
    if (end + len + TAILROOM > b->cap && b->off > headroom + b->len) { /* more gap than content: close it */
        memmove(b->bytes + headroom, b->bytes + b->off, b->len);
        b->off = headroom;
        end = b->off + b->len;
    }
    if (end + len + TAILROOM > b->cap) {
        size_t cap = end + len + TAILROOM;
        cap += cap / 2;
        char *grown = realloc(b->bytes, cap);
        if (grown == NULL)
            return false;
        b->bytes = grown;
        b->cap = cap;
    }
    memcpy(b->bytes + end, bytes, len);
    b->len += len;
    return true;
}

void buffer_free(asc_buffer *b)
{
    free(b->bytes);
    *b = (asc_buffer){0};
}

static bool is_down(const Conn *c)
{
    return Py_IS_TYPE((PyObject *)c, &Downstream_Type);
}

/* Level-triggered events would have to be switched off and on again for every pause; edges only need a note of what the
 * kernel may still hold (`readable`). */
bool conn_open(Conn *c, int fd)
{
    if (!loop_watch(c->core, fd, c, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET))
        return false;
    c->fd = c->socket = fd;
    Py_INCREF((PyObject *)c); /* the core's, until conn_let_go */
    return true;
}

/* Closed, and nothing is left to send: let go at the end of the turn. Until then the descriptor stays open, so that no
 * event of this turn can be somebody else's. */
static void part(Conn *c)
{
    c->fd = -1;
    buffer_free(&c->out);
    if (c->lost || c->socket < 0)
        return;
    c->lost = true;
    c->next_lost = c->core->lost;
    c->core->lost = c;
}

static int keep(Conn *c, const struct iovec *iov, int n)
{
    for (int i = 0; i < n; i++)
        if (iov[i].iov_len && !buffer_append(&c->out, iov[i].iov_base, iov[i].iov_len, 0)) {
            conn_abort(c);
            return -1;
        }
    if (c->out.len && !c->write_paused) {
        if (is_down(c))
            down_blocked((Downstream *)c);
        else
            c->write_paused = true;
    }
    return 0;
}

static int send_plain(Conn *c, struct iovec *iov, int n)
{
    if (c->fd < 0)
        return -1;
    if (!c->write_paused) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)n};
        ssize_t sent;
        do {
            sent = n == 1 ? send(c->fd, iov->iov_base, iov->iov_len, MSG_DONTWAIT | MSG_NOSIGNAL)
                          : sendmsg(c->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        } while (sent < 0 && errno == EINTR);
        if (sent < 0) {
            if (errno != EAGAIN && errno != EWOULDBLOCK) {
                conn_abort(c);
                return -1;
            }
            sent = 0;
        }
        size_t left = (size_t)sent;
        while (n > 0 && left >= iov->iov_len) {
            left -= iov->iov_len;
            iov++;
            n--;
        }
        if (n == 0)
            return 0;
        iov->iov_base = (char *)iov->iov_base + left;
        iov->iov_len -= left;
    }
    return keep(c, iov, n);
}

int conn_flush(Conn *c)
{
    tls_output *out = &c->core->output;
    struct iovec all = {.iov_base = out->bytes, .iov_len = out->len};
    int result = out->len ? send_plain(c, &all, 1) : (c->fd < 0 ? -1 : 0);
    out->len = 0;
    return result;
}

int conn_send(Conn *c, struct iovec *iov, int n)
{
    if (c->tls == NULL)
        return send_plain(c, iov, n);
    if (c->fd < 0)
        return -1;
    bool fine = true;
    size_t total = 0;
    for (int i = 0; i < n; i++)
        total += iov[i].iov_len;
    if (n > 1 && total <= UP_READ) { /* one record instead of several */
        char *at = c->core->transmit;
        size_t joined = 0;
        for (int i = 0; i < n; i++) {
            memcpy(at + joined, iov[i].iov_base, iov[i].iov_len);
            joined += iov[i].iov_len;
        }
        fine = tls_write(c->tls, at, total);
    } else {
        for (int i = 0; i < n && fine; i++)
            if (iov[i].iov_len)
                fine = tls_write(c->tls, iov[i].iov_base, iov[i].iov_len);
    }
    int flushed = conn_flush(c);
    if (!fine) {
        conn_abort(c);
        return -1;
    }
    return flushed;
}

/* How long a peer may take none of what is queued after we closed. */
#define CLOSING_NS (10000 * MS)

void conn_close(Conn *c)
{
    if (c->fd < 0)
        return;
    if (c->tls != NULL) {
        tls_shutdown(c->tls);
        (void)conn_flush(c);
    }
    if (c->fd < 0)
        return;
    c->fd = -1;
    c->closing = true;
    if (c->out.len == 0) {
        part(c);
        return;
    }
    c->out_mark = c->out.len;
    wheel_set(&c->core->wheel, &c->timer, asc_now() + CLOSING_NS);
}

void conn_abort(Conn *c)
{
    part(c);
}

void conn_end(Conn *c)
{
    if (c->out.len)
        c->end_later = true;
    else if (c->fd >= 0)
        (void)shutdown(c->fd, SHUT_WR);
}

/* The deadline of a connection that is being closed. */
void conn_due(Conn *c)
{
    if (c->out.len == c->out_mark) {
        part(c);
        return;
    }
    c->out_mark = c->out.len;
    wheel_set(&c->core->wheel, &c->timer, asc_now() + CLOSING_NS);
}

void conn_pause_reading(Conn *c)
{
    c->read_paused = true;
}

void conn_resume_reading(Conn *c)
{
    if (!c->read_paused)
        return;
    c->read_paused = false;
    if (c->readable && c->fd >= 0)
        loop_read_again(c);
}

/* The socket takes bytes again. */
static void drain(Conn *c)
{
    while (c->out.len) {
        ssize_t sent = send(c->socket, c->out.bytes + c->out.off, c->out.len, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK)
                part(c);
            return;
        }
        c->out.off += (size_t)sent;
        c->out.len -= (size_t)sent;
    }
    buffer_free(&c->out);
    if (c->closing) {
        part(c);
        return;
    }
    if (c->end_later) {
        c->end_later = false;
        (void)shutdown(c->socket, SHUT_WR);
    }
    if (is_down(c))
        down_drained((Downstream *)c);
    else
        up_drained((Upstream *)c);
}

void conn_event(Conn *c, uint32_t events)
{
    if (c->lost || c->socket < 0)
        return;
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        c->hung_up = true;
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        c->readable = true;
    if (c->out.len && events & (EPOLLOUT | EPOLLHUP | EPOLLERR))
        drain(c);
    if (c->fd < 0 || !c->readable)
        return;
    if (!c->read_paused)
        conn_read(c);
    else if (c->hung_up && is_down(c))
        down_vanished((Downstream *)c);
}

/* One read: what more there is waits for the next turn, so that one connection cannot keep the others waiting. */
void conn_read(Conn *c)
{
    Core *core = c->core;
    bool down = is_down(c);
    char *into = down ? core->down_bytes : c->tls != NULL ? core->cipher_bytes : core->up_bytes;
    size_t room = down ? DOWN_READ : UP_READ;
    ssize_t got;
    do {
        got = recv(c->fd, into, room, MSG_DONTWAIT);
    } while (got < 0 && errno == EINTR);
    if (got < 0) {
        c->readable = false;
        if (errno == EAGAIN || errno == EWOULDBLOCK)
            return;
        c->broken = true;
        part(c);
        return;
    }
    if (got == 0) {
        c->readable = false;
        if (down)
            down_end((Downstream *)c);
        else
            up_end((Upstream *)c);
        return;
    }
    c->readable = (size_t)got == room || c->hung_up; /* a short read has emptied the socket */
    if (down)
        down_read((Downstream *)c, into, (size_t)got);
    else
        up_read((Upstream *)c, into, (size_t)got);
    if (c->fd < 0 || !c->readable)
        return;
    if (!c->read_paused)
        loop_read_again(c);
    else if (c->hung_up && down)
        down_vanished((Downstream *)c);
}

/* The end of a connection: its exchange learns of it, then the descriptor is closed. */
void conn_let_go(Conn *c)
{
    if (is_down(c))
        down_lost((Downstream *)c);
    else
        up_lost((Upstream *)c);
    loop_forget(c);
    wheel_set(&c->core->wheel, &c->timer, 0);
    c->kind = 0;
    if (c->tls != NULL) {
        tls_free(c->tls);
        c->tls = NULL;
    }
    (void)close(c->socket);
    c->socket = -1;
    Py_DECREF((PyObject *)c);
}
