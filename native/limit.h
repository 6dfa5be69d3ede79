/* The names of the limits that can trip: the one closed list that metrics (label `reason` of ascproxy_limit_trips_total),
 * access lines (member `limit`) and the documentation share. A name is the limit's own in the configuration; the three
 * steps of `memory_limit` have one each, and the two ways in which `proxy_protocol` refuses a connection.
 */
#ifndef ASC_LIMIT_H
#define ASC_LIMIT_H

#include <stddef.h>

#define LIMIT_NAMES(X) \
    X(PROXY_UNTRUSTED, "proxy_untrusted") \
    X(PROXY_HEADER, "proxy_header") \
    X(TLS_HANDSHAKE, "tls_handshake") \
    X(HEADER_TIMEOUT, "header_timeout") \
    X(IDLE_TIMEOUT, "idle_timeout") \
    X(CONNECTION_AGE, "connection_age") \
    X(CONNECTION_REQUESTS, "connection_requests") \
    X(BODY_IDLE, "body_idle") \
    X(BODY_MIN_RATE, "body_min_rate") \
    X(BODY_TOTAL, "body_total") \
    X(WRITE_STALL, "write_stall") \
    X(MAX_REQUEST_LINE, "max_request_line") \
    X(MAX_FIELD, "max_field") \
    X(MAX_HEAD, "max_head") \
    X(MAX_FIELDS, "max_fields") \
    X(MAX_BODY, "max_body") \
    X(MAX_BODIES, "max_bodies") \
    X(MAX_UNAUTHENTICATED_BODY, "max_unauthenticated_body") \
    X(MAX_CHUNK_EXTENSION, "max_chunk_extension") \
    X(MAX_CHUNK_EXTENSIONS, "max_chunk_extensions") \
    X(MAX_TRAILERS, "max_trailers") \
    X(JSON_DEPTH, "json_depth") \
    X(JSON_KEYS, "json_keys") \
    X(JSON_DIGITS, "json_digits") \
    X(MAX_CONNECTIONS, "max_connections") \
    X(MAX_CONNECTIONS_PER_IP, "max_connections_per_ip") \
    X(MAX_UNAUTHENTICATED_PER_IP, "max_unauthenticated_per_ip") \
    X(MEMORY_KEEP_ALIVE, "memory_keep_alive") \
    X(MEMORY_REFUSE, "memory_refuse") \
    X(MEMORY_ACCEPT, "memory_accept") \
    X(H2_STREAMS, "h2_streams") \
    X(H2_RESETS, "h2_resets") \
    X(H2_CONTINUATIONS, "h2_continuations") \
    X(H2_SETTINGS, "h2_settings") \
    X(H2_SETTINGS_ENTRIES, "h2_settings_entries") \
    X(H2_PINGS, "h2_pings") \
    X(H2_PRIORITIES, "h2_priorities") \
    X(H2_EMPTY_DATA, "h2_empty_data") \
    X(H2_GLITCHES, "h2_glitches") \
    X(H2_QUEUED, "h2_queued") \
    X(CONNECT, "connect") \
    X(TLS, "tls") \
    X(FIRST_BYTE, "first_byte") \
    X(BETWEEN_TOKENS, "between_tokens") \
    X(TOTAL, "total")

enum asc_limit {
    LIMIT_NONE, /* nothing tripped */
#define X(id, name) LIMIT_##id,
    LIMIT_NAMES(X)
#undef X
    LIMIT_COUNT,
};

/* "" for LIMIT_NONE and for what is no limit. */
const char *limit_name(enum asc_limit limit);
/* LIMIT_NONE for a name that is not on the list. */
enum asc_limit limit_named(const char *name, size_t len);

#endif
