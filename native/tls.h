/* TLS inside a connection: OpenSSL with a BIO of our own over the caller's buffers (DESIGN D2).
 *
 * No socket is touched here and no buffer is owned per connection: ciphertext that was just read is lent to tls_input, what
 * OpenSSL wants to send is appended to a tls_output that all connections of a worker share and that the caller flushes
 * after *every* call, failing ones too, so that fatal alerts reach the peer.
 */
#ifndef ASC_TLS_H
#define ASC_TLS_H

#include <openssl/ssl.h>
#include <stdbool.h>
#include <stddef.h>

/* Growable bytes that wait for the socket; emptied (len = 0) by the caller. */
typedef struct {
    char *bytes;
    size_t len, cap;
    size_t max; /* an append beyond this fails the write (and so the connection): 1 MiB */
} tls_output;

typedef struct tls_conn tls_conn;

enum tls_result {
    TLS_WANT = 0,      /* all input is used up: more ciphertext is needed */
    TLS_CLOSED = -1,   /* close_notify received: a clean end of the peer's data */
    TLS_FAILED = -2,   /* fatal; tls_error says why; an alert may stand in the output */
};

/* One connection over `context`. server_name: NULL for servers; for clients the SNI and the name that is verified
 * (IP addresses: verified as such, no SNI sent). NULL when out of memory. */
tls_conn *tls_new_server(SSL_CTX *context, tls_output *output);
tls_conn *tls_new_client(SSL_CTX *context, tls_output *output, const char *server_name);
void tls_free(tls_conn *connection);

/* Lend ciphertext. It must stay valid until tls_pending_input is 0 or tls_input is called again; tls_read and
 * tls_handshake consume it. What is still unread when the caller must return is copied by tls_keep_input (bounded by
 * what was lent), so that the buffer may be reused. */
void tls_input(tls_conn *connection, const char *bytes, size_t len);
size_t tls_pending_input(const tls_conn *connection);
bool tls_keep_input(tls_conn *connection); /* false: no memory */

/* Drive the handshake: 1 done, TLS_WANT, TLS_FAILED. */
int tls_handshake(tls_conn *connection);
bool tls_established(const tls_conn *connection);

/* Decrypt into plain[0..cap): > 0 bytes, TLS_WANT, TLS_CLOSED or TLS_FAILED. Performs the handshake when it is not done.
 * Renegotiation is refused; TLS 1.3 key updates and tickets are handled inside. */
int tls_read(tls_conn *connection, char *plain, size_t cap);

/* Encrypt all of bytes[0..len) into the output: true, or false when failed. Only after the handshake. */
bool tls_write(tls_conn *connection, const char *bytes, size_t len);

/* Append close_notify to the output (once). */
void tls_shutdown(tls_conn *connection);

/* Static or connection-owned sentence about the last failure: "certificate verify failed: unable to get local issuer
 * certificate", "peer sent alert: bad certificate", ... */
const char *tls_error(const tls_conn *connection);

/* Facts after the handshake. ALPN and names are NUL-terminated, "" when there is none. */
const char *tls_version(const tls_conn *connection);
const char *tls_alpn(const tls_conn *connection);
bool tls_resumed(const tls_conn *connection);
/* DER of the peer's certificate, malloc'd copy the caller frees, NULL when none. */
unsigned char *tls_peer_certificate(const tls_conn *connection, size_t *len);

#endif
