/* A model server that answers faster than any proxy asks: the upstream of every measurement.
 *
 * One process, one thread, epoll, HTTP/1.1 keep-alive, nothing allocated and nothing formatted per request: every answer is
 * composed once at start. A POST gets a chat completion of fixed size; with `"stream":true` in its body an SSE stream that
 * sends one event each interval, all streams in one turn of one timer, until the client leaves or --count is reached. Heads,
 * the first event and the terminators are those that vLLM sends. With --echo a chat completion says the marker of its
 * request back, from a copy that each connection has. */
#define _GNU_SOURCE
#include "http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { IN_BYTES = 16384, EVENTS = 512, CARRY = 15, OUT_MAX = 1 << 20 };

/* What one connection is doing: reading a request, or sending an answer that has no end of its own. */
enum state { HEAD, BODY_LENGTH, BODY_CHUNKED, STREAMING };
enum target { COMPLETION, HEALTH, MODELS, STATS, NOT_FOUND };

struct conn {
    int fd; /* -1: free */
    enum state state;
    enum target target;
    bool wants_stream, close_after;
    uint32_t interest; /* epoll events asked for */
    uint32_t stream;   /* its place in streams[] while STREAMING */
    uint64_t body_left;
    uint64_t sent; /* events of the stream */
    struct chunks chunks;
    const char *out; /* rest of an answer that the socket did not take */
    size_t out_left;
    uint32_t in_len;
    uint32_t carry_len;
    char carry[CARRY]; /* last bytes of the body so far: a match may span two reads */
    struct marker marker;
    char in[IN_BYTES];
    char *echo; /* --echo: this descriptor's copy of the completion; kept for the connections after this one */
};

struct answer {
    char *bytes;
    size_t len;
};

static struct conn *conns; /* by file descriptor; mapped without reserve, touched when used */
static struct conn **streams;
static size_t streams_open;
static size_t fd_limit;
static int loop_fd;
static struct answer completion, health, models, not_found, too_large, stream_start, stream_event, stream_end;
static size_t echo_at; /* where the digits of the marker are in the completion */
static char stats_text[1024];
static struct {
    uint64_t requests, connections, events, skipped, late, bad;
} counters;
static struct {
    unsigned port, unary_bytes, event_bytes, interval_ms;
    uint64_t count;
    const char *model;
    bool echo;
} options = {0, 1500, 180, 20, 0, "bench", false};

