/* TLS inside a connection. See tls.h for the contract.
 *
 * OpenSSL reads through a BIO of our own whose read side is at most two windows, bytes that were kept and bytes
 * that are lent, and whose write side appends to the shared output. Neither side ever blocks or reports an end: an
 * empty window is "retry", and the socket's end is the caller's business.
 *
 * A failure is for good: OpenSSL forbids any call on a connection after SSL_ERROR_SSL, and the first sentence is
 * the one that explains.
 */
#include "tls.h"

#include <arpa/inet.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Handshake messages that a peer may send after the handshake: OpenSSL counts neither key updates nor refused
 * renegotiations, and each costs more than the bytes it takes. RFC 8446 4.6.3 lets an endpoint update at any time,
 * so some are free, and beyond them one is earned by each 64 KiB of application data (AES-GCM's limit, RFC 8446
 * 5.5, is reached after some 2^38 bytes). */
enum { FREE_MESSAGES = 64, BYTES_PER_MESSAGE = 65536 };

/* A DNS name has at most 253 bytes without its last dot (RFC 1035 2.3.4, RFC 1123 2.1). */
enum { NAME_MAX_LEN = 253, FIRST_BYTES = 5, OUTPUT_MIN = 4096 };

struct tls_conn {
    SSL *ssl;
    tls_output *output;
    char *kept; /* owned; read before the lent window */
    size_t kept_at, kept_len;
    const char *lent;
    size_t lent_at, lent_len;
    char *sentence; /* owned text behind `error`, NULL when that is static */
    const char *error;
    const char *alpn;
    char *alpn_copy; /* owned text behind `alpn`, NULL when that is static */
    uint64_t plain_bytes;
    uint32_t messages;         /* handshake messages received after the handshake */
    unsigned char first[FIRST_BYTES]; /* how the peer began, to tell plain HTTP from broken TLS */
    unsigned char first_len;
    bool established, closed, shut, failed, flooded, output_full;
};

/* -- the BIO --------------------------------------------------------------------------------------------- */

static size_t take(tls_conn *connection, char *to, size_t cap)
{
    size_t n = connection->kept_len - connection->kept_at;
    if (n > 0) {
        n = n < cap ? n : cap;
        memcpy(to, connection->kept + connection->kept_at, n);
        connection->kept_at += n;
        if (connection->kept_at == connection->kept_len) {
            free(connection->kept);
            connection->kept = NULL;
            connection->kept_at = connection->kept_len = 0;
        }
        return n;
    }
    n = connection->lent_len - connection->lent_at;
    if (n > 0) {
        n = n < cap ? n : cap;
        memcpy(to, connection->lent + connection->lent_at, n);
        connection->lent_at += n;
    }
    return n;
}

static int window_read(BIO *bio, char *to, size_t cap, size_t *got)
{
    tls_conn *connection = BIO_get_data(bio);
    BIO_clear_retry_flags(bio);
    *got = 0;
    if (connection->flooded) return -1; /* stops OpenSSL in the middle of a run of messages */
    size_t n = cap > 0 ? take(connection, to, cap) : 0;
    if (n == 0) {
        BIO_set_retry_read(bio);
        return -1;
    }
    for (size_t i = 0; i < n && connection->first_len < FIRST_BYTES; i++)
        connection->first[connection->first_len++] = (unsigned char)to[i];
    *got = n;
    return 1;
}

static bool append(tls_output *output, const char *bytes, size_t len)
{
    if (output->len > output->max || len > output->max - output->len) return false;
    size_t need = output->len + len;
    if (need > output->cap) {
        size_t cap = output->cap < OUTPUT_MIN ? OUTPUT_MIN : output->cap;
        while (cap < need) cap = cap > output->max / 2 ? output->max : cap * 2;
        char *grown = realloc(output->bytes, cap);
        if (grown == NULL) return false;
        output->bytes = grown;
        output->cap = cap;
    }
    memcpy(output->bytes + output->len, bytes, len);
    output->len = need;
    return true;
}

static int window_write(BIO *bio, const char *bytes, size_t len, size_t *written)
{
    tls_conn *connection = BIO_get_data(bio);
    BIO_clear_retry_flags(bio);
    *written = 0;
    if (len > 0 && !append(connection->output, bytes, len)) {
        connection->output_full = true;
        return -1;
    }
    *written = len;
    return 1;
}

