/* The native data path: one Core per worker, its connections, and the exchanges on them.
 *
 *   downstream bytes -> Downstream (py_downstream.c) -> Stream (py_stream.c) -> the walk, in Python
 *                          ^                               |
 *                          +---- relay (py_upstream.c) <---+-- forward -> Upstream
 *
 * Everything runs on the worker's event-loop thread, in turns (py_loop.c). A connection is kept alive by its core from
 * the moment its descriptor is registered to the end of the turn in which it is closed. A Stream is owned by its
 * Downstream until it is settled. None of these types takes part in cyclic garbage collection: every cycle is cut at
 * settle or when the connection is let go, and an object that is never visited costs the collector nothing.
 */
#ifndef ASC_PY_CORE_H
#define ASC_PY_CORE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stddef.h>

#include <openssl/evp.h>
#include <sys/uio.h>

#include "chunk.h"
#include "forwarded.h"
#include "h2.h"
#include "http1.h"
#include "jsonscan.h"
#include "limit.h"
#include "meter.h"
#include "names.h"
#include "page.h"
#include "peers.h"
#include "proxy2.h"
#include "sse.h"
#include "tls.h"
#include "wheel.h"
#include "writer.h"

#define MS 1000000ull
#define DOWN_READ 65536u     /* bytes of one read from a client */
#define UP_READ 16384u       /* bytes of one read from an upstream: the bound of what a stalled client leaves in the process */
#define HEADROOM 32u         /* before every buffer of upstream bytes: room for a chunk-size line */
#define TAILROOM 16u         /* behind it: room for the end of a chunk and the last chunk */
#define PIPELINE_MAX 65536u  /* bytes read ahead of a request in flight */
#define HEADS_MAX 65536u
#define TEXTS 2048u     /* power of two: models, keys and paths in use at the same time */
#define TEXT_MAX 128u
#define SPARES 64u      /* what is kept for the next request instead of being freed */
#define SPARE_BODY 2048u
#ifdef __SANITIZE_ADDRESS__
#define KEPT 0u /* memory that is used again would hide a use after free */
#else
#define KEPT SPARES
#endif
#define LOG_MAX (4u << 20) /* access lines between two ticks, at more requests than a worker answers; touched as used */
#define PROGRESS_NS (1000 * MS) /* how often a stalled client is looked at */
#define LINGER_NS (2000 * MS)   /* how long a refused client may go on sending (RFC 9112 9.6) */
#define N_LOOPBACK 2u           /* networks of core->exempt that are loopback; the rest is trusted_peers */
#define PEER_TEXT 72u
#define INFORMATIONAL_MAX 16u   /* 1xx heads before one answer */

typedef struct Core Core;
typedef struct Listener Listener;
typedef struct Plan Plan;
typedef struct Stream Stream;
typedef struct Downstream Downstream;
typedef struct Frames Frames;
typedef struct Upstream Upstream;
typedef struct Conn Conn;
typedef struct Acceptor Acceptor;

/* Limits by the names of ascproxy.model.node.Limits, milliseconds made nanoseconds. */
typedef struct {
    uint64_t tls_handshake, header_timeout, idle_timeout, connection_age, body_idle, body_total, write_stall;
    uint64_t connection_requests, body_min_rate, max_body, max_bodies, max_connections;
    uint64_t max_connections_per_ip, max_unauthenticated_per_ip;
    http1_limits head;
    chunk_limits chunk;
    json_limits json;
    h2_limits h2;
} asc_limits;

/* What the supervisor says of the service's memory (supervisor/memory.py): each step keeps what those before it do. */
enum overload { OVERLOAD_NONE, OVERLOAD_NO_KEEP_ALIVE, OVERLOAD_REFUSE, OVERLOAD_NO_ACCEPT };

/* Addresses that start with `bits` of `address` (IPv4 as ::ffff:a.b.c.d). */
typedef struct {
    uint8_t address[16];
    uint8_t bits;
} asc_network;

/* Bytes that are consumed at the front and appended at the back. */
typedef struct {
    char *bytes;
    size_t off, len, cap; /* bytes[off .. off+len) are in use */
} asc_buffer;