static void fail(const char *what) {
    fprintf(stderr, "stub: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* ---- the answers, composed once ---- */

static struct answer compose(const char *status, const char *type, const char *body, size_t body_len) {
    char date[64];
    time_t now = time(NULL);
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", gmtime(&now));
    struct answer a = {malloc(body_len + 512), 0};
    if (!a.bytes)
        fail("memory");
    int n = snprintf(a.bytes, 512,
                     "HTTP/1.1 %s\r\ndate: %s\r\nserver: uvicorn\r\ncontent-length: %zu\r\ncontent-type: %s\r\n"
                     "vary: Origin\r\nx-request-id: 56324fa69da4405d81aa38a09cc489ac\r\n\r\n",
                     status, date, body_len, type);
    memcpy(a.bytes + n, body, body_len);
    a.len = (size_t)n + body_len;
    return a;
}

/* before + padding words + after, exactly total bytes; exits if the two alone are longer. */
static char *padded(const char *before, const char *after, size_t total, const char *option) {
    size_t fixed = strlen(before) + strlen(after);
    if (fixed > total || total > OUT_MAX) {
        fprintf(stderr, "stub: %s must be between %zu and %d\n", option, fixed, OUT_MAX);
        exit(2);
    }
    char *text = malloc(total + 1);
    if (!text)
        fail("memory");
    char *p = stpcpy(text, before);
    for (size_t i = 0; i < total - fixed; i++)
        *p++ = " token"[i % 6];
    strcpy(p, after);
    return text;
}

static size_t put_chunk(char *to, const char *data) {
    return (size_t)sprintf(to, "%zx\r\n%s\r\n", strlen(data), data);
}

static void compose_answers(void) {
    char before[512];
    snprintf(before, sizeof before,
             "{\"id\":\"chatcmpl-b5c0792cd975ce95\",\"object\":\"chat.completion\",\"created\":1795418397,\"model\":\"%s\","
             "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"%s",
             options.model, options.echo ? MARKER "0000000000000000 " : "");
    const char *after =
        "\",\"refusal\":null,\"annotations\":null,\"audio\":null,\"function_call\":null,\"reasoning\":null},\"logprobs\":null,"
        "\"finish_reason\":\"length\",\"stop_reason\":null,\"token_ids\":null,\"routed_experts\":null}],\"service_tier\":null,"
        "\"system_fingerprint\":\"vllm-0.32.0-ea1d92a1\",\"usage\":{\"prompt_tokens\":234,\"total_tokens\":354,"
        "\"completion_tokens\":120,\"prompt_tokens_details\":{\"cached_tokens\":0,\"created_cache_tokens\":0,"
        "\"multimodal_tokens\":null},\"completion_tokens_details\":null},\"prompt_logprobs\":null,\"prompt_token_ids\":null,"
        "\"prompt_text\":null,\"kv_transfer_params\":null,\"ec_transfer_params\":null,\"metrics\":null}";
    char *body = padded(before, after, options.unary_bytes, "--unary-bytes");
    completion = compose("200 OK", "application/json", body, options.unary_bytes);
    free(body);
    if (options.echo)
        echo_at = (size_t)((char *)memmem(completion.bytes, completion.len, MARKER, MARKER_WORD) - completion.bytes) + MARKER_WORD;

    health = compose("200 OK", "text/plain", "", 0);
    int n = snprintf(before, sizeof before,
                     "{\"object\":\"list\",\"data\":[{\"id\":\"%s\",\"object\":\"model\",\"created\":1795418397,"
                     "\"owned_by\":\"vllm\",\"root\":\"%s\",\"parent\":null,\"max_model_len\":8192}]}",
                     options.model, options.model);
    models = compose("200 OK", "application/json", before, (size_t)n);
    not_found = compose("404 Not Found", "application/json", "{\"detail\":\"Not Found\"}", 22);
    too_large = compose("431 Request Header Fields Too Large", "text/plain", "", 0);

    char id[256];
    snprintf(id, sizeof id,
             "data: {\"id\":\"chatcmpl-bb8b82c5\",\"object\":\"chat.completion.chunk\",\"created\":1795418401,"
             "\"model\":\"%s\",\"choices\":[{\"index\":0,\"delta\":",
             options.model);
    char first[1024], last[1024];
    snprintf(first, sizeof first, "%s{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n", id);
    snprintf(last, sizeof last, "%s{\"content\":\"\"},\"finish_reason\":\"length\",\"stop_reason\":null}]}\n\n", id);
    snprintf(before, sizeof before, "%s{\"content\":\"", id);
    char *event = padded(before, "\"},\"finish_reason\":null}]}\n\n", options.event_bytes, "--event-bytes");

    char date[64];
    time_t now = time(NULL);
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", gmtime(&now));
    stream_start.bytes = malloc(2048);
    stream_event.bytes = malloc(options.event_bytes + 32);
    stream_end.bytes = malloc(2048);
    if (!stream_start.bytes || !stream_event.bytes || !stream_end.bytes)
        fail("memory");
    stream_start.len = (size_t)sprintf(stream_start.bytes,
                                       "HTTP/1.1 200 OK\r\ndate: %s\r\nserver: uvicorn\r\n"
                                       "content-type: text/event-stream; charset=utf-8\r\nvary: Origin\r\n"
                                       "x-request-id: 9ebec9795dc742a39afb1ab5328ac628\r\ntransfer-encoding: chunked\r\n\r\n",
                                       date);
    stream_start.len += put_chunk(stream_start.bytes + stream_start.len, first);
    stream_event.len = put_chunk(stream_event.bytes, event);
    stream_end.len = put_chunk(stream_end.bytes, last);
    stream_end.len += put_chunk(stream_end.bytes + stream_end.len, "data: [DONE]\n\n");
    stream_end.len += (size_t)sprintf(stream_end.bytes + stream_end.len, "0\r\n\r\n");
    free(event);
}

static struct answer stats(void) {
    char body[512];
    int n = snprintf(body, sizeof body,
                     "{\"requests\":%lu,\"connections\":%lu,\"streams_open\":%zu,\"events\":%lu,\"skipped\":%lu,"
                     "\"late\":%lu,\"bad\":%lu}",
                     counters.requests, counters.connections, streams_open, counters.events, counters.skipped,
                     counters.late, counters.bad);
    struct answer a = {stats_text, 0};
    a.len = (size_t)snprintf(stats_text, sizeof stats_text,
                             "HTTP/1.1 200 OK\r\ncontent-length: %d\r\ncontent-type: application/json\r\n\r\n%s", n, body);
    return a;
}

/* ---- one connection ---- */

static void stop_streaming(struct conn *c) {
    struct conn *last = streams[--streams_open];
    streams[c->stream] = last;
    last->stream = c->stream;
    c->state = HEAD;
}

static void drop(struct conn *c) {
    if (c->state == STREAMING)
        stop_streaming(c);
    close(c->fd); /* also leaves the epoll set: the descriptor is not duplicated */
    c->fd = -1;
}

static void interest(struct conn *c, uint32_t events) {
    if (c->interest == events)
        return;
    c->interest = events;
    struct epoll_event e = {.events = events, .data.fd = c->fd};
    if (epoll_ctl(loop_fd, EPOLL_CTL_MOD, c->fd, &e) < 0)
        fail("epoll_ctl");
}

/* Sends what it can; the rest waits for EPOLLOUT. False: the connection is gone. */
static bool flush_out(struct conn *c) {
    while (c->out_left > 0) {
        ssize_t n = send(c->fd, c->out, c->out_left, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            /* Requests behind an answer that does not leave stay in the kernel; a stream keeps reading, to see its end. */
            interest(c, c->state == STREAMING ? EPOLLIN | EPOLLOUT : EPOLLOUT);
            return true;
        }
        if (n < 0) {
            drop(c);
            return false;
        }
        c->out += n;
        c->out_left -= (size_t)n;
    }
    if (c->close_after && c->state == HEAD) {
        drop(c);
        return false;
    }
    interest(c, EPOLLIN);
    return true;
}

static bool answer(struct conn *c, struct answer a) {
    c->out = a.bytes;
    c->out_left = a.len;
    return flush_out(c);
}

/* Looks for `"stream":true` in a piece of the body, JSON blanks allowed around the colon, across pieces. */
static void scan(struct conn *c, const char *p, size_t n) {
    char window[CARRY * 2];
    if (options.echo)
        marker_next(&c->marker, p, n);
    const char *from = p;
    size_t len = n;
    if (c->carry_len > 0) {
        size_t add = n < CARRY ? n : CARRY;
        memcpy(window, c->carry, c->carry_len);
        memcpy(window + c->carry_len, p, add);
        from = window;
        len = c->carry_len + add;
    }
    for (int pass = 0; pass < 2 && !c->wants_stream; pass++) {
        const char *end = from + len;
        for (const char *hit = from; (hit = memmem(hit, (size_t)(end - hit), "\"stream\"", 8)) != NULL;) {
            hit += 8;
            const char *q = hit;
            while (q < end && *q == ' ')
                q++;
            if (q < end && *q == ':')
                q++;
            while (q < end && *q == ' ')
                q++;
            if (end - q >= 4 && memcmp(q, "true", 4) == 0) {
                c->wants_stream = true;
                break;
            }
        }
        if (from == p)
            break;
        from = p;
        len = n;
    }
    if (n >= CARRY) {
        memcpy(c->carry, p + n - CARRY, CARRY);
        c->carry_len = CARRY;
    } else {
        size_t keep = c->carry_len + n > CARRY ? CARRY - n : c->carry_len;
        memmove(c->carry, c->carry + c->carry_len - keep, keep);
        memcpy(c->carry + keep, p, n);
        c->carry_len = (uint32_t)(keep + n);
    }
}

/* The completion with the marker of this request in it; one without a marker is answered with zeros, which are nobody's. */
static struct answer echoed(struct conn *c) {
    if (!c->echo) {
        c->echo = malloc(completion.len);
        if (!c->echo)
            fail("memory");
        memcpy(c->echo, completion.bytes, completion.len);
    }
    if (marker_found(&c->marker))
        memcpy(c->echo + echo_at, c->marker.digits, MARKER_DIGITS);
    else
        memset(c->echo + echo_at, '0', MARKER_DIGITS);
    return (struct answer){c->echo, completion.len};
}

static bool respond(struct conn *c) {
    counters.requests++;
    c->state = HEAD;
    switch (c->target) {
    case COMPLETION:
        if (!c->wants_stream)
            return answer(c, options.echo ? echoed(c) : completion);
        c->state = STREAMING;
        c->sent = 0;
        c->stream = (uint32_t)streams_open;
        streams[streams_open++] = c;
        return answer(c, stream_start);
    case HEALTH:
        return answer(c, health);
    case MODELS:
        return answer(c, models);
    case STATS:
        return answer(c, stats());
    case NOT_FOUND:
        break;
    }
    return answer(c, not_found);
}

static enum target target_of(const char *p, size_t n) {
    if (n > 5 && memcmp(p, "POST ", 5) == 0)
        return COMPLETION;
    if (n > 12 && memcmp(p, "GET /health ", 12) == 0)
        return HEALTH;
    if (n > 15 && memcmp(p, "GET /v1/models ", 15) == 0)
        return MODELS;
    if (n > 11 && memcmp(p, "GET /stats ", 11) == 0)
        return STATS;
    return NOT_FOUND;
}

/* One turn over the buffered bytes. Returns the bytes consumed, -1 when the connection is gone. */
static ssize_t advance(struct conn *c, const char *p, size_t n) {
    const char *data;
    size_t len;
    switch (c->state) {
    case HEAD: {
        size_t head_len = head_length(p, n);
        if (head_len == 0) {
            if (n < IN_BYTES)
                return 0;
            c->close_after = true;
            counters.bad++;
            return answer(c, too_large) ? (ssize_t)n : -1;
        }
        struct head h;
        if (!head_fields(p, head_len, &h)) {
            counters.bad++;
            drop(c);
            return -1;
        }
        c->target = target_of(p, head_len);
        c->wants_stream = false;
        c->carry_len = 0;
        c->marker.at = 0;
        c->close_after = h.close;
        if (h.chunked) {
            c->chunks = (struct chunks){0};
            c->state = BODY_CHUNKED;
        } else if (h.content_length > 0) {
            c->body_left = (uint64_t)h.content_length;
            c->state = BODY_LENGTH;
        } else if (!respond(c)) {
            return -1;
        }
        return (ssize_t)head_len;
    }
    case BODY_LENGTH:
        len = n < c->body_left ? n : (size_t)c->body_left;
        scan(c, p, len);
        c->body_left -= len;
        if (c->body_left == 0 && !respond(c))
            return -1;
        return (ssize_t)len;
    case BODY_CHUNKED: {
        size_t used = chunks_next(&c->chunks, p, n, &data, &len);
        if (len > 0)
            scan(c, data, len);
        if (c->chunks.state == CHUNK_BAD) {
            counters.bad++;
            drop(c);
            return -1;
        }
        if (c->chunks.state == CHUNK_DONE && !respond(c))
            return -1;
        return (ssize_t)used;
    }
    case STREAMING:
        break;
    }
    return 0;
}

static void process(struct conn *c) {
    size_t at = 0;
    while (at < c->in_len && c->out_left == 0 && c->state != STREAMING) {
        ssize_t used = advance(c, c->in + at, c->in_len - at);
        if (used < 0)
            return;
        if (used == 0)
            break;
        at += (size_t)used;
    }
    if (at > 0) {
        memmove(c->in, c->in + at, c->in_len - at);
        c->in_len -= (uint32_t)at;
    }
}

static void on_readable(struct conn *c) {
    if (c->in_len == IN_BYTES) {
        interest(c, c->interest & ~(uint32_t)EPOLLIN); /* a stream's client that pipelines: its end shows as EPOLLHUP */
        return;
    }
    ssize_t n = recv(c->fd, c->in + c->in_len, IN_BYTES - c->in_len, 0);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        drop(c);
        return;
    }
    c->in_len += (uint32_t)n;
    process(c);
}

static void on_event(struct conn *c, uint32_t events) {
    if (c->fd < 0)
        return;
    if (events & EPOLLOUT) {
        if (!flush_out(c))
            return;
        process(c);
        if (c->fd < 0)
            return;
    }
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        on_readable(c);
}

static void on_accept(int listener) {
    for (int i = 0; i < 64; i++) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0)
            return;
        if ((size_t)fd >= fd_limit) {
            close(fd);
            return;
        }
        int on = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct conn *c = &conns[fd];
        memset(c, 0, offsetof(struct conn, in));
        c->fd = fd;
        c->interest = EPOLLIN;
        struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
        if (epoll_ctl(loop_fd, EPOLL_CTL_ADD, fd, &e) < 0)
            fail("epoll_ctl");
        counters.connections++;
    }
}

