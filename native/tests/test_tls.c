/* units: tls.c */
/* libs: -lssl -lcrypto */
/* Two connections of tls.c talk to each other through memory; certificates are made on the spot. */
#include "tls_pair.h"

#include <malloc.h>

/* -- contexts ------------------------------------------------------------------------------------------------- */

static identity authority, other_authority, server_identity, client_identity;

static int choose_alpn(SSL *ssl, const unsigned char **out, unsigned char *out_len, const unsigned char *in,
                       unsigned in_len, void *argument)
{
    (void)ssl;
    (void)argument;
    static const unsigned char ours[] = "\x08http/1.1";
    unsigned char *chosen;
    if (SSL_select_next_proto(&chosen, out_len, ours, sizeof ours - 1, in, in_len) != OPENSSL_NPN_NEGOTIATED)
        return SSL_TLSEXT_ERR_ALERT_FATAL;
    *out = chosen;
    return SSL_TLSEXT_ERR_OK;
}

static SSL_CTX *server_context(int version, bool mutual)
{
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());
    SSL_CTX_set_min_proto_version(context, version);
    SSL_CTX_set_max_proto_version(context, version);
    SSL_CTX_use_certificate(context, server_identity.certificate);
    SSL_CTX_use_PrivateKey(context, server_identity.key);
    SSL_CTX_set_alpn_select_cb(context, choose_alpn, NULL);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_num_tickets(context, 1);
    if (mutual) {
        X509_STORE_add_cert(SSL_CTX_get_cert_store(context), authority.certificate);
        SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    }
    return context;
}

static SSL_CTX *client_context(const identity *trusted)
{
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());
    X509_STORE_add_cert(SSL_CTX_get_cert_store(context), trusted->certificate);
    return context;
}

/* -- cases ---------------------------------------------------------------------------------------------------- */

static const int versions[] = {TLS1_2_VERSION, TLS1_3_VERSION};

