/* What the TLS tests share: checks, certificates made on the spot, two connections that talk through memory, and a
 * client that is plain OpenSSL. */
#ifndef ASC_TLS_PAIR_H
#define ASC_TLS_PAIR_H

#include "../tls.h"

#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

#define CHECK(condition)                                                          \
    do {                                                                          \
        if (!(condition)) {                                                       \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            failures++;                                                           \
        }                                                                         \
    } while (0)

#define CHECK_TEXT(got, want)                                                                              \
    do {                                                                                                   \
        if (strcmp((got), (want)) != 0) {                                                                  \
            fprintf(stderr, "%s:%d: got \"%s\", wanted \"%s\"\n", __FILE__, __LINE__, (got), (want));        \
            failures++;                                                                                    \
        }                                                                                                  \
    } while (0)

/* -- certificates --------------------------------------------------------------------------------------------- */

typedef struct {
    EVP_PKEY *key;
    X509 *certificate;
} identity;

static inline void extend(X509 *certificate, X509 *issuer, int nid, const char *value)
{
    X509V3_CTX context;
    X509V3_set_ctx(&context, issuer, certificate, NULL, NULL, 0);
    X509_EXTENSION *extension = X509V3_EXT_conf_nid(NULL, &context, nid, value);
    X509_add_ext(certificate, extension, -1);
    X509_EXTENSION_free(extension);
}

/* A certificate for `names` (the text of a subjectAltName), or a CA when that is NULL; issuer NULL: signs itself. */
static inline identity make(const char *common, const char *names, const identity *issuer)
{
    static long serial = 1;
    identity made = {EVP_EC_gen("P-256"), X509_new()};
    X509 *c = made.certificate;
    X509_set_version(c, X509_VERSION_3);
    ASN1_INTEGER_set(X509_get_serialNumber(c), serial++);
    X509_gmtime_adj(X509_getm_notBefore(c), -3600);
    X509_gmtime_adj(X509_getm_notAfter(c), 3600);
    X509_set_pubkey(c, made.key);
    X509_NAME *subject = X509_get_subject_name(c);
    X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC, (const unsigned char *)common, -1, -1, 0);
    X509 *by = issuer != NULL ? issuer->certificate : c;
    X509_set_issuer_name(c, X509_get_subject_name(by));
    extend(c, by, NID_basic_constraints, names == NULL ? "critical,CA:TRUE" : "critical,CA:FALSE");
    if (names != NULL) extend(c, by, NID_subject_alt_name, names);
    X509_sign(c, issuer != NULL ? issuer->key : made.key, EVP_sha256());
    return made;
}

static inline void drop(identity *gone)
{
    EVP_PKEY_free(gone->key);
    X509_free(gone->certificate);
}

/* -- a pair of connections ------------------------------------------------------------------------------------ */

typedef struct {
    tls_output to_server, to_client;
    tls_conn *client, *server;
    char *server_got, *client_got; /* plaintext */
    size_t server_len, client_len;
    int server_result, client_result; /* of the last tls_read */
} pair;

enum { GOT_MAX = 4 << 20 };

static inline void start(pair *p, SSL_CTX *client, SSL_CTX *server, const char *name)
{
    if (p->server_got == NULL) {
        p->to_server.max = p->to_client.max = 8 << 20;
        p->server_got = malloc(GOT_MAX);
        p->client_got = malloc(GOT_MAX);
    }
    p->client = tls_new_client(client, &p->to_server, name);
    p->server = tls_new_server(server, &p->to_client);
    CHECK(p->client != NULL && p->server != NULL);
}

static inline void part(pair *p)
{
    tls_free(p->client);
    tls_free(p->server);
    free(p->to_server.bytes);
    free(p->to_client.bytes);
    free(p->server_got);
    free(p->client_got);
}

static inline int read_all(tls_conn *connection, char *got, size_t *len, size_t cap)
{
    for (;;) {
        size_t room = GOT_MAX - *len;
        int n = tls_read(connection, got + *len, room < cap ? room : cap);
        if (n <= 0) return n;
        *len += (size_t)n;
    }
}

/* Feeds `from` to `to` in steps, through a buffer of the step's size so that the sanitizer sees every overrun. */
static inline int feed(tls_conn *to, tls_output *from, size_t step, char *got, size_t *len, size_t cap)
{
    int result = TLS_WANT;
    size_t total = from->len;
    char *moved = malloc(total > 0 ? total : 1);
    memcpy(moved, from->bytes, total);
    from->len = 0;
    for (size_t at = 0; at < total; at += step) {
        size_t n = total - at < step ? total - at : step;
        char *lent = malloc(n);
        memcpy(lent, moved + at, n);
        tls_input(to, lent, n);
        result = read_all(to, got, len, cap);
        free(lent);
        if (result == TLS_FAILED) break;
    }
    free(moved);
    return result;
}

static inline void pump_by(pair *p, size_t step, size_t cap)
{
    if (!tls_established(p->client) && tls_handshake(p->client) == TLS_FAILED) p->client_result = TLS_FAILED;
    while (p->to_server.len > 0 || p->to_client.len > 0) {
        if (p->to_server.len > 0)
            p->server_result = feed(p->server, &p->to_server, step, p->server_got, &p->server_len, cap);
        if (p->to_client.len > 0)
            p->client_result = feed(p->client, &p->to_client, step, p->client_got, &p->client_len, cap);
    }
}

static inline void pump(pair *p)
{
    pump_by(p, SIZE_MAX / 2, 16384);
}

static inline void check_talks(pair *p)
{
    CHECK(tls_established(p->client) && tls_established(p->server));
    p->server_len = p->client_len = 0;
    CHECK(tls_write(p->client, "ping", 4));
    CHECK(tls_write(p->server, "pong!", 5));
    pump(p);
    CHECK(p->server_len == 4 && memcmp(p->server_got, "ping", 4) == 0);
    CHECK(p->client_len == 5 && memcmp(p->client_got, "pong!", 5) == 0);
}

/* -- a client that is plain OpenSSL --------------------------------------------------------------------------- */

/* For what tls.c has no way to ask for: key updates, renegotiation, old versions, sessions. */
typedef struct {
    SSL *ssl;
    BIO *in, *out;
} raw;

static inline raw raw_client(SSL_CTX *context)
{
    raw made = {SSL_new(context), BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem())};
    SSL_set_bio(made.ssl, made.in, made.out);
    SSL_set_connect_state(made.ssl);
    return made;
}

static inline int raw_exchange(raw *r, tls_conn *server, tls_output *output, char *got, size_t cap)
{
    char moved[65536];
    int result = TLS_WANT;
    for (;;) {
        int n = BIO_read(r->out, moved, sizeof moved);
        if (n > 0) {
            tls_input(server, moved, (size_t)n);
            do {
                result = tls_read(server, got, cap);
            } while (result > 0);
        }
        if (output->len > 0) BIO_write(r->in, output->bytes, (int)output->len);
        bool idle = n <= 0 && output->len == 0;
        output->len = 0;
        if (idle) return result;
        char none[4096];
        if (!SSL_is_init_finished(r->ssl))
            SSL_do_handshake(r->ssl);
        else
            SSL_read(r->ssl, none, sizeof none);
        ERR_clear_error();
        if (result == TLS_FAILED) return result; /* the client has seen the alert */
    }
}

#endif
