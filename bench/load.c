/* A load generator that costs less than what it measures: one process, one thread, epoll.
 *
 *   unary      closed loop on N kept connections (over TLS 1.3 with --tls)
 *   handshake  closed loop of N slots: connect, full TLS handshake, one request, close
 *   sse        N streams held open; counts events, and takes the gap between two events of a stream for its latency, which
 *              shows who gathers events instead of passing them on
 *   rate       open loop: requests leave on a fixed schedule, whatever the answers do, and latency runs from the moment the
 *              schedule named, so that a stalled proxy cannot hide its stall (coordinated omission)
 *
 * --keys and --models name files with one a line: each request takes the next of them in turn, so that many callers and many
 * models are many different requests. --opening bounds how many connections are in the making at the same time: ten thousand
 * at once would wait for each other longer than a proxy's handshake deadline allows.
 *
 * Every answer is checked: status 200, the body's length where --expect-bytes says it, and with --marked that it says the
 * marker which only its own request had. What failed is told one by one, with the local port and the life of its connection,
 * so that it can be held against what was done to the target in that time. It prints one JSON line per
 * event: `ready` when each connection has had its first good answer (a stream: its first event), `begin` and `end` around
 * the window. The window is opened and closed by the lines `begin` and `end` on standard input, so that whoever accounts
 * for the proxy's CPU reads it at the same two moments, or by --seconds. The load goes on until standard input ends. */
#define _GNU_SOURCE
#include "http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_BYTES = 8192, SCRATCH = 65536, EVENTS = 512, CONNECTIONS_MAX = 60000, GIVE_UP = 1000, WORD_MAX = 200 };
enum { FAILED_MAX = 4096, WHAT_MAX = 96 };
enum { CONTROL = CONNECTIONS_MAX, SCHEDULE }; /* epoll ids that are not connections */

enum mode { UNARY, HANDSHAKE, SSE, RATE };
enum state { CONNECTING, SHAKING, IDLE, SENDING, AWAITING, BODY_LENGTH, BODY_CHUNKED, BODY_CLOSE };

struct request {
    char *bytes;
    size_t len;
    size_t digits_at; /* --marked: where the digits of the marker are */
};

/* A request that failed in this window; `opened` and `ended` are of CLOCK_MONOTONIC. */
struct failed {
    uint64_t opened_ns, ended_ns;
    unsigned port;
    bool foreign;
    char what[WHAT_MAX];
};

struct conn {
    int fd;
    SSL *ssl;
    enum state state;
    bool answered; /* this connection has had an answer before: it may end between two without blame */
    bool ready;    /* this slot has had its first good answer since the start */
    bool made;     /* this slot has had its first head since the start */
    bool close_after, event_open;
    int status;
    uint32_t interest;
    const struct request *request;
    struct request own;     /* --marked: a copy of it with the marker of this time */
    struct marker marker;   /* of the answer */
    unsigned port;          /* ours */
    uint64_t opened_ns;     /* when the connection was begun */
    size_t sent;       /* bytes of the request that left */
    uint64_t left;     /* of the body, when its length is known */
    uint64_t body;     /* bytes of the body so far */
    uint64_t due_ns;   /* when the request should have left */
    uint64_t event_ns; /* when the last event of the stream came; 0: none yet in this window */
    struct chunks chunks;
    size_t head_len;
    char head[HEAD_BYTES]; /* a head that came in pieces */
};

/* Latencies, logarithmic with 128 steps an octave: any percentile within 0.8 %, from 1 ns up, without an allocation. */
enum { STEP_BITS = 7, STEPS = 1 << STEP_BITS, CELLS = (64 - STEP_BITS + 1) * STEPS };
static struct {
    uint64_t cells[CELLS];
    uint64_t count, max;
    double sum;
} latency;

static struct {
    uint64_t requests, bytes, events, chunks, reconnects, lost;
    uint64_t bad_status, bad_length, bad_marker, connect_failed, broken;
} count;

static struct {
    enum mode mode;
    const char *host, *path, *key, *ca, *model, *keys, *models;
    unsigned port, connections, opening, request_bytes;
    int64_t expect_bytes;
    double seconds, rate;
    bool tls, marked;
} options = {UNARY, "127.0.0.1", "/v1/chat/completions", "none", NULL, "bench", NULL, NULL, 0, 64, 0, 1024, -1, 0, 1000, false, false};