/* One event on every stream. A stream whose last event has not left yet loses this one, and it is counted: late events
 * sent in a burst would flatter the proxy. */
static void on_tick(int timer) {
    uint64_t turns;
    if (read(timer, &turns, sizeof turns) != sizeof turns)
        return;
    counters.late += (turns - 1) * streams_open; /* turns of the timer that passed while others were served */
    for (size_t i = streams_open; i-- > 0;) { /* backwards: dropping one moves the last into its place */
        struct conn *c = streams[i];
        if (c->out_left > 0) {
            counters.skipped++;
            continue;
        }
        if (options.count > 0 && c->sent == options.count) {
            stop_streaming(c);
            if (answer(c, stream_end))
                process(c);
            continue;
        }
        c->sent++;
        counters.events++;
        answer(c, stream_event);
    }
}

static void usage(FILE *to) {
    fprintf(to, "usage: stub --port N [--unary-bytes 1500] [--event-bytes 180] [--interval-ms 20] [--count 0] [--model bench] [--echo]\n"
                "Answers POST with a chat completion, or an SSE stream if the body has \"stream\":true; GET /health, /v1/models,\n"
                "/stats. --count: events of a stream, 0 = until the client leaves. --echo: completions say the marker of their request.\n");
}

static void read_options(int argc, char **argv) {
    static const struct option long_options[] = {
        {"port", 1, 0, 'p'},  {"unary-bytes", 1, 0, 'u'}, {"event-bytes", 1, 0, 'e'}, {"interval-ms", 1, 0, 'i'},
        {"count", 1, 0, 'c'}, {"model", 1, 0, 'm'},       {"echo", 0, 0, 'E'},         {"help", 0, 0, 'h'},        {0, 0, 0, 0}};
    for (int o; (o = getopt_long(argc, argv, "h", long_options, NULL)) != -1;) {
        switch (o) {
        case 'p': options.port = (unsigned)atoi(optarg); break;
        case 'u': options.unary_bytes = (unsigned)atoi(optarg); break;
        case 'e': options.event_bytes = (unsigned)atoi(optarg); break;
        case 'i': options.interval_ms = (unsigned)atoi(optarg); break;
        case 'c': options.count = strtoull(optarg, NULL, 10); break;
        case 'm': options.model = optarg; break;
        case 'E': options.echo = true; break;
        case 'h': usage(stdout); exit(0);
        default: usage(stderr); exit(2);
        }
    }
    if (options.port < 1 || options.port > 65535 || options.interval_ms < 1 || strlen(options.model) > 100) {
        usage(stderr);
        exit(2);
    }
}