struct Core {
    PyObject_HEAD
    PyObject *on_head, *on_request, *on_reject, *on_response, *on_settle; /* bound methods of the walk */
    PyObject *page_object;
    asc_page *page;
    asc_limits limits;
    uint32_t trips[LIMIT_COUNT]; /* the cell of each limit; 0 where the page is full */
    asc_peers *peers;
    asc_network *exempt;         /* from the caps per address: loopback and trusted_peers */
    uint32_t n_exempt;
    uint8_t overload;            /* enum overload */
    int epoll;           /* of every descriptor of the data path, and of the event loop's own */
    struct asc_loop *loop; /* NULL while not attached: py_loop.c */
    Conn *ready;         /* connections with something left to read, read again in the next turn */
    Conn *lost;          /* closed ones, let go at the end of the turn */
    Acceptor *acceptors;
    char *down_bytes, *up_bytes, *cipher_bytes; /* what one read brings; HEADROOM before, TAILROOM behind */
    char *plain;         /* decrypted client bytes, DOWN_READ */
    char *heads;         /* heads under construction, HEADS_MAX */
    char *transmit;      /* what is joined for one TLS record, UP_READ */
    tls_output output;   /* ciphertext on its way to a socket; empty between calls */
    wheel wheel;
    http1_head head;     /* the head being parsed; consumed before the next one */
    json_request *scans[8];
    unsigned n_scans;
    PyObject *texts[TEXTS];      /* bytes objects of short texts that come again and again: see core_text */
    Stream *spare_streams;       /* linked by `core` (freed objects have no other use for it) */
    char *spare_bodies[SPARES];  /* blocks of SPARE_BODY bytes */
    unsigned n_spare_streams, n_spare_bodies;
    EVP_MD *sha256;
    EVP_MD_CTX *digest;
    uint64_t random[2];
    Downstream *downs;   /* list of all downstream connections */
    Downstream *dirty;   /* those of HTTP/2 that have something to say: see core_flush; referenced */
    char *spare_outs[8]; /* blocks of OUT_BLOCK bytes */
    unsigned n_spare_outs;
    uint64_t n_downs, n_in_flight, n_paused, n_busy, n_idle, body_bytes, calls;
    char *log;
    size_t log_len;
    uint64_t date_second;
    char date[32];       /* IMF-fixdate of date_second */
    char stamp[24];      /* ISO 8601 of it, without fraction */
    uint64_t drain_unary_ns, drain_stream_ns, drain_idle_ns; /* two times and a duration */
    bool draining, access_log;
};

struct Listener {
    PyObject_HEAD
    PyObject *name;
    PyObject *tls; /* TlsContext or None; read for each new connection */
    uint32_t trust; /* turns whenever a new context lets in other clients than the one before */
    bool http2;    /* in plaintext; over TLS its context says so by ALPN */
    asc_limits limits;
    bool proxy_protocol;             /* each connection begins with a PROXY header: py_proxy.c */
    uint64_t refused;                /* by that, since they were last asked for; why and who is of the last one */
    const char *refused_why;
    char refused_peer[PEER_TEXT];
};

/* How an event stream ends that breaks off after content: by names of outcomes. */
enum ending { END_TIMEOUT, END_TRUNCATED, END_ABORTED, END_DRAINING, N_ENDINGS };

struct Plan {
    PyObject_HEAD
    int endpoint;
    PyObject *head, *secret_prefix, *log; /* bytes */
    PyObject *secret;                     /* Secret or NULL */
    PyObject *request_headers, *response_headers; /* Names */
    PyObject *model;                      /* bytes: a JSON string with its quotes, or NULL */
    PyObject *ask;                        /* bytes: "stream_options":{...}, or NULL: see py_forward.c */
    PyObject *endings[N_ENDINGS];         /* bytes: the event that tells of each, or NULL */
    bool strip;                           /* what was asked for here is not shown to the client */
    uint8_t scan;
    uint64_t first_byte_ns, idle_ns, total_ns;
    uint32_t block;
};