static struct conn *conns;
static unsigned ready_count, opened_count;
static unsigned *idle, idle_count; /* rate: connections without a request */
static uint64_t *backlog, backlog_at, backlog_len; /* rate: due times that found no idle connection */
static uint64_t next_due_ns, begin_ns, window_end_ns;
static bool in_window;
static int loop_fd, schedule_fd, failures;
static char scratch[SCRATCH], first_error[512];
static struct failed failed[FAILED_MAX];
static uint64_t failed_count; /* those beyond FAILED_MAX are counted and not told */
static uint64_t next_marker;
static struct request *requests;
static size_t request_count, request_next;
static SSL_CTX *tls_context;
static struct sockaddr_in target;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void print_json_string(const char *text) {
    putchar('"');
    for (; *text; text++) {
        unsigned char b = (unsigned char)*text;
        if (b == '"' || b == '\\')
            printf("\\%c", b);
        else if (b < 32 || b > 126)
            printf("\\u%04x", b);
        else
            putchar(b);
    }
    putchar('"');
}

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    printf("{\"event\":\"failed\",\"reason\":");
    print_json_string(text);
    printf("}\n");
    exit(1);
}

static void failed_add(const struct conn *c, bool foreign, const char *what) {
    if (failed_count++ >= FAILED_MAX)
        return;
    struct failed *f = &failed[failed_count - 1];
    *f = (struct failed){.opened_ns = c->opened_ns, .ended_ns = now_ns(), .port = c->port, .foreign = foreign};
    snprintf(f->what, sizeof f->what, "%s", what);
}

__attribute__((format(printf, 3, 4))) static void error_seen(const struct conn *c, uint64_t *counter, const char *format, ...) {
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    ++*counter;
    failed_add(c, counter == &count.bad_marker, text);
    if (!first_error[0])
        snprintf(first_error, sizeof first_error, "%s", text);
    if (++failures >= GIVE_UP)
        fail("%d failures in a row; the first: %s", failures, first_error);
}

/* ---- latency ---- */

static void latency_add(uint64_t ns) {
    unsigned cell = (unsigned)ns;
    if (ns >= STEPS) {
        unsigned shift = 63 - (unsigned)__builtin_clzll(ns) - STEP_BITS;
        cell = (shift + 1) * STEPS + (unsigned)(ns >> shift) - STEPS;
    }
    latency.cells[cell]++;
    latency.count++;
    latency.sum += (double)ns;
    if (ns > latency.max)
        latency.max = ns;
}

static double latency_us(double quantile) {
    uint64_t rank = (uint64_t)(quantile * (double)latency.count), seen = 0;
    for (unsigned i = 0; i < CELLS; i++) {
        seen += latency.cells[i];
        if (seen > rank) {
            unsigned octave = i / STEPS;
            double low = octave == 0 ? i : (double)((uint64_t)(STEPS + i % STEPS) << (octave - 1));
            double width = octave == 0 ? 1 : (double)(1ull << (octave - 1));
            double middle = low + width / 2;
            return (middle < (double)latency.max ? middle : (double)latency.max) / 1000;
        }
    }
    return (double)latency.max / 1000;
}

/* ---- bytes in and out ---- */

/* Returned instead of a byte count. */
enum { AGAIN = -1, BROKEN = -2 };

static ssize_t take_tls(struct conn *c, int result) {
    switch (SSL_get_error(c->ssl, result)) {
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE:
        return AGAIN;
    case SSL_ERROR_ZERO_RETURN:
        return 0;
    default:
        ERR_clear_error();
        return BROKEN;
    }
}

static ssize_t receive(struct conn *c) {
    if (c->ssl) {
        int n = SSL_read(c->ssl, scratch, SCRATCH);
        return n > 0 ? n : take_tls(c, n);
    }
    ssize_t n = recv(c->fd, scratch, SCRATCH, 0);
    return n >= 0 ? n : errno == EAGAIN ? AGAIN : BROKEN;
}

static ssize_t transmit(struct conn *c, const char *p, size_t n) {
    if (c->ssl) {
        int w = SSL_write(c->ssl, p, (int)n);
        return w > 0 ? w : take_tls(c, w);
    }
    ssize_t w = send(c->fd, p, n, MSG_NOSIGNAL);
    return w >= 0 ? w : errno == EAGAIN ? AGAIN : BROKEN;
}

static void interest(struct conn *c, uint32_t events, int operation) {
    if (operation == EPOLL_CTL_MOD && c->interest == events)
        return;
    c->interest = events;
    struct epoll_event e = {.events = events, .data.u32 = (uint32_t)(c - conns)};
    if (epoll_ctl(loop_fd, operation, c->fd, &e) < 0)
        fail("epoll_ctl: %s", strerror(errno));
}

