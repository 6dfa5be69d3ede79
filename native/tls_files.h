/* Certificates, keys and revocation lists from PEM files, checked, with a sentence for everything that can be wrong.
 *
 * What a file is allowed to be is decided here; what a context makes of it is tls_context.c's.
 */
#ifndef ASC_TLS_FILES_H
#define ASC_TLS_FILES_H

#include <openssl/x509.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct {
    char sentence[2048];
} tls_problem;

/* Put a sentence into the problem and empty OpenSSL's queue of errors. Always false. */
__attribute__((format(printf, 2, 3))) bool tls_wrong(tls_problem *problem, const char *format, ...);

/* What OpenSSL says about its newest error. */
const char *tls_last_words(void);

/* A certificate with its chain and its key. Owned; tls_identity_clear frees what is inside. */
typedef struct {
    X509 *leaf;
    STACK_OF(X509) *chain; /* with the leaf, in the file's order */
    EVP_PKEY *key;
    STACK_OF(OPENSSL_STRING) *names; /* of the subjectAltName, DNS in lower case and without a last dot, addresses as text */
} tls_identity;

/* Read and check: the key belongs to the certificate, which is valid now, may be used for this, and stands before its
 * issuers; a server's has names. False with a problem otherwise, and then nothing is inside. */
bool tls_identity_read(tls_identity *identity, const char *certificate, const char *key, bool server, tls_problem *problem);
void tls_identity_clear(tls_identity *identity);

/* All certificates of a file, at least one; NULL with a problem. */
STACK_OF(X509) *tls_read_certificates(const char *what, const char *path, tls_problem *problem);

/* The revocation lists of a file. Each must be signed by one of `authorities` and be in force, and each of those needs
 * one: clients of a CA whose list is missing would all be refused. NULL with a problem. */
STACK_OF(X509_CRL) *tls_read_crls(const char *path, STACK_OF(X509) *authorities, tls_problem *problem);

/* Facts of a certificate in seconds since 1970. */
typedef struct {
    int64_t not_before, not_after;
    unsigned char sha256[32];
} tls_certificate_facts;
bool tls_certificate_read(X509 *certificate, tls_certificate_facts *facts);

/* Seconds since 1970; false when it cannot be decoded. */
bool tls_seconds(const ASN1_TIME *time, int64_t *seconds);

#endif
