/* OpenSSL contexts from files, with sentences for everything that can be wrong with them.
 *
 * A context is never changed once made, but for its ticket keys: a reload makes a new one, and connections keep theirs.
 */
#ifndef ASC_TLS_CONTEXT_H
#define ASC_TLS_CONTEXT_H

#include <openssl/ssl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Paths are PEM files; a certificate file holds the leaf first, then its intermediates. */
typedef struct {
    const char *certificate, *key; /* both, or for clients both NULL */
    const char *ca;                /* servers: signs clients, NULL asks for none; clients: NULL is the system's store */
    bool client_required;          /* servers with a ca: a client without a certificate is refused */
    bool tls13_only;
    const unsigned char *alpn; /* as on the wire, each name after its length, in order of preference; len 0: no ALPN */
    unsigned alpn_len;
} tls_files;

typedef struct {
    char sentence[2048];
} tls_problem;

/* NULL when something is wrong: then the problem says which file and what to do. */
SSL_CTX *tls_context_server(const tls_files *files, tls_problem *problem);
SSL_CTX *tls_context_client(const tls_files *files, tls_problem *problem);

/* Ticket keys (RFC 5077 4) of a server context. Until there are any it issues no tickets and resumes nothing. The first
 * encrypts; all decrypt; a ticket of another than the first is renewed. Keys are copied, and wiped when replaced. */
enum { TLS_TICKET_KEY = 80, TLS_TICKET_KEYS_MAX = 8 }; /* name 16, AES-256 key 32, HMAC-SHA-256 key 32 */
bool tls_context_tickets(SSL_CTX *context, const unsigned char (*keys)[TLS_TICKET_KEY], size_t n);

/* Facts of a certificate in seconds since 1970. */
typedef struct {
    int64_t not_before, not_after;
    unsigned char sha256[32];
} tls_certificate_facts;
bool tls_certificate_read(X509 *certificate, tls_certificate_facts *facts);

#endif