/* ---- the life of a connection ---- */

static void open_connection(struct conn *c);

static void close_connection(struct conn *c) {
    if (c->ssl) {
        SSL_shutdown(c->ssl);
        SSL_free(c->ssl);
        c->ssl = NULL;
        ERR_clear_error(); /* what is left here would be taken for the next connection's failure */
    }
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
}

static void reopen(struct conn *c) {
    close_connection(c);
    open_connection(c);
}

static void broken(struct conn *c, const char *where) {
    /* A kept connection that the other side closed before a byte of this answer came: HTTP allows it; the request goes
     * again on a new connection, and the count is in the report. */
    if (c->answered && c->state == AWAITING && c->head_len == 0) {
        count.lost++;
        failed_add(c, false, "lost with its connection, and sent again");
    } else {
        error_seen(c, &count.broken, "connection lost %s", where);
    }
    reopen(c);
}

static void send_request(struct conn *c) {
    c->state = SENDING;
    while (c->sent < c->request->len) {
        ssize_t n = transmit(c, c->request->bytes + c->sent, c->request->len - c->sent);
        if (n == AGAIN) {
            interest(c, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
            return;
        }
        if (n <= 0) {
            c->state = AWAITING;
            broken(c, "while sending");
            return;
        }
        c->sent += (size_t)n;
    }
    c->state = AWAITING;
    interest(c, EPOLLIN, EPOLL_CTL_MOD);
}

/* Gives this request, which is shared by all connections, a marker: in a copy that is this connection's own. */
static void mark(struct conn *c) {
    if (c->own.len != c->request->len) {
        free(c->own.bytes);
        c->own.bytes = malloc(c->request->len);
        if (!c->own.bytes)
            fail("memory");
    }
    c->own.len = c->request->len;
    c->own.digits_at = c->request->digits_at;
    memcpy(c->own.bytes, c->request->bytes, c->request->len);
    uint64_t marker = next_marker++;
    for (unsigned i = MARKER_DIGITS; i-- > 0; marker >>= 4)
        c->own.bytes[c->own.digits_at + i] = "0123456789abcdef"[marker & 15];
    c->request = &c->own;
    c->marker.at = 0;
}

static void start_request(struct conn *c, uint64_t due_ns) {
    c->due_ns = due_ns;
    c->request = &requests[request_next];
    request_next = request_next + 1 < request_count ? request_next + 1 : 0;
    if (options.marked)
        mark(c);
    c->sent = c->head_len = 0;
    c->body = 0;
    c->event_open = false;
    c->event_ns = 0;
    send_request(c);
}

static void shake(struct conn *c) {
    int n = SSL_connect(c->ssl);
    if (n == 1) {
        start_request(c, c->due_ns);
        return;
    }
    int error = SSL_get_error(c->ssl, n);
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE) {
        interest(c, error == SSL_ERROR_WANT_READ ? EPOLLIN : EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
        return;
    }
    char text[256];
    ERR_error_string_n(ERR_get_error(), text, sizeof text);
    ERR_clear_error();
    error_seen(c, &count.connect_failed, "TLS handshake: %s", text);
    reopen(c);
}

static void connected(struct conn *c) {
    int error = 0;
    socklen_t len = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &len);
    if (error) {
        error_seen(c, &count.connect_failed, "connect: %s", strerror(error));
        reopen(c);
        return;
    }
    interest(c, EPOLLIN, EPOLL_CTL_MOD);
    if (!options.tls) {
        start_request(c, c->due_ns);
        return;
    }
    c->ssl = SSL_new(tls_context);
    if (!c->ssl || !SSL_set_fd(c->ssl, c->fd) || !SSL_set_tlsext_host_name(c->ssl, "localhost"))
        fail("TLS setup");
    c->state = SHAKING;
    shake(c);
}

/* Returns before the connection is made, also when it is made at once: a failing target must not recurse. */
static void open_connection(struct conn *c) {
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        fail("socket: %s", strerror(errno));
    int on = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    c->state = CONNECTING;
    c->answered = false;
    c->due_ns = now_ns();
    c->opened_ns = c->due_ns;
    if (connect(c->fd, (struct sockaddr *)&target, sizeof target) < 0 && errno != EINPROGRESS)
        fail("connect: %s", strerror(errno));
    struct sockaddr_in ours = {0};
    socklen_t len = sizeof ours;
    getsockname(c->fd, (struct sockaddr *)&ours, &len);
    c->port = ntohs(ours.sin_port);
    interest(c, EPOLLOUT, EPOLL_CTL_ADD);
}

