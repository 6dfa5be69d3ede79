/* Strict HTTP/1.1 heads (RFC 9112, RFC 9110 5).
 *
 * A head is parsed whole, out of the caller's buffer, into offsets of that buffer: nothing is copied or allocated, and
 * nothing is changed. There is one grammar and no lenient mode: what is ambiguous between two implementations is
 * refused (LIMITS 2, smuggling). The caller keeps the bytes of a partial head and calls again with more of them.
 */
#ifndef ASC_HTTP1_H
#define ASC_HTTP1_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HTTP1_MAX_FIELDS 128 /* capacity; the limit in force is http1_limits.max_fields, at most this */

typedef struct {
    uint32_t off, len;
} asc_span;

/* Header fields that the proxy itself looks at; everything else is HTTP1_OTHER. Order is free, 0 is OTHER. */
enum http1_name {
    HTTP1_OTHER = 0,
    HTTP1_HOST,
    HTTP1_CONTENT_LENGTH,
    HTTP1_TRANSFER_ENCODING,
    HTTP1_CONNECTION,
    HTTP1_EXPECT,
    HTTP1_UPGRADE,
    HTTP1_AUTHORIZATION,
    HTTP1_X_API_KEY,
    HTTP1_API_KEY,
    HTTP1_CONTENT_TYPE,
    HTTP1_CONTENT_ENCODING,
    HTTP1_X_REQUEST_ID,
    HTTP1_X_ASCPROXY_MODEL,
    HTTP1_RETRY_AFTER,
    HTTP1_DATE,
    HTTP1_N_NAMES,
};

typedef struct {
    asc_span name, value; /* value without surrounding white space */
    uint8_t id;           /* enum http1_name */
} http1_field;

enum http1_framing {
    HTTP1_NO_BODY,  /* request without content-length and transfer-encoding; response that cannot have one */
    HTTP1_LENGTH,   /* content_length bytes (may be 0) */
    HTTP1_CHUNKED,
    HTTP1_TO_CLOSE, /* responses only (RFC 9112 6.3, rule 8) */
};

/* Why a head was refused. */
enum http1_reject {
    HTTP1_OK = 0,
    HTTP1_BAD_REQUEST,     /* 400: grammar, framing or Host */
    HTTP1_LINE_TOO_LONG,   /* 414: request line over max_line */
    HTTP1_FIELDS_TOO_LARGE,/* 431: a field line over max_field, all of the head over max_head, or over max_fields */
    HTTP1_BAD_VERSION,     /* 505: a well-formed version other than 1.0 and 1.1 */
    HTTP1_UNSUPPORTED_TE,  /* 501 is not used: any transfer-encoding but exactly "chunked" is a 400; kept apart for logs */
};

/* Which limit a head is over, where one is the reason. */
enum http1_over { HTTP1_OVER_NOTHING, HTTP1_OVER_LINE, HTTP1_OVER_FIELD, HTTP1_OVER_HEAD, HTTP1_OVER_FIELDS };

typedef struct {
    uint32_t max_line, max_field, max_head, max_fields; /* bytes, bytes, bytes, count; defaults 8192 16384 32768 100 */
} http1_limits;

typedef struct {
    asc_span method, target, path, query; /* requests; path and query are parts of target, query without '?' */
    uint16_t status;                      /* responses: 100..999 */
    uint8_t minor;                        /* HTTP/1.minor */
    uint8_t framing;                      /* enum http1_framing */
    uint8_t reject;                       /* enum http1_reject, set when the parse returns HTTP1_ERROR */
    uint8_t over;                         /* enum http1_over, set with reject */
    const char *why;                      /* static sentence for logs, set with reject */
    bool keep_alive;                      /* what version and Connection say; TO_CLOSE is never keep-alive */
    bool expect_continue;                 /* requests: Expect: 100-continue (any other expectation is refused) */
    bool upgrade;                         /* an Upgrade field was there (ignored by the proxy, never forwarded) */
    uint64_t content_length;              /* valid with HTTP1_LENGTH */
    uint32_t head_len;                    /* bytes of the head, final empty line included */
    uint32_t n_fields;
    uint8_t first[HTTP1_N_NAMES];         /* 1 + index of the first field of that name, 0 if absent */
    uint8_t count[HTTP1_N_NAMES];         /* how many fields of that name (saturating) */
    http1_field fields[HTTP1_MAX_FIELDS];
} http1_head;

enum http1_result { HTTP1_DONE = 1, HTTP1_PARTIAL = 0, HTTP1_ERROR = -1 };

/* Parse a request head at the start of buf[0..len). `seen` is how many of these bytes an earlier call has already
 * returned PARTIAL for (0 at first): without a new LF only limits are checked, so feeding byte by byte stays linear.
 * The first byte is judged at once (a TLS hello on a plaintext port is refused immediately, as is a bare LF or any byte
 * that can never be part of a head). At most one empty line before the request line is skipped (RFC 9112 2.2).
 *
 * Refused, besides what the grammar forbids: bare CR or LF, obs-fold, white space before a colon or before the first
 * field, NUL and control bytes in values (HTAB inside a value is fine), non-ASCII bytes in names or in the target,
 * a missing (HTTP/1.1), empty or repeated Host, or one that is no host[:port]; more than one Content-Length, or one
 * that is not 1*DIGIT or overflows 63 bits; Content-Length together with Transfer-Encoding; Transfer-Encoding other than
 * exactly one field `chunked` (ASCII case-insensitive), or on HTTP/1.0; field names equal to content-length or
 * transfer-encoding after dropping '-' and '_' in any case but which are not those names; targets other than
 * origin-form (absolute-form, authority-form and '*' are refused), fragments, and any byte outside RFC 3986 in path
 * and query; methods that are not tokens or are longer than 32 bytes; multiple Expect, Expect other than 100-continue;
 * GET or HEAD with a body; HTTP/0.9. */
enum http1_result http1_parse_request(http1_head *head, const char *buf, size_t len, size_t seen, const http1_limits *limits);

/* Parse a response head. `head_request` says that the request was HEAD (no body follows). 1xx, 204 and 304 have no body.
 * The same strictness for framing and field syntax; bytes 0x80-0xff are allowed in values and in the reason phrase.
 * A response that declares both Content-Length and Transfer-Encoding, or repeats Content-Length, is refused. */
enum http1_result http1_parse_response(http1_head *head, const char *buf, size_t len, size_t seen, bool head_request,
                                       const http1_limits *limits);

/* The value of the first field of that name, or a zero span. */
static inline asc_span http1_value(const http1_head *head, enum http1_name name)
{
    asc_span none = {0, 0};
    return head->first[name] ? head->fields[head->first[name] - 1].value : none;
}

/* Compare name[0..len) case-insensitively with a lower-case literal. */
bool http1_name_is(const char *name, size_t len, const char *lower, size_t lower_len);

#endif