/* What both kinds of connection share: a descriptor, perhaps TLS, and what the socket did not take. */
struct Conn {
    PyObject_HEAD
    Core *core;
    int fd;              /* -1 as soon as we close: from then on nothing is read, and nothing more is sent */
    int socket;          /* the descriptor itself; -1 once it is let go */
    tls_conn *tls;
    wheel_timer timer;
    asc_buffer out;      /* leaves before anything else */
    Conn *next_ready, *prev_ready, *next_lost;
    uint8_t kind;        /* what the timer means: enum of the connection's file, 0 nothing */
    bool write_paused;   /* `out` is not empty */
    bool read_paused;
    bool readable;       /* the kernel may hold bytes of which no further event tells */
    bool hung_up;        /* the peer sends no more, or is gone: read up to the end */
    bool queued;         /* in core->ready */
    bool closing;        /* closed by us: `out` may still leave */
    bool lost;           /* in core->lost */
    bool broken;         /* reading failed */
    bool end_later;      /* tell the peer of our end once `out` has left */
    size_t out_mark;     /* while closing: of `out`, when it was looked at last */
};

/* What the timer of a Downstream means. */
enum down_deadline { DOWN_NONE, DOWN_HANDSHAKE, DOWN_HEADER, DOWN_BODY, DOWN_IDLE, DOWN_STALL, DOWN_LINGER, DOWN_PROXY, DOWN_FRAMES };

struct Downstream {
    Conn conn;
    Listener *listener;
    Downstream *next, *prev; /* of core->downs */
    Stream *stream;       /* the exchange under way; owned. Of HTTP/1: those of HTTP/2 are in frames */
    Frames *frames;       /* the connection speaks HTTP/2: py_h2.c */
    asc_buffer pending;   /* a partial head, or requests that came early */
    size_t seen;          /* bytes of pending that were no complete head */
    uint64_t opened_ns, age_ns, head_ns, requests;
    uint64_t stall_ns, stall_mark;
    asc_peer *address;    /* its entry in core->peers; NULL where it is exempt, or was not let in */
    char peer[PEER_TEXT]; /* who is connected */
    char *client;         /* who that speaks for, by its PROXY header; owned, NULL where it is the peer itself */
    bool unproxied;       /* the PROXY header has not come yet */
    bool trusted;         /* peer (or client) is one of trusted_peers: it may name others in X-Forwarded-For */
    PyObject *client_cert, *client_line; /* ClientCertificate and its member of the access line; NULL without one */
    uint32_t trust;       /* the listener's, when this client was last found to be one that it lets in */
    bool running;         /* inside down_run: do not enter it again */
    bool last;            /* the exchange under way, or the one just ended, is the last */
    bool linger;          /* the client may still be sending: drain before closing */
    bool eof;
};

enum upstream_state { UP_CONNECTING, UP_HANDSHAKE, UP_READY, UP_CLOSED };

struct Upstream {
    Conn conn;
    PyObject *ready_callback; /* until it is called once */
    PyObject *pool;           /* the pool's own mark */
    PyObject *server_name;    /* str */
    PyObject *tls_context;    /* TlsContext or NULL */
    Stream *stream;           /* borrowed: the exchange that uses it */
    asc_buffer partial;       /* an incomplete response head, after HEADROOM */
    size_t seen;
    struct iovec rest[8];     /* of the request, not yet sent; memory of the stream and its plan */
    int n_rest;
    chunk_decoder chunk;
    uint64_t left, idle_since_ns;
    int endpoint;
    uint32_t served;
    uint8_t state, framing, informational;
    bool head_done, keep_alive, reusable, surprise;
};

enum stream_phase {
    PHASE_BODY,     /* collecting the request */
    PHASE_DECIDING, /* the walk's turn */
    PHASE_WAIT,     /* sent, no answer yet */
    PHASE_HOLD,     /* an answer has begun, without content yet: nothing was sent to the client */
    PHASE_RELAY,
    PHASE_FLUSH,    /* all is written, the client drains */
    PHASE_DONE,
};

enum stream_scanner { SCANNER_NONE, SCANNER_JSON, SCANNER_SSE };

enum usage_source { USAGE_NONE, USAGE_REPORTED, USAGE_PARTIAL, USAGE_COUNTED };