/* ---- answers ---- */

static void first_good(struct conn *c) {
    if (c->ready)
        return;
    c->ready = true;
    if (++ready_count == options.connections) {
        printf("{\"event\":\"ready\",\"connections\":%u}\n", ready_count);
        fflush(stdout);
        next_due_ns = now_ns();
        if (options.mode == RATE) {
            struct itimerspec at = {{0, 0}, {0, 1}};
            timerfd_settime(schedule_fd, 0, &at, NULL);
        }
    }
}

static void answered(struct conn *c) {
    uint64_t now = now_ns();
    if (c->status != 200) {
        error_seen(c, &count.bad_status, "status %d", c->status);
    } else if (options.expect_bytes >= 0 && c->body != (uint64_t)options.expect_bytes) {
        error_seen(c, &count.bad_length, "a body of %lu bytes instead of %ld", c->body, options.expect_bytes);
    } else if (options.marked && !marker_found(&c->marker)) {
        error_seen(c, &count.bad_marker, "an answer without a marker");
    } else if (options.marked && memcmp(c->marker.digits, c->own.bytes + c->own.digits_at, MARKER_DIGITS) != 0) {
        error_seen(c, &count.bad_marker, "another request's answer");
    } else {
        failures = 0;
        count.requests++;
        if (options.mode != SSE)
            latency_add(now - c->due_ns);
        first_good(c);
    }
    if (options.mode == HANDSHAKE || c->close_after) {
        count.reconnects += options.mode != HANDSHAKE;
        reopen(c);
        return;
    }
    c->answered = true;
    if (options.mode != RATE || ready_count < options.connections) {
        if (options.mode == RATE && c->ready) {
            c->state = IDLE;
            idle[idle_count++] = (unsigned)(c - conns);
            return;
        }
        start_request(c, now);
    } else if (backlog_len > 0) {
        uint64_t due = backlog[backlog_at];
        backlog_at = (backlog_at + 1) % CONNECTIONS_MAX;
        backlog_len--;
        start_request(c, due);
    } else {
        c->state = IDLE;
        idle[idle_count++] = (unsigned)(c - conns);
    }
}

/* Counts the events of a stream: each ends with a blank line. */
static void count_events(struct conn *c, const char *p, size_t n) {
    uint64_t now = now_ns();
    for (const char *end = p + n; p < end;) {
        if (c->event_open && *p == '\n') {
            count.events++;
            if (c->event_ns)
                latency_add(now - c->event_ns);
            c->event_ns = now;
            first_good(c);
            c->event_open = false;
            p++;
            continue;
        }
        const char *newline = memchr(p, '\n', (size_t)(end - p));
        c->event_open = newline != NULL;
        p = newline ? newline + 1 : end;
    }
}

static void body_bytes(struct conn *c, const char *p, size_t n) {
    c->body += n;
    if (options.marked)
        marker_next(&c->marker, p, n);
    if (options.mode == SSE && c->status == 200)
        count_events(c, p, n);
}

/* A complete head. False: it cannot be understood. */
static bool on_head(struct conn *c, const char *p, size_t n) {
    struct head h;
    if (n < 12 || memcmp(p, "HTTP/1.1 ", 9) != 0 || !head_fields(p, n, &h))
        return false;
    if (!c->made) {
        c->made = true;
        if (opened_count < options.connections)
            open_connection(&conns[opened_count++]);
    }
    c->status = (p[9] - '0') * 100 + (p[10] - '0') * 10 + (p[11] - '0');
    c->close_after = h.close;
    if (c->status != 200 && !first_error[0])
        snprintf(first_error, sizeof first_error, "status %d, head: %.*s", c->status, (int)(n < 300 ? n : 300), p);
    if (h.chunked) {
        c->chunks = (struct chunks){0};
        c->state = BODY_CHUNKED;
    } else if (h.content_length >= 0) {
        c->left = (uint64_t)h.content_length;
        c->state = BODY_LENGTH;
    } else {
        c->state = BODY_CLOSE;
    }
    return true;
}