static long window_ctrl(BIO *bio, int command, long number, void *pointer)
{
    (void)bio;
    (void)number;
    (void)pointer;
    return command == BIO_CTRL_FLUSH || command == BIO_CTRL_DUP ? 1 : 0;
}

static pthread_once_t method_once = PTHREAD_ONCE_INIT;
static BIO_METHOD *method_constant; /* made once, never changed, NULL when there was no memory */

static void make_method(void)
{
    int index = BIO_get_new_index();
    BIO_METHOD *method = index < 0 ? NULL : BIO_meth_new(index | BIO_TYPE_SOURCE_SINK, "lent window");
    if (method == NULL) return;
    if (!BIO_meth_set_read_ex(method, window_read) || !BIO_meth_set_write_ex(method, window_write) ||
        !BIO_meth_set_ctrl(method, window_ctrl)) {
        BIO_meth_free(method);
        return;
    }
    method_constant = method;
}

/* -- failures as sentences ------------------------------------------------------------------------------- */

/* The first failure stays; text is copied, or replaced by `fallback` (static) when there is no memory. */
static void fail(tls_conn *connection, const char *text, const char *fallback)
{
    if (connection->failed) return;
    connection->failed = true;
    connection->sentence = strdup(text);
    connection->error = connection->sentence != NULL ? connection->sentence : fallback;
}

static void fail_static(tls_conn *connection, const char *text)
{
    if (connection->failed) return;
    connection->failed = true;
    connection->error = text;
}

/* A record starts with a content type from 20 to 24; a method or "HTTP/" starts with a capital letter. */
static bool spoke_http(const tls_conn *connection)
{
    if (connection->first_len < 3) return false;
    for (unsigned i = 0; i < 3; i++)
        if (connection->first[i] < 'A' || connection->first[i] > 'Z') return false;
    return true;
}

static void fail_verify(tls_conn *connection)
{
    char text[512];
    long result = SSL_get_verify_result(connection->ssl);
    const char *reason = X509_verify_cert_error_string(result);
    X509_VERIFY_PARAM *param = SSL_get0_param(connection->ssl);
    if (result == X509_V_ERR_HOSTNAME_MISMATCH) {
        const char *name = X509_VERIFY_PARAM_get0_host(param, 0);
        snprintf(text, sizeof text, "certificate verify failed: %s (wanted %s)", reason, name != NULL ? name : "?");
    } else if (result == X509_V_ERR_IP_ADDRESS_MISMATCH) {
        char *address = X509_VERIFY_PARAM_get1_ip_asc(param);
        snprintf(text, sizeof text, "certificate verify failed: %s (wanted %s)", reason,
                 address != NULL ? address : "?");
        OPENSSL_free(address);
    } else {
        snprintf(text, sizeof text, "certificate verify failed: %s", reason);
    }
    fail(connection, text, "certificate verify failed");
}

/* Sentences for the failures that an operator meets; for others OpenSSL's own words are good enough. */
static const char *known_reason(int reason)
{
    switch (reason) {
    case SSL_R_HTTP_REQUEST:
    case SSL_R_HTTPS_PROXY_REQUEST: return "the peer spoke plain HTTP";
    case SSL_R_WRONG_VERSION_NUMBER: return "what the peer sent is not TLS";
    case SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE: return "the peer sent no certificate, and one is required";
    case SSL_R_UNSUPPORTED_PROTOCOL:
    case SSL_R_VERSION_TOO_LOW:
    case SSL_R_VERSION_TOO_HIGH: return "the peer speaks no TLS version that is accepted here";
    case SSL_R_NO_SHARED_CIPHER: return "the peer offers no cipher suite that is accepted here";
    case SSL_R_NO_SUITABLE_KEY_SHARE:
    case SSL_R_NO_SHARED_GROUPS: return "the peer offers no key exchange group that is accepted here";
    case SSL_R_NO_APPLICATION_PROTOCOL: return "the peer offers no application protocol (ALPN) that is accepted here";
    default: return NULL;
    }
}