/* What is kept of an event stream on its way to the client: py_events.c. */
typedef struct {
    asc_buffer early;     /* in PHASE_HOLD: the head of the answer (of any answer), then events */
    asc_buffer partial;   /* the start of an event whose end has not come */
    size_t head_len;      /* of early */
    uint32_t *per_choice; /* completion tokens by choice, where there are several; owned */
    uint32_t n_choices;
    bool strip;           /* usage was asked for here, not by the client */
    bool final;           /* the usage of all choices together has come */
    bool mid_event;       /* a part of the event under way has been sent */
    bool whole;           /* its terminator came, and nothing failed before it */
    bool ended;           /* a terminator was kept back: nothing of the upstream's follows */
    bool said;            /* the client was told how it ended */
} asc_events;

/* What a Stream is on an HTTP/2 connection: py_h2.c. */
typedef struct {
    int32_t id;               /* 0: HTTP/1 */
    Stream *next, *prev;      /* on its connection */
    Stream *next_freed;       /* of those that are not blocked any more */
    asc_buffer queued;        /* of the answer: waits for the client's window */
    struct iovec *parts;      /* of the answer: bytes that are being sent right now */
    int n_parts;
    size_t n_ready;           /* bytes of queued, or else of parts */
    uint64_t stall_ns;
    bool fresh;               /* its head has come in the read under way */
    bool blocked;             /* the client does not take what there is */
    bool freed, moved, last, ended, closed; /* in the list above; bytes have left; all of the answer is here; has left */
} asc_h2_stream;

struct Stream {
    PyObject_HEAD
    Core *core;
    Downstream *down; /* borrowed; NULL once settled */
    Listener *listener;
    Upstream *up;     /* owned */
    Plan *plan;       /* owned */
    PyObject *context, *log, *code, *task; /* the walk's */
    /* the request: fields and head bytes are copies in one block */
    http1_field *fields;
    char *head;
    uint32_t n_fields, head_len;
    uint8_t first[HTTP1_N_NAMES];
    asc_span method, path, query, credential;
    char request_id[128];
    char client[FORWARDED_TEXT]; /* by X-Forwarded-For of a trusted peer; "" without one */
    uint8_t request_id_len;
    uint8_t phase, minor, framing, scanner, in_walk;
    bool parsed, head_method, two_credentials, expect_continue, done, committed, finished, local, held, reused, json_done;
    uint64_t content_length, body_left, body_limit, body_rate_mark, body_rate_ns, body_started_ns, body_last_ns;
    chunk_decoder chunk;
    char *body;
    size_t body_len, body_cap;
    json_request *scan;
    enum json_error json_error;
    json_fields json;
    /* the answer */
    asc_events events;
    union {
        sse_scanner sse;
        json_answer json;
    } watch;
    const char *reject, *failure, *outcome;
    uint16_t status, upstream_status, attempts;
    bool chunked_out, to_close_out;
    int64_t usage_in, usage_out;
    uint8_t finish, usage_source, limit; /* limit: enum asc_limit, the last that tripped */
    uint64_t t_start, t_forward, t_first, t_last, bytes_in, bytes_out;
    http1_head *held_head; /* during on_response only */
    const char *held_bytes;
    size_t head_out; /* bytes of core->heads that go before the first byte of the answer */
    asc_h2_stream h2;
};

extern PyTypeObject Core_Type, Listener_Type, Plan_Type, Names_Type, Stream_Type, Downstream_Type, Upstream_Type, Acceptor_Type;

/* py_conn.c */
uint64_t asc_now(void);
bool buffer_append(asc_buffer *b, const char *bytes, size_t len, size_t headroom);
void buffer_free(asc_buffer *b);
bool conn_open(Conn *c, int fd); /* false, with an exception: the descriptor is still the caller's */
void conn_event(Conn *c, uint32_t events);
void conn_read(Conn *c);
void conn_let_go(Conn *c);
void conn_end(Conn *c); /* no more from us */
void conn_due(Conn *c);
int conn_send(Conn *c, struct iovec *iov, int n); /* all of it leaves or is queued; -1: the connection is going down */
int conn_flush(Conn *c);
void conn_close(Conn *c);
void conn_abort(Conn *c);
void conn_pause_reading(Conn *c);
void conn_resume_reading(Conn *c);
static inline void conn_deadline(Conn *c, uint8_t kind, uint64_t at_ns)
{
    c->kind = kind;
    if (kind)
        wheel_set(&c->core->wheel, &c->timer, at_ns);
}