/* Consumes one part of what was received. Returns the bytes used, 0 when the connection has moved on. */
static size_t feed(struct conn *c, const char *p, size_t n) {
    const char *data = NULL;
    size_t len = 0, used = 0;
    switch (c->state) {
    case AWAITING: {
        const char *whole = p;
        size_t before = c->head_len, have = n;
        if (before > 0) {
            size_t room = HEAD_BYTES - before, add = n < room ? n : room;
            memcpy(c->head + before, p, add);
            whole = c->head;
            have = before + add;
        }
        size_t head_len = head_length(whole, have);
        if (head_len == 0 && have < HEAD_BYTES) {
            if (before == 0)
                memcpy(c->head, p, n);
            c->head_len = have;
            return n;
        }
        if (head_len == 0 || !on_head(c, whole, head_len)) {
            broken(c, "by a head that is not HTTP/1.1");
            return 0;
        }
        used = head_len - before;
        if (c->state == BODY_LENGTH && c->left == 0)
            answered(c);
        return used;
    }
    case BODY_LENGTH:
        used = n < c->left ? n : (size_t)c->left;
        body_bytes(c, p, used);
        c->left -= used;
        if (c->left == 0)
            answered(c);
        return used;
    case BODY_CHUNKED:
        used = chunks_next(&c->chunks, p, n, &data, &len);
        if (len > 0)
            body_bytes(c, data, len);
        if (c->chunks.state == CHUNK_BAD) {
            broken(c, "by a chunk that is none");
            return 0;
        }
        if (c->chunks.state == CHUNK_DONE) {
            count.chunks += c->chunks.count;
            answered(c);
        }
        return used;
    case BODY_CLOSE:
        body_bytes(c, p, n);
        return n;
    default:
        broken(c, "by bytes nobody asked for");
        return 0;
    }
}

static void on_readable(struct conn *c) {
    for (;;) {
        ssize_t n = receive(c);
        if (n == AGAIN)
            return;
        if (n == 0 && c->state == BODY_CLOSE) {
            c->close_after = true;
            answered(c);
            return;
        }
        if (n <= 0) {
            if (c->state == IDLE) { /* stays on the idle stack; on_schedule opens it again when it is drawn */
                count.reconnects++;
                close_connection(c);
            } else {
                broken(c, "before the answer was complete");
            }
            return;
        }
        count.bytes += (uint64_t)n;
        int fd = c->fd;
        for (size_t at = 0; at < (size_t)n;) {
            size_t used = feed(c, scratch + at, (size_t)n - at);
            if (used == 0 || c->fd != fd || c->state == CONNECTING)
                return;
            at += used;
        }
        if (!c->ssl || !SSL_has_pending(c->ssl))
            return;
    }
}

static void on_event(struct conn *c, uint32_t events) {
    switch (c->state) {
    case CONNECTING:
        connected(c);
        return;
    case SHAKING:
        shake(c);
        return;
    case SENDING:
        if (events & EPOLLOUT)
            send_request(c);
        if (c->state != SENDING || !(events & EPOLLIN))
            return;
        break;
    default:
        break;
    }
    on_readable(c);
}

/* ---- the schedule and the window ---- */

static void arm_schedule(void) {
    struct itimerspec at = {{0, 0}, {(time_t)(next_due_ns / 1000000000u), (long)(next_due_ns % 1000000000u)}};
    timerfd_settime(schedule_fd, TFD_TIMER_ABSTIME, &at, NULL);
}

static void on_schedule(void) {
    uint64_t turns;
    if (read(schedule_fd, &turns, sizeof turns) != sizeof turns)
        return;
    uint64_t step = (uint64_t)(1e9 / options.rate);
    for (uint64_t now = now_ns(); next_due_ns <= now; next_due_ns += step) {
        struct conn *c = NULL;
        while (idle_count > 0 && !c) {
            c = &conns[idle[--idle_count]];
            if (c->fd < 0) { /* ended while idle: its new connection sends a request of its own when it is made */
                open_connection(c);
                c = NULL;
            }
        }
        if (c) {
            start_request(c, next_due_ns);
        } else {
            if (backlog_len == CONNECTIONS_MAX)
                fail("%d requests wait for a connection: the target does not keep up with the rate", CONNECTIONS_MAX);
            backlog[(backlog_at + backlog_len++) % CONNECTIONS_MAX] = next_due_ns;
        }
    }
    arm_schedule();
}

static void begin_window(void) {
    memset(&count, 0, sizeof count);
    memset(&latency, 0, sizeof latency);
    for (unsigned i = 0; i < options.connections; i++)
        conns[i].chunks.count = conns[i].event_ns = 0;
    first_error[0] = 0;
    failed_count = 0;
    in_window = true;
    begin_ns = now_ns();
    window_end_ns = options.seconds > 0 ? begin_ns + (uint64_t)(options.seconds * 1e9) : 0;
    printf("{\"event\":\"begin\"}\n");
    fflush(stdout);
}