static void handshake_and_facts(int version)
{
    SSL_CTX *client = client_context(&authority), *server = server_context(version, true);
    static const unsigned char offer[] = "\x02h2\x08http/1.1";
    SSL_CTX_set_alpn_protos(client, offer, sizeof offer - 1);
    SSL_CTX_use_certificate(client, client_identity.certificate);
    SSL_CTX_use_PrivateKey(client, client_identity.key);
    pair p = {0};
    start(&p, client, server, "gateway.example.");
    CHECK_TEXT(tls_alpn(p.server), "");
    pump(&p);
    check_talks(&p);
    CHECK_TEXT(tls_version(p.server), version == TLS1_2_VERSION ? "TLSv1.2" : "TLSv1.3");
    CHECK_TEXT(tls_alpn(p.server), "http/1.1");
    CHECK_TEXT(tls_alpn(p.client), "http/1.1");
    CHECK_TEXT(tls_error(p.server), "");
    CHECK(!tls_resumed(p.server));
    CHECK(tls_peer(p.server) != NULL && X509_cmp(tls_peer(p.server), client_identity.certificate) == 0);
    part(&p);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

static void byte_by_byte(int version)
{
    SSL_CTX *client = client_context(&authority), *server = server_context(version, false);
    pair p = {0};
    start(&p, client, server, "gateway.example");
    pump_by(&p, 1, 3);
    check_talks(&p);
    char text[1000];
    memset(text, 'x', sizeof text);
    p.server_len = 0;
    CHECK(tls_write(p.client, text, sizeof text));
    tls_shutdown(p.client);
    pump_by(&p, 1, 3);
    CHECK(p.server_len == sizeof text && p.server_result == TLS_CLOSED);
    CHECK(tls_peer(p.server) == NULL);
    part(&p);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

static void large_both_ways(int version)
{
    SSL_CTX *client = client_context(&authority), *server = server_context(version, false);
    pair p = {0};
    start(&p, client, server, "gateway.example");
    pump(&p);
    size_t size = 3 << 20;
    char *data = malloc(size);
    for (size_t i = 0; i < size; i++) data[i] = (char)(i * 2654435761u >> 13);
    CHECK(tls_write(p.client, data, size) && tls_write(p.server, data, size));
    size_t records = (size + 16383) / 16384;
    CHECK(p.to_server.len > size && p.to_server.len <= size + records * 40);
    pump_by(&p, 65536, 65536);
    CHECK(p.server_len == size && memcmp(p.server_got, data, size) == 0);
    CHECK(p.client_len == size && memcmp(p.client_got, data, size) == 0);
    free(data);
    part(&p);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

/* A reader that stops in the middle: the rest is kept, later bytes come after it, and nothing is lost. */
static void kept_input(int version)
{
    SSL_CTX *client = client_context(&authority), *server = server_context(version, false);
    pair p = {0};
    start(&p, client, server, "gateway.example");
    pump(&p);
    char got[64];
    CHECK(tls_write(p.client, "one", 3) && tls_write(p.client, "two", 3));
    tls_input(p.server, p.to_server.bytes, p.to_server.len);
    CHECK(tls_read(p.server, got, 2) == 2 && tls_pending_plain(p.server) == 1);
    CHECK(tls_keep_input(p.server));
    memset(p.to_server.bytes, 0xee, p.to_server.len);
    p.to_server.len = 0;
    CHECK(tls_write(p.client, "three", 5));
    tls_input(p.server, p.to_server.bytes, p.to_server.len);
    CHECK(tls_keep_input(p.server)); /* both at once */
    memset(p.to_server.bytes, 0xee, p.to_server.len);
    p.to_server.len = 0;
    CHECK(tls_write(p.client, "four", 4));
    tls_input(p.server, p.to_server.bytes, p.to_server.len);
    int n = tls_read(p.server, got + 2, sizeof got - 2);
    CHECK(n == 13 && memcmp(got, "onetwothreefour", 15) == 0);
    CHECK(tls_pending_input(p.server) == 0 && tls_pending_plain(p.server) == 0);
    CHECK(tls_read(p.server, got, 0) == TLS_WANT);

    tls_input(p.server, "lost", 4); /* neither read nor kept */
    tls_input(p.server, "more", 4);
    CHECK(tls_read(p.server, got, sizeof got) == TLS_FAILED);
    CHECK_TEXT(tls_error(p.server), "input was lent before the last was read or kept");
    part(&p);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

/* close_notify after data: the data first, then the end, again and again; the other direction stays open. */
static void half_close(int version)
{
    SSL_CTX *client = client_context(&authority), *server = server_context(version, false);
    pair p = {0};
    start(&p, client, server, "gateway.example");
    pump(&p);
    char got[64];
    CHECK(tls_write(p.client, "last", 4));
    tls_shutdown(p.client);
    size_t sent = p.to_server.len;
    tls_shutdown(p.client);
    CHECK(p.to_server.len == sent); /* once */
    tls_input(p.server, p.to_server.bytes, p.to_server.len);
    CHECK(tls_read(p.server, got, sizeof got) == 4);
    CHECK(tls_read(p.server, got, sizeof got) == TLS_CLOSED);
    CHECK(tls_read(p.server, got, sizeof got) == TLS_CLOSED);
    p.to_server.len = 0;
    tls_input(p.server, "whatever follows", 16); /* RFC 8446 6.1: ignored */
    tls_input(p.server, "twice", 5);
    CHECK(tls_read(p.server, got, sizeof got) == TLS_CLOSED);
    CHECK(tls_write(p.server, "answer", 6));
    pump(&p);
    CHECK(p.client_len == 6 && memcmp(p.client_got, "answer", 6) == 0);
    CHECK(!tls_write(p.client, "x", 1));
    CHECK_TEXT(tls_error(p.client), "written after close_notify");
    part(&p);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

/* A cut before close_notify is not an end: whatever the caller has seen, tls_read never says TLS_CLOSED. */
static void truncation(int version)
{
    SSL_CTX *client = client_context(&authority), *server = server_context(version, false);
    pair p = {0};
    start(&p, client, server, "gateway.example");
    pump(&p);
    CHECK(tls_write(p.client, "data", 4));
    tls_shutdown(p.client);
    char got[64];
    tls_input(p.server, p.to_server.bytes, p.to_server.len - 1);
    CHECK(tls_read(p.server, got, sizeof got) == 4);
    CHECK(tls_read(p.server, got, sizeof got) == TLS_WANT);
    part(&p);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

/* A broken record: an alert is in the output, the failure stays, nothing more is written. */
static void broken_record(int version)
{
    SSL_CTX *client = client_context(&authority), *server = server_context(version, false);
    pair p = {0};
    start(&p, client, server, "gateway.example");
    pump(&p);
    CHECK(tls_write(p.client, "good", 4) && tls_write(p.client, "data", 4));
    p.to_server.bytes[p.to_server.len - 1] ^= 1;
    char got[64];
    tls_input(p.server, p.to_server.bytes, p.to_server.len);
    CHECK(tls_read(p.server, got, sizeof got) == 4); /* the good record is told first */
    CHECK(tls_read(p.server, got, sizeof got) == TLS_FAILED);
    CHECK_TEXT(tls_error(p.server), "TLS failed: decryption failed or bad record mac");
    CHECK(!tls_write(p.server, "x", 1));
    size_t alert = p.to_client.len;
    CHECK(alert > 0);
    tls_shutdown(p.server);
    CHECK(p.to_client.len == alert);
    tls_input(p.client, p.to_client.bytes, p.to_client.len);
    CHECK(tls_read(p.client, got, sizeof got) == TLS_FAILED);
    CHECK_TEXT(tls_error(p.client), "peer sent alert: bad record mac");
    part(&p);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

static void refused(int version, SSL_CTX *client, bool mutual, const char *name, const char *client_says,
                    const char *server_says)
{
    SSL_CTX *server = server_context(version, mutual);
    pair p = {0};
    start(&p, client, server, name);
    pump(&p);
    CHECK_TEXT(tls_error(p.client), client_says);
    CHECK_TEXT(tls_error(p.server), server_says);
    part(&p);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

static void refusals(int version)
{
    refused(version, client_context(&other_authority), false, "gateway.example",
            "certificate verify failed: unable to get local issuer certificate", "peer sent alert: unknown CA");
    refused(version, client_context(&authority), false, "elsewhere.example",
            "certificate verify failed: hostname mismatch (wanted elsewhere.example)",
            "peer sent alert: bad certificate");
    refused(version, client_context(&authority), false, "127.0.0.2",
            "certificate verify failed: IP address mismatch (wanted 127.0.0.2)", "peer sent alert: bad certificate");
    refused(version, client_context(&authority), true, "gateway.example",
            version == TLS1_2_VERSION ? "peer sent alert: handshake failure" : "peer sent alert: unknown",
            "the peer sent no certificate, and one is required");
    SSL_CTX *h2_only = client_context(&authority);
    SSL_CTX_set_alpn_protos(h2_only, (const unsigned char *)"\x02h2", 3);
    refused(version, h2_only, false, "gateway.example", "peer sent alert: no application protocol",
            "the peer offers no application protocol (ALPN) that is accepted here");
    SSL_CTX *old = client_context(&authority);
    SSL_CTX_set_max_proto_version(old, version - 1);
    SSL_CTX_set_min_proto_version(old, TLS1_VERSION);
    SSL_CTX_set_security_level(old, 0);
    refused(version, old, false, "gateway.example", "peer sent alert: protocol version",
            "the peer speaks no TLS version that is accepted here");
}

static void addresses(int version)
{
    static const char *const names[] = {"127.0.0.1", "::1", "wild.star.example"};
    for (size_t i = 0; i < 3; i++) {
        SSL_CTX *client = client_context(&authority), *server = server_context(version, false);
        pair p = {0};
        start(&p, client, server, names[i]);
        pump(&p);
        CHECK_TEXT(tls_error(p.client), "");
        check_talks(&p);
        part(&p);
        SSL_CTX_free(client);
        SSL_CTX_free(server);
    }
}

/* RFC 9525: a common name is no name, even where there is no other. */
static void common_name_only(int version)
{
    identity nameless = make("gateway.example", "email:someone@gateway.example", &authority);
    SSL_CTX *client = client_context(&authority), *server = server_context(version, false);
    SSL_CTX_use_certificate(server, nameless.certificate);
    SSL_CTX_use_PrivateKey(server, nameless.key);
    pair p = {0};
    start(&p, client, server, "gateway.example");
    pump(&p);
    CHECK_TEXT(tls_error(p.client), "certificate verify failed: hostname mismatch (wanted gateway.example)");
    part(&p);
    drop(&nameless);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

static void no_client_without_a_name(void)
{
    SSL_CTX *client = client_context(&authority);
    tls_output output = {.max = 1 << 20};
    char long_name[300];
    memset(long_name, 'a', sizeof long_name);
    long_name[299] = '\0';
    CHECK(tls_new_client(client, &output, NULL) == NULL);
    CHECK(tls_new_client(client, &output, "") == NULL);
    CHECK(tls_new_client(client, &output, ".") == NULL);
    CHECK(tls_new_client(client, &output, long_name) == NULL);
    SSL_CTX_free(client);
}

static void plain_http(void)
{
    static const char *const heads[] = {"GET / HTTP/1.1\r\n\r\n", "OPTIONS * HTTP/1.1\r\n\r\n",
                                        "PRI * HTTP/2.0\r\n\r\n"};
    SSL_CTX *server = server_context(TLS1_3_VERSION, false), *client = client_context(&authority);
    tls_output output = {.max = 1 << 20};
    for (size_t i = 0; i < 3; i++) {
        tls_conn *connection = tls_new_server(server, &output);
        tls_input(connection, heads[i], strlen(heads[i]));
        CHECK(tls_handshake(connection) == TLS_FAILED);
        CHECK_TEXT(tls_error(connection), "the peer spoke plain HTTP");
        tls_free(connection);
    }
    tls_conn *connection = tls_new_client(client, &output, "gateway.example");
    CHECK(tls_handshake(connection) == TLS_WANT);
    tls_input(connection, "HTTP/1.1 400 Bad Request\r\n\r\n", 28);
    CHECK(tls_handshake(connection) == TLS_FAILED);
    CHECK_TEXT(tls_error(connection), "the peer spoke plain HTTP");
    tls_free(connection);
    connection = tls_new_server(server, &output);
    tls_input(connection, "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", 11);
    CHECK(tls_handshake(connection) == TLS_FAILED);
    CHECK_TEXT(tls_error(connection), "what the peer sent is not TLS");
    tls_free(connection);
    free(output.bytes);
    SSL_CTX_free(server);
    SSL_CTX_free(client);
}

static void key_updates(void)
{
    SSL_CTX *client = client_context(&authority), *server = server_context(TLS1_3_VERSION, false);
    tls_output output = {.max = 1 << 20};
    char got[32768];
    tls_conn *connection = tls_new_server(server, &output);
    raw r = raw_client(client);
    SSL_do_handshake(r.ssl);
    raw_exchange(&r, connection, &output, got, sizeof got);
    CHECK(tls_established(connection));
    int sent = 0, result = TLS_WANT;
    while (sent < 1000 && result == TLS_WANT) {
        SSL_key_update(r.ssl, SSL_KEY_UPDATE_REQUESTED);
        SSL_write(r.ssl, "x", 1);
        result = raw_exchange(&r, connection, &output, got, sizeof got);
        sent++;
    }
    CHECK(result == TLS_FAILED && sent == 65);
    CHECK_TEXT(tls_error(connection), "the peer sent too many handshake messages after the handshake");
    SSL_free(r.ssl);
    tls_free(connection);

    /* Who moves data may update for ever: one for each 64 KiB. */
    connection = tls_new_server(server, &output);
    r = raw_client(client);
    SSL_do_handshake(r.ssl);
    raw_exchange(&r, connection, &output, got, sizeof got);
    static char block[65536];
    for (sent = 0, result = TLS_WANT; sent < 200 && result == TLS_WANT; sent++) {
        SSL_key_update(r.ssl, SSL_KEY_UPDATE_REQUESTED);
        SSL_write(r.ssl, block, sizeof block);
        result = raw_exchange(&r, connection, &output, got, sizeof got);
    }
    CHECK(sent == 200 && result == TLS_WANT);
    CHECK(tls_write(connection, "still", 5));
    SSL_free(r.ssl);
    tls_free(connection);
    free(output.bytes);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

static void renegotiation(void)
{
    SSL_CTX *client = client_context(&authority), *server = server_context(TLS1_2_VERSION, false);
    tls_output output = {.max = 1 << 20};
    char got[4096];
    tls_conn *connection = tls_new_server(server, &output);
    raw r = raw_client(client);
    SSL_do_handshake(r.ssl);
    raw_exchange(&r, connection, &output, got, sizeof got);
    CHECK(tls_established(connection));
    SSL_renegotiate(r.ssl);
    SSL_do_handshake(r.ssl);
    raw_exchange(&r, connection, &output, got, sizeof got);
    /* The server warns (no_renegotiation); a client of OpenSSL takes that for an end and says so. */
    CHECK(SSL_in_init(r.ssl));
    CHECK_TEXT(tls_error(connection), "peer sent alert: handshake failure");
    SSL_free(r.ssl);
    tls_free(connection);
    free(output.bytes);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

/* A server asks our client to renegotiate: it goes on as if nothing had been said, or the server gives up. */
static void renegotiation_asked_by_a_server(void)
{
    SSL_CTX *client = client_context(&authority), *server = server_context(TLS1_2_VERSION, false);
    tls_output output = {.max = 1 << 20};
    char got[4096];
    tls_conn *connection = tls_new_client(client, &output, "gateway.example");
    raw r = {SSL_new(server), BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem())};
    SSL_set_bio(r.ssl, r.in, r.out);
    SSL_set_accept_state(r.ssl);
    CHECK(tls_handshake(connection) == TLS_WANT);
    raw_exchange(&r, connection, &output, got, sizeof got);
    CHECK(tls_established(connection));
    SSL_renegotiate(r.ssl);
    SSL_do_handshake(r.ssl);
    raw_exchange(&r, connection, &output, got, sizeof got);
    CHECK(SSL_in_init(r.ssl)); /* no second handshake */
    SSL_free(r.ssl);
    tls_free(connection);
    free(output.bytes);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

static int long_extension(SSL *ssl, unsigned type, const unsigned char **out, size_t *len, int *alert, void *argument)
{
    (void)ssl, (void)type, (void)alert, (void)argument;
    static const unsigned char padding[800];
    *out = padding;
    *len = sizeof padding;
    return 1;
}

/* Half of a handshake message after the handshake, and silence: OpenSSL would not write until the rest is there. */
static void unfinished_message(void)
{
    SSL_CTX *client = client_context(&authority), *server = server_context(TLS1_2_VERSION, false);
    tls_output output = {.max = 1 << 20};
    char got[4096], hello[4096];
    /* A ClientHello of more than one record, which has 512 bytes here. */
    CHECK(SSL_CTX_add_client_custom_ext(client, 65000, long_extension, NULL, NULL, NULL, NULL) == 1);
    SSL_CTX_set_max_send_fragment(client, 512);
    tls_conn *connection = tls_new_server(server, &output);
    raw r = raw_client(client);
    SSL_do_handshake(r.ssl);
    raw_exchange(&r, connection, &output, got, sizeof got);
    CHECK(tls_established(connection));
    CHECK(tls_write(connection, "x", 1));
    SSL_renegotiate(r.ssl);
    SSL_do_handshake(r.ssl);
    int n = BIO_read(r.out, hello, sizeof hello);
    int first = 5 + ((unsigned char)hello[3] << 8 | (unsigned char)hello[4]);
    CHECK(first < n);
    tls_input(connection, hello, (size_t)first);
    CHECK(tls_read(connection, got, sizeof got) == TLS_WANT);
    CHECK(!tls_write(connection, "x", 1));
    CHECK_TEXT(tls_error(connection), "the peer left a handshake message unfinished");
    SSL_free(r.ssl);
    tls_free(connection);
    free(output.bytes);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

static void full_output(int version)
{
    SSL_CTX *client = client_context(&authority), *server = server_context(version, false);
    pair p = {0};
    start(&p, client, server, "gateway.example");
    pump(&p);
    static char block[65536];
    p.to_client.max = p.to_client.len + 20000; /* one record fits, the second does not */
    CHECK(!tls_write(p.server, block, sizeof block));
    CHECK_TEXT(tls_error(p.server), "the buffer for outgoing TLS records is full");
    CHECK(p.to_client.len <= p.to_client.max);
    part(&p);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

static void write_before_handshake(void)
{
    SSL_CTX *server = server_context(TLS1_3_VERSION, false);
    tls_output output = {.max = 1 << 20};
    tls_conn *connection = tls_new_server(server, &output);
    tls_shutdown(connection); /* nothing to say yet */
    CHECK(output.len == 0);
    CHECK(!tls_write(connection, "x", 1));
    CHECK_TEXT(tls_error(connection), "written before the handshake");
    CHECK(output.len == 0);
    tls_free(connection);
    SSL_CTX_free(server);
}

/* Bytes of an idle established server connection. Sanitizers' allocators report nothing, and then it cannot be judged:
 * the figure is for builds without them, and it is printed. */
static void memory(int version)
{
    enum { COUNT = 200 };
    SSL_CTX *client = client_context(&authority), *server = server_context(version, false);
    pair p = {0};
    tls_conn *held[COUNT];
    start(&p, client, server, "gateway.example");
    pump(&p);
    tls_free(p.client);
    tls_free(p.server);
    size_t grown = 0;
    for (int i = 0; i < COUNT; i++) {
        start(&p, client, server, "gateway.example");
        pump(&p);
        check_talks(&p);
        tls_free(p.client);
        held[i] = p.server;
        if (i == 0) grown = mallinfo2().uordblks;
    }
    grown = (mallinfo2().uordblks - grown) / (COUNT - 1);
    printf("%s: %zu bytes for an idle server connection\n", tls_version(held[0]), grown);
    CHECK(grown <= 15 * 1024);
    for (int i = 0; i < COUNT; i++) tls_free(held[i]);
    p.client = p.server = NULL;
    part(&p);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

int main(void)
{
    authority = make("test authority", NULL, NULL);
    other_authority = make("other authority", NULL, NULL);
    server_identity = make("server", "DNS:gateway.example,DNS:*.star.example,IP:127.0.0.1,IP:::1", &authority);
    client_identity = make("client", "DNS:client.example", &authority);
    for (size_t i = 0; i < 2; i++) {
        handshake_and_facts(versions[i]);
        byte_by_byte(versions[i]);
        large_both_ways(versions[i]);
        kept_input(versions[i]);
        half_close(versions[i]);
        truncation(versions[i]);
        broken_record(versions[i]);
        refusals(versions[i]);
        addresses(versions[i]);
        common_name_only(versions[i]);
        full_output(versions[i]);
        memory(versions[i]);
    }
    no_client_without_a_name();
    plain_http();
    key_updates();
    renegotiation();
    renegotiation_asked_by_a_server();
    unfinished_message();
    write_before_handshake();
    drop(&authority);
    drop(&other_authority);
    drop(&server_identity);
    drop(&client_identity);
    if (failures > 0) fprintf(stderr, "%d checks failed\n", failures);
    return failures > 0;
}