/* Nothing that was read from the socket is left to decrypt or to hand out. */
static inline bool tls_drained(const tls_conn *connection)
{
    return tls_pending_input(connection) == 0 && tls_pending_plain(connection) == 0;
}

static inline void core_trip(Core *core, enum asc_limit limit)
{
    page_add(core->page, core->trips[limit], 1);
}

static inline void stream_trip(Stream *s, enum asc_limit limit)
{
    s->limit = (uint8_t)limit;
    core_trip(s->core, limit);
}

/* A request of this connection was let through: its address has authenticated. */
static inline void stream_vouch(Stream *s)
{
    if (s->down != NULL && s->down->address != NULL)
        s->down->address->authenticated = true;
}

/* Which limit a head or a chunked body is over, LIMIT_NONE for what is wrong in another way. */
static inline enum asc_limit head_limit(const http1_head *head)
{
    static const uint8_t limits[] = {LIMIT_NONE, LIMIT_MAX_REQUEST_LINE, LIMIT_MAX_FIELD, LIMIT_MAX_HEAD, LIMIT_MAX_FIELDS};
    return (enum asc_limit)limits[head->over];
}

static inline enum asc_limit chunk_limit(const chunk_decoder *decoder)
{
    static const uint8_t limits[] = {LIMIT_NONE, LIMIT_MAX_CHUNK_EXTENSION, LIMIT_MAX_CHUNK_EXTENSIONS, LIMIT_MAX_TRAILERS};
    return (enum asc_limit)limits[decoder->over];
}

/* py_downstream.c */
struct sockaddr_storage;
void down_accept(Core *core, Listener *listener, int fd, const struct sockaddr_storage *peer);
void down_read(Downstream *d, char *bytes, size_t len);
void down_end(Downstream *d);    /* the client sends no more */
void down_blocked(Downstream *d); /* the socket takes no more */
void down_drained(Downstream *d); /* it took everything */
void down_lost(Downstream *d);
void down_run(Downstream *d, char *bytes, size_t len);
void down_close(Downstream *d);
const char *head_reject_code(uint8_t reject);                /* the public code of an enum http1_reject */
enum asc_limit down_last(const Downstream *d, uint64_t now); /* why no request follows, LIMIT_NONE when one may */
bool down_trusted(Downstream *d);                            /* the client would be let in today */
bool down_stalled(Downstream *d, uint64_t now); /* the client has taken nothing for too long */
void down_settled(Downstream *d);
void down_cut(Downstream *d, bool reset);
void down_due(Downstream *d, uint64_t now);
void down_draining(Downstream *d, uint64_t now); /* the drain begins */
void down_vanished(Downstream *d); /* the client has gone while its bytes wait */
void down_begin(Downstream *d);                        /* its first byte of TLS or HTTP may come */
void down_input(Downstream *d, char *bytes, size_t len); /* bytes from the socket: TLS or HTTP */
enum asc_limit down_count(Downstream *d, const uint8_t address[16]); /* which cap keeps this address out */

/* py_proxy.c */
bool core_trusts(const Core *core, const uint8_t address[16]);
void down_refuse(Downstream *d, enum asc_limit limit, const char *why);
void down_proxy(Downstream *d, char *bytes, size_t len);
void down_proxy_due(Downstream *d);
void stream_find_client(Stream *s);
static inline const char *stream_client(const Stream *s)
{
    return s->client[0] ? s->client : s->down->client != NULL ? s->down->client : s->down->peer;
}

/* py_request.c */
Stream *stream_new(Downstream *d, const char *bytes, const http1_head *head);
void stream_dealloc(Stream *s);
bool stream_take_body(Stream *s, char *bytes, size_t len, size_t *used, bool *complete);
bool stream_keep_body(Stream *s, const char *bytes, size_t len);
bool stream_admit_body(Stream *s);                            /* the walk lets it come, whose head is here alone */
enum asc_limit stream_body_due(Stream *s, uint64_t now);     /* the deadline it is over */
uint64_t stream_body_deadline(const Stream *s);              /* the next of them */
void stream_drop_body(Stream *s);
void stream_request(Stream *s);
static inline const char *stream_at(const Stream *s, asc_span span)
{
    return s->head + span.off;
}

/* py_forward.c */
PyObject *stream_forward(Stream *s, PyObject *const *args, Py_ssize_t n);