static void end_window(void) {
    static const char *const names[] = {"unary", "handshake", "sse", "rate"};
    double seconds = (double)(now_ns() - begin_ns) / 1e9;
    uint64_t chunks = count.chunks;
    for (unsigned i = 0; i < options.connections; i++)
        if (conns[i].state == BODY_CHUNKED)
            chunks += conns[i].chunks.count;
    in_window = false;
    printf("{\"event\":\"end\",\"mode\":\"%s\",\"tls\":%s,\"connections\":%u,\"seconds\":%.6f,\"requests\":%lu,\"rps\":%.1f,"
           "\"bytes\":%lu,\"events\":%lu,\"chunks\":%lu,\"reconnects\":%lu,\"lost\":%lu,\"waiting\":%lu,",
           names[options.mode], options.tls ? "true" : "false", options.connections, seconds, count.requests,
           (double)count.requests / seconds, count.bytes, count.events, chunks, count.reconnects, count.lost,
           backlog_len);
    printf("\"errors\":{\"status\":%lu,\"length\":%lu,\"connect\":%lu,\"broken\":%lu,\"marker\":%lu,\"first\":",
           count.bad_status, count.bad_length, count.connect_failed, count.broken, count.bad_marker);
    print_json_string(first_error);
    printf("},\"failures\":%lu,\"failed\":[", failed_count);
    for (uint64_t i = 0; i < failed_count && i < FAILED_MAX; i++) {
        const struct failed *f = &failed[i];
        printf("%s{\"port\":%u,\"opened\":%.6f,\"ended\":%.6f,\"foreign\":%s,\"error\":", i ? "," : "", f->port,
               (double)f->opened_ns / 1e9, (double)f->ended_ns / 1e9, f->foreign ? "true" : "false");
        print_json_string(f->what);
        putchar('}');
    }
    printf("],\"latency_us\":{\"p50\":%.1f,\"p90\":%.1f,\"p99\":%.1f,\"p999\":%.1f,\"max\":%.1f,\"mean\":%.1f}}\n",
           latency_us(0.5), latency_us(0.9), latency_us(0.99), latency_us(0.999), (double)latency.max / 1000,
           latency.count ? latency.sum / (double)latency.count / 1000 : 0.0);
    fflush(stdout);
}

static void on_control(void) {
    static char line[64];
    static size_t len;
    char byte;
    for (ssize_t n; (n = read(STDIN_FILENO, &byte, 1)) != -1;) {
        if (n == 0)
            exit(0);
        if (byte != '\n') {
            if (len < sizeof line - 1)
                line[len++] = byte;
            continue;
        }
        line[len] = 0;
        len = 0;
        if (strcmp(line, "begin") == 0)
            begin_window();
        else if (strcmp(line, "end") == 0)
            end_window();
        else
            fail("standard input takes `begin` and `end`, not `%s`", line);
    }
}

/* ---- start ---- */

static struct request compose_request(const char *key, const char *model) {
    char head[1024], before[512];
    snprintf(before, sizeof before, "{\"model\":\"%s\",%s%s\"max_tokens\":256,\"temperature\":0,\"messages\":[{\"role\":\"user\",\"content\":\"",
             model, options.mode == SSE ? "\"stream\":true," : "",
             options.marked ? "\"user\":\"" MARKER "0000000000000000\"," : "");
    const char *after = "\"}]}";
    size_t fixed = strlen(before) + strlen(after);
    size_t body_len = options.request_bytes > fixed ? options.request_bytes : fixed;
    int n = snprintf(head, sizeof head,
                     "POST %s HTTP/1.1\r\nhost: %s:%u\r\nauthorization: Bearer %s\r\naccept: application/json\r\n"
                     "user-agent: OpenAI/Python 2.0.0\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n",
                     options.path, options.host, options.port, key, body_len);
    if (n >= (int)sizeof head)
        fail("path or key is too long");
    struct request made = {malloc((size_t)n + body_len + 1), 0, 0};
    if (!made.bytes)
        fail("memory");
    char *p = stpcpy(stpcpy(made.bytes, head), before);
    for (size_t i = 0; i < body_len - fixed; i++)
        *p++ = "What is a gateway? "[i % 19];
    p = stpcpy(p, after);
    made.len = (size_t)(p - made.bytes);
    if (options.marked)
        made.digits_at = (size_t)((char *)memmem(made.bytes + n, body_len, MARKER, MARKER_WORD) - made.bytes) + MARKER_WORD;
    return made;
}

