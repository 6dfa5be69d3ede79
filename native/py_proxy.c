/* Whom a connection speaks for: the PROXY header at its beginning, and X-Forwarded-For in its requests.
 *
 * Both are believed from trusted_peers only. A header decides for its connection: caps per address count the address that
 * it gives. A field decides for its request: one connection of a load balancer carries requests of many callers, so it
 * names them in access lines and to the walk, and counts nobody.
 */
#include "py_core.h"

#define FORWARDED_MOST 64u /* elements that are looked at; a chain of trusted proxies is shorter */

bool core_trusts(const Core *core, const uint8_t address[16])
{
    for (uint32_t i = N_LOOPBACK; i < core->n_exempt; i++)
        if (peers_within(address, core->exempt[i].address, core->exempt[i].bits))
            return true;
    return false;
}

/* Close without an answer: who is refused here gets nothing that costs us something. With `why` the worker's log tells of
 * it, not a line for each: anybody could fill a log that way. */
void down_refuse(Downstream *d, enum asc_limit limit, const char *why)
{
    Listener *listener = d->listener;
    core_trip(d->conn.core, limit);
    if (why != NULL) {
        listener->refused++;
        listener->refused_why = why;
        memcpy(listener->refused_peer, d->peer, sizeof listener->refused_peer);
    }
    conn_abort(&d->conn);
}

void down_proxy_due(Downstream *d)
{
    enum asc_limit limit = d->listener->tls != Py_None ? LIMIT_TLS_HANDSHAKE : LIMIT_HEADER_TIMEOUT;
    down_refuse(d, limit, "its PROXY header did not come in time");
}

/* Note who is behind this connection, and count it. LIMIT_NONE: it may stay. */
static enum asc_limit speak_for(Downstream *d, const proxy2_header *header)
{
    if (header->source == PROXY2_REAL)
        return LIMIT_NONE; /* the load balancer itself, which is exempt */
    d->client = malloc(PEER_TEXT);
    if (d->client == NULL)
        return LIMIT_MAX_CONNECTIONS;
    if (header->source == PROXY2_UNIX) {
        snprintf(d->client, PEER_TEXT, "unix");
        d->trusted = false;
        return LIMIT_NONE;
    }
    char host[FORWARDED_TEXT];
    forwarded_text(header->address, host);
    snprintf(d->client, PEER_TEXT, strchr(host, ':') ? "[%s]:%u" : "%s:%u", host, (unsigned)header->port);
    d->trusted = core_trusts(d->conn.core, header->address); /* another load balancer before that one */
    return down_count(d, header->address);
}

/* The first bytes of a connection, until the header is whole; what comes with it goes on as usual. */
void down_proxy(Downstream *d, char *bytes, size_t len)
{
    proxy2_header header;
    bool kept = d->pending.len != 0;
    if (kept && !buffer_append(&d->pending, bytes, len, 0)) {
        down_cut(d, false);
        return;
    }
    char *at = kept ? d->pending.bytes + d->pending.off : bytes;
    size_t n = kept ? d->pending.len : len;
    enum proxy2_result result = proxy2_parse(&header, at, n);
    if (result == PROXY2_PARTIAL) { /* less than PROXY2_MAX */
        if (!kept && !buffer_append(&d->pending, bytes, len, 0))
            down_cut(d, false);
        return;
    }
    if (result == PROXY2_ERROR) {
        down_refuse(d, LIMIT_PROXY_HEADER, header.why);
        return;
    }
    asc_buffer held = d->pending; /* down_input wants it empty, and reads from here */
    d->pending = (asc_buffer){0};
    d->unproxied = false;
    enum asc_limit over = speak_for(d, &header);
    if (over != LIMIT_NONE)
        down_refuse(d, over, NULL);
    else
        down_begin(d);
    if (d->conn.fd >= 0 && n > header.len)
        down_input(d, at + header.len, n - header.len);
    buffer_free(&held);
}

/* The right-most address that is none of trusted_peers: what stands left of it is whatever its sender wrote. Where all
 * are trusted, the left-most of them; at a word that is no address nobody is named. */
void stream_find_client(Stream *s)
{
    static const char name[] = "x-forwarded-for";
    uint8_t address[16], found[16];
    bool any = false;
    unsigned most = FORWARDED_MOST;
    for (uint32_t i = s->n_fields; i-- > 0;) { /* repeated fields are one list (RFC 9110 5.3) */
        const http1_field *f = &s->fields[i];
        if (!http1_name_is(s->head + f->name.off, f->name.len, name, sizeof name - 1))
            continue;
        size_t len = f->value.len;
        enum forwarded_result result;
        while ((result = forwarded_last(s->head + f->value.off, &len, address)) != FORWARDED_END) {
            if (result == FORWARDED_OTHER || most-- == 0)
                return;
            memcpy(found, address, sizeof found);
            any = true;
            if (!core_trusts(s->core, address)) {
                forwarded_text(address, s->client);
                return;
            }
        }
    }
    if (any)
        forwarded_text(found, s->client);
}