/* py_answer.c */
void stream_answer(Stream *s, const char *bytes, http1_head *head);
int stream_relay(Stream *s, char *data, size_t len, bool end);
int stream_send(Stream *s, char *data, size_t len, bool end);
int stream_send_parts(Stream *s, const struct iovec *parts, int n, bool end);
void stream_read_watch(Stream *s);
const char *stream_outcome(const Stream *s);
const char *usage_source(const Stream *s);
PyObject *stream_respond(Stream *s, PyObject *args, PyObject *kwargs);

/* py_events.c */
void events_start(Stream *s);
void events_drop(Stream *s);
bool events_hold(Stream *s, const char *bytes, size_t len);
asc_buffer events_release(Stream *s);
int events_relay(Stream *s, char *data, size_t len, bool end);
bool events_break(Stream *s, enum ending ending);
const char *events_outcome(const Stream *s);
void events_usage(Stream *s);

/* py_h2.c: the same for a connection that speaks HTTP/2 */
#define OUT_BLOCK 16384u
void frames_open(Downstream *d);
void frames_input(Downstream *d, const char *bytes, size_t len);
void frames_touch(Downstream *d); /* it has something to say at the end of this turn */
void frames_due(Downstream *d, uint64_t now);
void frames_draining(Downstream *d, uint64_t now);
void frames_drained(Downstream *d, uint64_t now); /* the drain's deadlines */
void frames_gone(Downstream *d, const char *outcome); /* so is every exchange */
void frames_free(Downstream *d);
int frames_write(Stream *s, const struct iovec *parts, int n, bool end); /* behind the head that is in core->heads */
void frames_continue(Stream *s);
void frames_settled(Downstream *d, Stream *s);
void core_flush(Core *core);
/* The client does not take what there is for it: nothing more is to be read for this exchange. */
static inline bool stream_blocked(const Stream *s)
{
    return s->down != NULL && (s->h2.id ? s->h2.blocked : s->down->conn.write_paused) && s->down->conn.fd >= 0;
}

/* py_stream.c */
void stream_walk(Stream *s, PyObject *method);
void stream_reject(Stream *s, const char *code);
void stream_last(Stream *s);
void stream_break(Stream *s, bool reset);
void stream_failed(Stream *s, const char *failure);
void stream_cut(Stream *s, enum ending ending);
const char *ending_outcome(enum ending ending);
void stream_gone(Stream *s, const char *outcome);
void stream_ended(Stream *s, const char *outcome);
void stream_flushed(Stream *s);

/* py_upstream.c */
PyObject *up_open(Core *core, int fd, int endpoint, PyObject *tls, PyObject *server_name, PyObject *ready);
void up_read(Upstream *u, char *bytes, size_t len);
void up_end(Upstream *u);
void up_drained(Upstream *u);
void up_lost(Upstream *u);
void up_send_rest(Upstream *u);
void up_release(Stream *s);                 /* the exchange no longer needs it: closed unless reusable */
void up_due(Upstream *u, uint64_t now);
void up_deadline(Upstream *u, Stream *s, uint64_t now, uint64_t wait_ns);

/* py_core.c */
const char *core_date(Core *core, const char **stamp, unsigned *millis);
json_request *core_take_scan(Core *core);
void core_put_scan(Core *core, json_request *scan);
uint64_t core_random(Core *core);
void core_cut_drained(Core *core, Stream *s, uint64_t now); /* if its time in the drain is over */
PyObject *core_text(Core *core, const char *bytes, size_t len);
Stream *core_take_stream(Core *core);
void core_put_stream(Core *core, Stream *s);

/* py_loop.c */
bool loop_open(Core *core);
void loop_free(Core *core);
bool loop_watch(Core *core, int fd, void *owner, uint32_t events);
void loop_wake_acceptors(Core *core);
void loop_read_again(Conn *c);
void loop_forget(Conn *c);
PyObject *loop_attach(Core *core, PyObject *loop);
PyObject *loop_detach(Core *core, PyObject *unused);
PyObject *loop_listen(Core *core, PyObject *args);

/* py_plan.c */
const asc_names *names_of(PyObject *names);
bool limits_from(asc_limits *limits, PyObject *dict);

/* access.c */
void access_line(Stream *s, uint64_t now);

#endif