/* The lines of a file, or the one word given instead of it. */
static char **words(const char *file, const char *only, size_t *count_of) {
    size_t room = 1, n = 0, size = 0;
    char **list = malloc(sizeof *list), *line = NULL;
    if (!list)
        fail("memory");
    *count_of = 1;
    list[0] = (char *)(uintptr_t)only;
    if (!file)
        return list;
    FILE *from = fopen(file, "r");
    if (!from)
        fail("%s: %s", file, strerror(errno));
    for (ssize_t got; (got = getline(&line, &size, from)) > 0;) {
        if (line[got - 1] == '\n')
            line[--got] = 0;
        if (got == 0)
            continue;
        if (got > WORD_MAX)
            fail("%s: a line of more than %d bytes", file, WORD_MAX);
        if (n == room && !(list = realloc(list, (room *= 2) * sizeof *list)))
            fail("memory");
        if (!(list[n++] = strdup(line)))
            fail("memory");
    }
    free(line);
    fclose(from);
    if (n == 0)
        fail("%s: no line in it", file);
    *count_of = n;
    return list;
}

/* As many requests as the longer list has lines; the shorter one starts over. */
static void compose_requests(void) {
    size_t key_count, model_count;
    char **keys = words(options.keys, options.key, &key_count);
    char **models = words(options.models, options.model, &model_count);
    request_count = key_count > model_count ? key_count : model_count;
    requests = calloc(request_count, sizeof *requests);
    if (!requests)
        fail("memory");
    for (size_t i = 0; i < request_count; i++)
        requests[i] = compose_request(keys[i % key_count], models[i % model_count]);
}

/* Without a CA the chain is not even looked at: OpenSSL would otherwise build and check it, and then ignore the result. */
static int accept_any(X509_STORE_CTX *chain, void *unused) {
    (void)chain;
    (void)unused;
    return 1;
}

static void compose_tls(void) {
    tls_context = SSL_CTX_new(TLS_client_method());
    if (!tls_context || !SSL_CTX_set_min_proto_version(tls_context, TLS1_3_VERSION) ||
        !SSL_CTX_set1_groups_list(tls_context, "P-256") || !SSL_CTX_set_ciphersuites(tls_context, "TLS_AES_128_GCM_SHA256"))
        fail("TLS setup");
    /* One read per record instead of two: the header and the body of a record come in the same call. */
    SSL_CTX_set_read_ahead(tls_context, 1);
    SSL_CTX_set_mode(tls_context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    /* No session is ever offered: each handshake is a full one. */
    SSL_CTX_set_session_cache_mode(tls_context, SSL_SESS_CACHE_OFF);
    if (options.ca) {
        if (!SSL_CTX_load_verify_locations(tls_context, options.ca, NULL))
            fail("%s: not a CA file", options.ca);
        SSL_CTX_set_verify(tls_context, SSL_VERIFY_PEER, NULL);
    } else {
        SSL_CTX_set_cert_verify_callback(tls_context, accept_any, NULL);
    }
}

static void usage(FILE *to) {
    fprintf(to, "usage: load --mode unary|handshake|sse|rate --port N [--host 127.0.0.1] [--path /v1/chat/completions] [--key KEY]\n"
                "            [--model bench] [--connections 64] [--request-bytes 1024] [--expect-bytes N] [--rate 1000]\n"
                "            [--keys FILE] [--models FILE] [--opening N] [--tls] [--ca FILE] [--seconds S] [--marked]\n"
                "--keys, --models: one a line, taken in turn. --opening: at most so many connections in the making, 0 = all.\n"
                "--marked: each request has a marker that its answer must say back (the stub does with --echo); no streams.\n"
                "Without --seconds the lines `begin` and `end` on standard input open and close the window.\n"
                "Without --ca the certificate is not verified.\n");
}

static enum mode mode_named(const char *name) {
    static const char *const names[] = {"unary", "handshake", "sse", "rate"};
    for (int i = 0; i < 4; i++)
        if (strcmp(name, names[i]) == 0)
            return (enum mode)i;
    usage(stderr);
    exit(2);
}

static void read_options(int argc, char **argv) {
    static const struct option long_options[] = {
        {"mode", 1, 0, 'm'},        {"port", 1, 0, 'p'},          {"host", 1, 0, 'H'},         {"path", 1, 0, 'P'},
        {"key", 1, 0, 'k'},         {"model", 1, 0, 'M'},         {"connections", 1, 0, 'c'},  {"request-bytes", 1, 0, 'b'},
        {"expect-bytes", 1, 0, 'e'}, {"rate", 1, 0, 'r'},         {"tls", 0, 0, 't'},          {"ca", 1, 0, 'a'},
        {"keys", 1, 0, 'K'},        {"models", 1, 0, 'L'},        {"opening", 1, 0, 'o'},   {"marked", 0, 0, 'x'},
        {"seconds", 1, 0, 's'},     {"help", 0, 0, 'h'},          {0, 0, 0, 0}};
    for (int o; (o = getopt_long(argc, argv, "h", long_options, NULL)) != -1;) {
        switch (o) {
        case 'm': options.mode = mode_named(optarg); break;
        case 'p': options.port = (unsigned)atoi(optarg); break;
        case 'H': options.host = optarg; break;
        case 'P': options.path = optarg; break;
        case 'k': options.key = optarg; break;
        case 'M': options.model = optarg; break;
        case 'c': options.connections = (unsigned)atoi(optarg); break;
        case 'b': options.request_bytes = (unsigned)atoi(optarg); break;
        case 'e': options.expect_bytes = atoll(optarg); break;
        case 'r': options.rate = atof(optarg); break;
        case 't': options.tls = true; break;
        case 'a': options.ca = optarg; break;
        case 'K': options.keys = optarg; break;
        case 'L': options.models = optarg; break;
        case 'o': options.opening = (unsigned)atoi(optarg); break;
        case 'x': options.marked = true; break;
        case 's': options.seconds = atof(optarg); break;
        case 'h': usage(stdout); exit(0);
        default: usage(stderr); exit(2);
        }
    }
    options.tls = options.tls || options.mode == HANDSHAKE;
    target = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)options.port)};
    if (options.port < 1 || options.port > 65535 || options.connections < 1 || options.connections >= CONNECTIONS_MAX ||
        options.rate <= 0 || (options.marked && options.mode == SSE) || inet_pton(AF_INET, options.host, &target.sin_addr) != 1) {
        usage(stderr);
        exit(2);
    }
}