static void fail_from_queue(tls_conn *connection)
{
    /* The oldest error is the cause and later ones are consequences, but below libssl the words are about ciphers and
     * not about the peer, so its oldest one goes first. */
    unsigned long code = ERR_get_error(), next = code;
    while (next != 0 && ERR_GET_LIB(next) != ERR_LIB_SSL) next = ERR_get_error();
    if (next != 0) code = next;
    int reason = ERR_GET_REASON(code);
    const char *known;
    if (connection->flooded) {
        fail_static(connection, "the peer sent too many handshake messages after the handshake");
    } else if (connection->output_full) {
        fail_static(connection, "the buffer for outgoing TLS records is full");
    } else if (code == 0) {
        fail_static(connection, "TLS failed without a reason");
    } else if (!connection->established && spoke_http(connection)) {
        fail_static(connection, "the peer spoke plain HTTP");
    } else if (ERR_GET_LIB(code) == ERR_LIB_SSL && reason > SSL_AD_REASON_OFFSET &&
               reason <= SSL_AD_REASON_OFFSET + 255) {
        char text[128];
        snprintf(text, sizeof text, "peer sent alert: %s", SSL_alert_desc_string_long(reason - SSL_AD_REASON_OFFSET));
        fail(connection, text, "peer sent an alert");
    } else if (ERR_GET_LIB(code) == ERR_LIB_SSL && reason == SSL_R_CERTIFICATE_VERIFY_FAILED) {
        fail_verify(connection);
    } else if (ERR_GET_LIB(code) == ERR_LIB_SSL && (known = known_reason(reason)) != NULL) {
        fail_static(connection, known);
    } else {
        char text[256];
        const char *words = ERR_reason_error_string(code);
        if (words != NULL)
            snprintf(text, sizeof text, "TLS failed: %s", words);
        else
            snprintf(text, sizeof text, "TLS failed: error %lx", code);
        fail(connection, text, "TLS failed");
    }
    ERR_clear_error();
}

/* -- making and freeing ---------------------------------------------------------------------------------- */

static void count_message(int write, int version, int content, const void *bytes, size_t len, SSL *ssl, void *argument)
{
    tls_conn *connection = argument;
    (void)version;
    (void)bytes;
    (void)len;
    (void)ssl;
    if (write || content != SSL3_RT_HANDSHAKE || !connection->established) return;
    connection->messages++;
    if (connection->messages > FREE_MESSAGES + connection->plain_bytes / BYTES_PER_MESSAGE) connection->flooded = true;
}