static int listen_on(unsigned port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int on = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0 ||
        bind(fd, (struct sockaddr *)&at, sizeof at) < 0 || listen(fd, 4096) < 0)
        fail("listen");
    return fd;
}

int main(int argc, char **argv) {
    read_options(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    compose_answers();

    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max > 65536 ? 65536 : files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    fd_limit = files.rlim_cur;
    conns = mmap(NULL, fd_limit * sizeof *conns, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    streams = calloc(fd_limit, sizeof(struct conn *));
    if (conns == MAP_FAILED || !streams)
        fail("memory");

    int listener = listen_on(options.port);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    loop_fd = epoll_create1(EPOLL_CLOEXEC);
    struct timespec interval = {options.interval_ms / 1000, (long)(options.interval_ms % 1000) * 1000000};
    struct itimerspec every = {interval, interval};
    struct epoll_event accepts = {.events = EPOLLIN, .data.fd = listener}, ticks = {.events = EPOLLIN, .data.fd = timer};
    if (timer < 0 || loop_fd < 0 || timerfd_settime(timer, 0, &every, NULL) < 0 ||
        epoll_ctl(loop_fd, EPOLL_CTL_ADD, listener, &accepts) < 0 || epoll_ctl(loop_fd, EPOLL_CTL_ADD, timer, &ticks) < 0)
        fail("start");
    printf("{\"event\":\"ready\",\"port\":%u,\"unary_bytes\":%u,\"event_bytes\":%u}\n", options.port, options.unary_bytes,
           options.event_bytes);
    fflush(stdout);

    for (struct epoll_event events[EVENTS];;) {
        int n = epoll_wait(loop_fd, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener)
                on_accept(listener);
            else if (fd == timer)
                on_tick(timer);
            else
                on_event(&conns[fd], events[i].events);
        }
    }
}