static void watch(int fd, uint32_t id) {
    struct epoll_event e = {.events = EPOLLIN, .data.u32 = id};
    /* EPERM: standard input is a file or /dev/null, which has nothing to say; then --seconds rules. */
    if (epoll_ctl(loop_fd, EPOLL_CTL_ADD, fd, &e) < 0 && errno != EPERM)
        fail("epoll_ctl: %s", strerror(errno));
}

int main(int argc, char **argv) {
    read_options(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    compose_requests();
    next_marker = (uint64_t)getpid() << 40; /* two loads at the same time have no marker in common */
    if (options.tls)
        compose_tls();
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    conns = calloc(options.connections, sizeof *conns);
    idle = calloc(options.connections, sizeof *idle);
    backlog = calloc(CONNECTIONS_MAX, sizeof *backlog);
    loop_fd = epoll_create1(EPOLL_CLOEXEC);
    schedule_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (!conns || !idle || !backlog || loop_fd < 0 || schedule_fd < 0)
        fail("start: %s", strerror(errno));
    watch(schedule_fd, SCHEDULE);
    if (options.seconds <= 0) {
        fcntl(STDIN_FILENO, F_SETFL, fcntl(STDIN_FILENO, F_GETFL) | O_NONBLOCK);
        watch(STDIN_FILENO, CONTROL);
    }
    for (unsigned i = 0; i < options.connections; i++)
        conns[i].fd = -1;
    unsigned at_once = options.opening > 0 && options.opening < options.connections ? options.opening : options.connections;
    while (opened_count < at_once)
        open_connection(&conns[opened_count++]);

    for (struct epoll_event events[EVENTS];;) {
        int n = epoll_wait(loop_fd, events, EVENTS, options.seconds > 0 ? 10 : -1);
        for (int i = 0; i < n; i++) {
            uint32_t id = events[i].data.u32;
            if (id == CONTROL)
                on_control();
            else if (id == SCHEDULE)
                on_schedule();
            else if (conns[id].fd >= 0)
                on_event(&conns[id], events[i].events);
        }
        if (options.seconds > 0 && ready_count == options.connections) {
            if (!in_window)
                begin_window();
            else if (now_ns() >= window_end_ns) {
                end_window();
                return 0;
            }
        }
    }
}
