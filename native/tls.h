/* TLS inside a connection: OpenSSL with a BIO of our own over the caller's buffers (DESIGN D2).
 *
 * No socket is touched here and no buffer is owned per connection: ciphertext that was just read is lent to
 * tls_input, what OpenSSL wants to send is appended to a tls_output that all connections of a worker share and
 * that the caller flushes after *every* call, failing ones too, so that fatal alerts reach the peer.
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
    TLS_WANT = 0,    /* all input is used up: more ciphertext is needed */
    TLS_CLOSED = -1, /* close_notify received: a clean end of the peer's data; writing is still allowed */
    TLS_FAILED = -2, /* fatal and for good; tls_error says why; an alert may stand in the output */
};

/* One connection over `context`. server_name: the SNI and the name that is verified, whatever the context says (IP
 * addresses, without brackets: verified as such, no SNI sent). NULL when out of memory, or when server_name is
 * NULL, empty or longer than a name can be: there is no way to a client that verifies nobody. */
tls_conn *tls_new_server(SSL_CTX *context, tls_output *output);
tls_conn *tls_new_client(SSL_CTX *context, tls_output *output, const char *server_name);
void tls_free(tls_conn *connection);

/* Lend ciphertext. It must stay valid until tls_pending_input is 0 or tls_keep_input was called; tls_read and
 * tls_handshake consume it. What is still unread when the caller must return is copied by tls_keep_input (bounded
 * by what was lent), so that the buffer may be reused; kept bytes are read before bytes that are lent later.
 * Lending while bytes lent earlier are neither read nor kept would lose them, and fails the connection.
 *
 * The end of the socket's data is not told to this unit: an end without TLS_CLOSED is a truncation, and what that
 * means (RFC 9112 9.8: an error unless the message was delimited) is for the caller to say. */
void tls_input(tls_conn *connection, const char *bytes, size_t len);
size_t tls_pending_input(const tls_conn *connection);
bool tls_keep_input(tls_conn *connection); /* false: no memory, and the connection has failed */

/* Drive the handshake: 1 done, TLS_WANT, TLS_FAILED. */
int tls_handshake(tls_conn *connection);
bool tls_established(const tls_conn *connection);

/* Decrypt into plain[0..cap), as many records as fit: > 0 bytes, TLS_WANT, TLS_CLOSED or TLS_FAILED. Performs the
 * handshake when it is not done. An end or failure that comes after bytes is told by the next call. cap 0 reads
 * nothing and gives TLS_WANT once the handshake is done. Renegotiation is refused; TLS 1.3 key updates and tickets
 * are handled inside, and a peer that sends little else has failed. */
int tls_read(tls_conn *connection, char *plain, size_t cap);

/* Decrypted bytes of a record that did not fit in the last tls_read (while there are any, 17 KB are held). A
 * caller that stops reading has seen everything only when this and tls_pending_input are both 0. */
size_t tls_pending_plain(const tls_conn *connection);

/* Encrypt all of bytes[0..len) into the output: true, or false when failed. Only after the handshake, and not after
 * tls_shutdown. */
bool tls_write(tls_conn *connection, const char *bytes, size_t len);

/* Append close_notify to the output (once). */
void tls_shutdown(tls_conn *connection);

/* Static or connection-owned sentence about the failure, "" when there is none: "certificate verify failed: unable
 * to get local issuer certificate", "peer sent alert: bad certificate", "the peer spoke plain HTTP", ... */
const char *tls_error(const tls_conn *connection);

/* Facts after the handshake. ALPN and names are NUL-terminated, "" when there is none. */
const char *tls_version(const tls_conn *connection);
const char *tls_alpn(const tls_conn *connection);
bool tls_resumed(const tls_conn *connection);
/* The peer's certificate, borrowed, NULL when it showed none. */
X509 *tls_peer(const tls_conn *connection);
/* What it sent besides, borrowed; NULL also for a session that was resumed. */
STACK_OF(X509) *tls_peer_chain(const tls_conn *connection);

#endif
