/* What both kinds of connection do with their transport, under the writing rule of DESIGN 5.
 *
 * One writer per descriptor at a time. We send directly only while the transport holds nothing of ours (its high-water
 * mark is 0, so `write_paused` says exactly that); after a short send the tail is copied into a bytes object of its own
 * and given to the transport, and everything later goes the same way until it is empty. So the transport never sees a
 * buffer that is used again, and a direct send can never land in the middle of a queued one.
 */
#include "py_core.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <time.h>

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

static void call(Conn *c, const char *name)
{
    if (c->transport == NULL)
        return;
    PyObject *done = PyObject_CallMethod(c->transport, name, NULL);
    if (done == NULL)
        PyErr_Clear(); /* a transport that is closed already */
    Py_XDECREF(done);
}

bool conn_made(Conn *c, PyObject *transport)
{
    PyObject *limits = PyObject_CallMethod(transport, "set_write_buffer_limits", "i", 0);
    if (limits == NULL)
        return false;
    Py_DECREF(limits);
    PyObject *sock = PyObject_CallMethod(transport, "get_extra_info", "s", "socket");
    if (sock == NULL)
        return false;
    PyObject *number = PyObject_CallMethod(sock, "fileno", NULL);
    Py_DECREF(sock);
    if (number == NULL)
        return false;
    long fd = PyLong_AsLong(number);
    Py_DECREF(number);
    if (fd < 0)
        return false;
    c->fd = (int)fd;
    c->transport = Py_NewRef(transport);
    /* A reader that never reads costs 64 KiB of unsent bytes in the kernel instead of megabytes. */
    int low_water = 65536;
    (void)setsockopt(c->fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &low_water, sizeof low_water);
    return true;
}

/* Give what is left to the transport: one bytes object. */
static int queue(Conn *c, const struct iovec *iov, int n)
{
    size_t total = 0;
    for (int i = 0; i < n; i++)
        total += iov[i].iov_len;
    if (total == 0)
        return 0;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)total);
    if (bytes != NULL) {
        char *at = PyBytes_AS_STRING(bytes);
        for (int i = 0; i < n; i++) {
            memcpy(at, iov[i].iov_base, iov[i].iov_len);
            at += iov[i].iov_len;
        }
        PyObject *done = PyObject_CallMethod(c->transport, "write", "O", bytes);
        Py_DECREF(bytes);
        if (done != NULL) {
            Py_DECREF(done);
            return 0;
        }
    }
    PyErr_Clear();
    conn_abort(c);
    return -1;
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
    return queue(c, iov, n);
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

void conn_close(Conn *c)
{
    if (c->fd < 0)
        return;
    if (c->tls != NULL) {
        tls_shutdown(c->tls);
        (void)conn_flush(c);
    }
    c->fd = -1;
    call(c, "close");
}

void conn_abort(Conn *c)
{
    c->fd = -1;
    call(c, "abort");
}

void conn_pause_reading(Conn *c)
{
    if (!c->read_paused && c->fd >= 0) {
        c->read_paused = true;
        call(c, "pause_reading");
    }
}

void conn_resume_reading(Conn *c)
{
    if (c->read_paused && c->fd >= 0) {
        c->read_paused = false;
        call(c, "resume_reading");
    }
}

void conn_lost(Conn *c)
{
    c->fd = -1;
    wheel_set(&c->core->wheel, &c->timer, 0);
    c->kind = 0;
    Py_CLEAR(c->transport);
    if (c->tls != NULL) {
        tls_free(c->tls);
        c->tls = NULL;
    }
}
