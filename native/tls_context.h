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

#include "tls_files.h"
#include "tls_tickets.h"

enum { TLS_IDENTITIES_MAX = 16, TLS_TRUST = 32 };

/* PEM files; a certificate file holds the leaf first, then its intermediates. */
typedef struct {
    const char *certificate, *key;
} tls_pair;

/* Paths are PEM files. Servers: the first pair is for clients that name no host, or one that no certificate has;
 * certificates with the same name and different kinds of key stand side by side. Clients: none, or one. */
typedef struct {
    const tls_pair *pairs;
    size_t n_pairs;
    const char *ca;       /* servers: signs clients, NULL asks for none; clients: NULL is the system's store */
    const char *crl;      /* servers with a ca: revocation lists, NULL: none is looked at */
    const char *tickets;  /* servers: keys of session tickets that several nodes share (tls_tickets.h), or NULL */
    bool client_required; /* servers with a ca: a client without a certificate is refused */
    int client_depth;     /* servers with a ca: certificates above a client's own, its root included; 0: nine */
    bool tls13_only;
    const unsigned char *alpn; /* as on the wire, each name after its length, in order of preference; len 0: no ALPN */
    unsigned alpn_len;
} tls_files;

/* NULL when something is wrong: then the problem says which file and what to do. */
SSL_CTX *tls_context_server(const tls_files *files, tls_problem *problem);
SSL_CTX *tls_context_client(const tls_files *files, tls_problem *problem);

/* Ticket keys (RFC 5077 4) of a server context. Until there are any it issues no tickets and resumes nothing. The first
 * encrypts; all decrypt; a ticket of another than the first is renewed. Keys are copied, and wiped when replaced. */
bool tls_context_tickets(SSL_CTX *context, const unsigned char (*keys)[TLS_TICKET_KEY], size_t n);

/* Whether its ticket keys come from a file: then nobody replaces them. */
bool tls_context_tickets_from_file(SSL_CTX *context);

/* Whether two server contexts trust the same clients: CA file, revocation lists, depth, and whether one must show any. */
bool tls_context_same_trust(SSL_CTX *one, SSL_CTX *other);

/* Whether a client that was let in by another context would be by this one. `certificate` NULL: it showed none. */
bool tls_context_trusts(SSL_CTX *context, X509 *certificate, STACK_OF(X509) *chain);

/* The first certificate, borrowed; NULL when there is none. */
X509 *tls_context_certificate(SSL_CTX *context);

/* When what was read from each file of a server context ends, in seconds since 1970: the earliest of a file. */
enum tls_file_kind { TLS_FILE_SERVER, TLS_FILE_CLIENT_CA, TLS_FILE_CLIENT_CRL };
typedef struct {
    enum tls_file_kind kind;
    char *path;
    int64_t since, until;
} tls_file_date;
const tls_file_date *tls_context_dates(SSL_CTX *context, size_t *n);

#endif