static tls_conn *new_connection(SSL_CTX *context, tls_output *output)
{
    pthread_once(&method_once, make_method);
    ERR_clear_error();
    tls_conn *connection = calloc(1, sizeof *connection);
    BIO *bio = method_constant != NULL ? BIO_new(method_constant) : NULL;
    SSL *ssl = SSL_new(context);
    if (connection == NULL || bio == NULL || ssl == NULL) {
        free(connection);
        BIO_free(bio);
        SSL_free(ssl);
        ERR_clear_error();
        return NULL;
    }
    connection->ssl = ssl;
    connection->output = output;
    connection->error = connection->alpn = "";
    BIO_set_data(bio, connection);
    BIO_set_init(bio, 1);
    SSL_set_bio(ssl, bio, bio);
    /* One caller, whole writes. No read-ahead: what is not read yet stays in the window, where it is counted. OpenSSL's
     * copies of plaintext are not wiped (SSL_OP_CLEANSE_PLAINTEXT): the same bytes stand in the core's own buffers, so
     * it would cost 4 % of a request and protect nothing. */
    SSL_set_mode(ssl, SSL_MODE_RELEASE_BUFFERS | SSL_MODE_AUTO_RETRY);
    SSL_clear_mode(ssl, SSL_MODE_ENABLE_PARTIAL_WRITE);
    SSL_set_options(ssl, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
    SSL_set_read_ahead(ssl, 0);
    SSL_set_msg_callback(ssl, count_message);
    SSL_set_msg_callback_arg(ssl, connection);
    return connection;
}

tls_conn *tls_new_server(SSL_CTX *context, tls_output *output)
{
    tls_conn *connection = new_connection(context, output);
    if (connection != NULL) SSL_set_accept_state(connection->ssl);
    return connection;
}

static bool set_peer_name(SSL *ssl, const char *server_name)
{
    unsigned char address[sizeof(struct in6_addr)];
    X509_VERIFY_PARAM *param = SSL_get0_param(ssl);
    if (inet_pton(AF_INET, server_name, address) == 1 || inet_pton(AF_INET6, server_name, address) == 1)
        return X509_VERIFY_PARAM_set1_ip_asc(param, server_name) == 1; /* RFC 6066 3: no SNI for addresses */

    /* "example.com." is the same host, but neither SNI nor certificates carry the last dot. */
    char name[NAME_MAX_LEN + 1];
    size_t len = strlen(server_name);
    if (len > 0 && server_name[len - 1] == '.') len--;
    if (len == 0 || len > NAME_MAX_LEN) return false;
    memcpy(name, server_name, len);
    name[len] = '\0';
    X509_VERIFY_PARAM_set_hostflags(param, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS | X509_CHECK_FLAG_NEVER_CHECK_SUBJECT);
    return X509_VERIFY_PARAM_set1_host(param, name, len) == 1 && SSL_set_tlsext_host_name(ssl, name) == 1;
}

tls_conn *tls_new_client(SSL_CTX *context, tls_output *output, const char *server_name)
{
    if (server_name == NULL) return NULL;
    tls_conn *connection = new_connection(context, output);
    if (connection == NULL) return NULL;
    SSL_set_connect_state(connection->ssl);
    SSL_set_verify(connection->ssl, SSL_VERIFY_PEER, NULL);
    if (!set_peer_name(connection->ssl, server_name)) {
        tls_free(connection);
        ERR_clear_error();
        return NULL;
    }
    return connection;
}

void tls_free(tls_conn *connection)
{
    if (connection == NULL) return;
    SSL_free(connection->ssl); /* and the BIO */
    free(connection->kept);
    free(connection->sentence);
    free(connection->alpn_copy);
    free(connection);
}

/* -- input ----------------------------------------------------------------------------------------------- */

void tls_input(tls_conn *connection, const char *bytes, size_t len)
{
    if (connection->closed || connection->failed) return; /* nothing will read it */
    if (connection->lent_at < connection->lent_len) {
        fail_static(connection, "input was lent before the last was read or kept");
        return;
    }
    connection->lent = bytes;
    connection->lent_at = 0;
    connection->lent_len = len;
}

/* What follows close_notify is ignored (RFC 8446 6.1). */
static void drop_input(tls_conn *connection)
{
    free(connection->kept);
    connection->kept = NULL;
    connection->lent = NULL;
    connection->kept_at = connection->kept_len = connection->lent_at = connection->lent_len = 0;
}

size_t tls_pending_input(const tls_conn *connection)
{
    return (connection->kept_len - connection->kept_at) + (connection->lent_len - connection->lent_at);
}

bool tls_keep_input(tls_conn *connection)
{
    size_t lent = connection->lent_len - connection->lent_at;
    if (lent > 0) {
        size_t kept = connection->kept_len - connection->kept_at;
        char *joined = malloc(kept + lent);
        if (joined == NULL) {
            fail_static(connection, "no memory to keep input");
            return false;
        }
        if (kept > 0) memcpy(joined, connection->kept + connection->kept_at, kept);
        memcpy(joined + kept, connection->lent + connection->lent_at, lent);
        free(connection->kept);
        connection->kept = joined;
        connection->kept_at = 0;
        connection->kept_len = kept + lent;
    }
    connection->lent = NULL;
    connection->lent_at = connection->lent_len = 0;
    return true;
}

/* -- handshake, read, write, end ------------------------------------------------------------------------- */

static void note_alpn(tls_conn *connection)
{
    const unsigned char *name;
    unsigned len;
    SSL_get0_alpn_selected(connection->ssl, &name, &len);
    if (len == 0)
        connection->alpn = "";
    else if (len == 2 && memcmp(name, "h2", 2) == 0)
        connection->alpn = "h2";
    else if (len == 8 && memcmp(name, "http/1.1", 8) == 0)
        connection->alpn = "http/1.1";
    else if ((connection->alpn_copy = calloc(1, len + 1u)) != NULL)
        connection->alpn = memcpy(connection->alpn_copy, name, len);
}

int tls_handshake(tls_conn *connection)
{
    if (connection->failed) return TLS_FAILED;
    if (connection->established) return 1;
    ERR_clear_error();
    int result = SSL_do_handshake(connection->ssl);
    if (result == 1) {
        connection->established = true;
        note_alpn(connection);
        return 1;
    }
    if (SSL_get_error(connection->ssl, result) == SSL_ERROR_WANT_READ) return TLS_WANT;
    fail_from_queue(connection);
    return TLS_FAILED;
}

bool tls_established(const tls_conn *connection)
{
    return connection->established;
}

/* One record: > 0 bytes, or a tls_result. */
static int read_record(tls_conn *connection, char *plain, size_t cap)
{
    size_t got = 0;
    ERR_clear_error();
    int result = SSL_read_ex(connection->ssl, plain, cap, &got);
    if (connection->flooded) {
        fail_from_queue(connection);
        return TLS_FAILED;
    }
    if (result == 1) {
        connection->plain_bytes += got;
        return (int)got;
    }
    switch (SSL_get_error(connection->ssl, result)) {
    case SSL_ERROR_WANT_READ: return TLS_WANT;
    case SSL_ERROR_ZERO_RETURN:
        connection->closed = true;
        drop_input(connection);
        return TLS_CLOSED;
    default: fail_from_queue(connection); return TLS_FAILED;
    }
}

int tls_read(tls_conn *connection, char *plain, size_t cap)
{
    int shaken = tls_handshake(connection);
    if (shaken != 1) return shaken;
    if (connection->closed) return TLS_CLOSED;
    if (cap == 0) return TLS_WANT;
    if (cap > INT32_MAX) cap = INT32_MAX; /* the result is an int */
    size_t total = 0;
    while (total < cap) {
        int got = read_record(connection, plain + total, cap - total);
        if (got <= 0) return total > 0 ? (int)total : got; /* ends and failures stay, and are told next time */
        total += (size_t)got;
        if (tls_pending_input(connection) == 0 && tls_pending_plain(connection) == 0) break;
    }
    return (int)total;
}

size_t tls_pending_plain(const tls_conn *connection)
{
    return connection->established ? (size_t)SSL_pending(connection->ssl) : 0;
}

bool tls_write(tls_conn *connection, const char *bytes, size_t len)
{
    if (connection->failed) return false;
    if (!connection->established || connection->shut) {
        fail_static(connection, connection->shut ? "written after close_notify" : "written before the handshake");
        return false;
    }
    if (len == 0) return true;
    size_t written = 0;
    ERR_clear_error();
    int result = SSL_write_ex(connection->ssl, bytes, len, &written);
    if (result == 1) return true;
    /* Inside a handshake message that spans records OpenSSL wants the rest before it writes. No peer has reason to
     * stop there, and waiting would put the request in its hands. */
    if (SSL_get_error(connection->ssl, result) == SSL_ERROR_WANT_READ)
        fail_static(connection, "the peer left a handshake message unfinished");
    else
        fail_from_queue(connection);
    return false;
}

void tls_shutdown(tls_conn *connection)
{
    if (connection->failed || !connection->established || connection->shut) return;
    connection->shut = true;
    ERR_clear_error();
    SSL_shutdown(connection->ssl); /* 0: sent; whether the peer answers is told by tls_read */
    if (connection->output_full) fail_from_queue(connection);
    ERR_clear_error();
}

/* -- facts ----------------------------------------------------------------------------------------------- */

const char *tls_error(const tls_conn *connection)
{
    return connection->error;
}

const char *tls_version(const tls_conn *connection)
{
    return SSL_get_version(connection->ssl);
}

const char *tls_alpn(const tls_conn *connection)
{
    return connection->alpn;
}

bool tls_resumed(const tls_conn *connection)
{
    return SSL_session_reused(connection->ssl) == 1;
}

X509 *tls_peer(const tls_conn *connection)
{
    return SSL_get0_peer_certificate(connection->ssl);
}

STACK_OF(X509) *tls_peer_chain(const tls_conn *connection)
{
    return SSL_get_peer_cert_chain(connection->ssl);
}
