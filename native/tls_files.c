/* PEM files, read and checked. See tls_files.h for the contract. */
#include "tls_files.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

/* -- problems ------------------------------------------------------------------------------------------------------ */

bool tls_wrong(tls_problem *problem, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(problem->sentence, sizeof problem->sentence, format, arguments);
    va_end(arguments);
    ERR_clear_error();
    return false;
}

const char *tls_last_words(void)
{
    unsigned long code = ERR_peek_last_error();
    const char *words = ERR_reason_error_string(code);
    return words != NULL ? words : "unknown reason";
}

/* The end of a PEM file is told as an error. */
static bool at_end(void)
{
    unsigned long code = ERR_peek_last_error();
    return ERR_GET_LIB(code) == ERR_LIB_PEM && ERR_GET_REASON(code) == PEM_R_NO_START_LINE;
}

/* -- files --------------------------------------------------------------------------------------------------------- */

static BIO *open_file(const char *what, const char *path, tls_problem *problem)
{
    errno = 0;
    ERR_clear_error();
    struct stat facts;
    BIO *bio = stat(path, &facts) == 0 && S_ISDIR(facts.st_mode) ? NULL : BIO_new_file(path, "re");
    if (bio == NULL && errno == 0) errno = EISDIR;
    if (bio == NULL)
        tls_wrong(problem, "cannot read %s %s: %s; check the path and that this user may read it", what, path,
              strerror(errno));
    return bio;
}

/* All certificates of a file; NULL with a problem when one cannot be read or there is none. */
STACK_OF(X509) *tls_read_certificates(const char *what, const char *path, tls_problem *problem)
{
    BIO *bio = open_file(what, path, problem);
    if (bio == NULL) return NULL;
    STACK_OF(X509) *all = sk_X509_new_null();
    X509 *one;
    while (all != NULL && (one = PEM_read_bio_X509_AUX(bio, NULL, NULL, NULL)) != NULL)
        if (sk_X509_push(all, one) == 0) {
            X509_free(one);
            break;
        }
    bool clean = at_end();
    BIO_free(bio);
    int n = all != NULL ? sk_X509_num(all) : 0;
    if (n > 0 && clean) {
        ERR_clear_error();
        return all;
    }
    if (!clean)
        tls_wrong(problem, "%s %s: certificate %d cannot be decoded (%s); write the file again as PEM", what, path, n + 1,
              tls_last_words());
    else
        tls_wrong(problem, "%s %s holds no certificate; it must be PEM, with lines BEGIN CERTIFICATE and END CERTIFICATE",
              what, path);
    sk_X509_pop_free(all, X509_free);
    return NULL;
}

static int no_passphrase(char *buffer, int size, int writing, void *asked)
{
    (void)buffer, (void)size, (void)writing;
    *(bool *)asked = true;
    return -1;
}

static EVP_PKEY *read_key(const char *path, tls_problem *problem)
{
    BIO *bio = open_file("key", path, problem);
    if (bio == NULL) return NULL;
    bool asked = false;
    EVP_PKEY *key = PEM_read_bio_PrivateKey(bio, NULL, no_passphrase, &asked);
    BIO_free(bio);
    if (key == NULL && asked)
        tls_wrong(problem, "key %s is encrypted with a passphrase, and nobody is there to enter it; decrypt it with "
                       "`openssl pkey -in OLD -out NEW` and protect the file by its mode", path);
    else if (key == NULL)
        tls_wrong(problem, "key %s holds no private key; it must be PEM, with lines BEGIN PRIVATE KEY and END PRIVATE KEY",
              path);
    return key;
}

bool tls_seconds(const ASN1_TIME *time, int64_t *seconds)
{
    struct tm broken;
    if (ASN1_TIME_to_tm(time, &broken) != 1) return false;
    *seconds = timegm(&broken);
    return true;
}

bool tls_certificate_read(X509 *certificate, tls_certificate_facts *facts)
{
    unsigned len = sizeof facts->sha256;
    bool done = tls_seconds(X509_get0_notBefore(certificate), &facts->not_before) &&
                tls_seconds(X509_get0_notAfter(certificate), &facts->not_after) &&
                X509_digest(certificate, EVP_sha256(), facts->sha256, &len) == 1;
    ERR_clear_error();
    return done;
}

static bool check_validity(X509 *certificate, const char *path, tls_problem *problem)
{
    tls_certificate_facts facts;
    if (!tls_certificate_read(certificate, &facts))
        return tls_wrong(problem, "certificate %s: its dates cannot be decoded; issue it again", path);
    time_t now = time(NULL), limit;
    bool expired = facts.not_after < now;
    if (!expired && facts.not_before <= now) return true;
    limit = expired ? facts.not_after : facts.not_before;
    struct tm broken;
    char text[32] = "?";
    if (gmtime_r(&limit, &broken) != NULL) strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S UTC", &broken);
    if (expired) return tls_wrong(problem, "certificate %s expired on %s; renew it", path, text);
    return tls_wrong(problem, "certificate %s is not valid before %s; check the clock, or issue it again", path, text);
}

/* Servers send what is in the file, in its order; most clients need it whole (RFC 8446 4.4.2). */
static bool check_chain(STACK_OF(X509) *chain, const char *path, tls_problem *problem)
{
    for (int i = 1; i < sk_X509_num(chain); i++)
        if (X509_check_issued(sk_X509_value(chain, i), sk_X509_value(chain, i - 1)) != X509_V_OK)
            return tls_wrong(problem,
                         "certificate %s: certificate %d of the file did not issue certificate %d; the order is the "
                         "server's own first, then each issuer", path, i + 1, i);
    return true;
}

/* -- identities ---------------------------------------------------------------------------------------------------- */

static void free_name(char *name)
{
    OPENSSL_free(name);
}

/* A DNS name as it is compared, or NULL: lower case, without the last dot. A name with a NUL in it is nobody's. */
static char *plain_name(const ASN1_STRING *string)
{
    const char *bytes = (const char *)ASN1_STRING_get0_data(string);
    int len = ASN1_STRING_length(string);
    if (len > 1 && bytes[len - 1] == '.') len--;
    if (len <= 0 || memchr(bytes, 0, (size_t)len) != NULL) return NULL;
    char *name = OPENSSL_strndup(bytes, (size_t)len);
    for (char *at = name; at != NULL && *at; at++) *at = (char)tolower((unsigned char)*at);
    return name;
}

static char *general_name(const GENERAL_NAME *general)
{
    if (general->type == GEN_DNS) return plain_name(general->d.dNSName);
    if (general->type != GEN_IPADD) return NULL;
    char text[INET6_ADDRSTRLEN];
    int len = ASN1_STRING_length(general->d.iPAddress);
    if (len != 4 && len != 16) return NULL;
    const void *address = ASN1_STRING_get0_data(general->d.iPAddress);
    return inet_ntop(len == 4 ? AF_INET : AF_INET6, address, text, sizeof text) != NULL ? OPENSSL_strdup(text) : NULL;
}

static STACK_OF(OPENSSL_STRING) *names_of(X509 *certificate)
{
    STACK_OF(OPENSSL_STRING) *names = sk_OPENSSL_STRING_new_null();
    GENERAL_NAMES *all = X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
    for (int i = 0; names != NULL && all != NULL && i < sk_GENERAL_NAME_num(all); i++) {
        char *name = general_name(sk_GENERAL_NAME_value(all, i));
        if (name != NULL && sk_OPENSSL_STRING_push(names, name) == 0) OPENSSL_free(name);
    }
    GENERAL_NAMES_free(all);
    ERR_clear_error();
    return names;
}

void tls_identity_clear(tls_identity *identity)
{
    sk_X509_pop_free(identity->chain, X509_free);
    EVP_PKEY_free(identity->key);
    sk_OPENSSL_STRING_pop_free(identity->names, free_name);
    memset(identity, 0, sizeof *identity);
}

static bool check_identity(const tls_identity *identity, const char *certificate, const char *key, bool server,
                           tls_problem *problem)
{
    if (X509_check_private_key(identity->leaf, identity->key) != 1)
        return tls_wrong(problem, "key %s does not belong to certificate %s; was only one of the two files replaced?", key,
                         certificate);
    if (!check_validity(identity->leaf, certificate, problem)) return false;
    if (!check_chain(identity->chain, certificate, problem)) return false;
    if (X509_check_purpose(identity->leaf, server ? X509_PURPOSE_SSL_SERVER : X509_PURPOSE_SSL_CLIENT, 0) != 1)
        return tls_wrong(problem, "certificate %s may not be used by a TLS %s (key usage); issue one for this use",
                         certificate, server ? "server" : "client");
    /* Clients have ignored the common name since RFC 6125 6.4.4 / RFC 9525: nobody could verify one without names. */
    if (server && sk_OPENSSL_STRING_num(identity->names) == 0)
        return tls_wrong(problem, "certificate %s names no host: issue it with a subjectAltName (DNS names or IP addresses)",
                         certificate);
    return true;
}

bool tls_identity_read(tls_identity *identity, const char *certificate, const char *key, bool server, tls_problem *problem)
{
    memset(identity, 0, sizeof *identity);
    identity->chain = tls_read_certificates("certificate", certificate, problem);
    identity->key = identity->chain != NULL ? read_key(key, problem) : NULL;
    if (identity->key != NULL) {
        identity->leaf = sk_X509_value(identity->chain, 0);
        identity->names = names_of(identity->leaf);
        if (identity->names == NULL)
            tls_wrong(problem, "no memory for a TLS context");
        else if (check_identity(identity, certificate, key, server, problem))
            return true;
    }
    tls_identity_clear(identity);
    return false;
}

/* -- revocation lists ---------------------------------------------------------------------------------------------- */

static bool signed_by(X509_CRL *crl, X509 *authority)
{
    return X509_NAME_cmp(X509_CRL_get_issuer(crl), X509_get_subject_name(authority)) == 0 &&
           X509_CRL_verify(crl, X509_get0_pubkey(authority)) == 1;
}

static bool check_crl(X509_CRL *crl, int number, const char *path, STACK_OF(X509) *authorities, tls_problem *problem)
{
    int64_t next;
    bool known = false;
    for (int i = 0; i < sk_X509_num(authorities) && !known; i++) known = signed_by(crl, sk_X509_value(authorities, i));
    if (!known)
        return tls_wrong(problem, "CRL file %s: list %d is not signed by a CA of client_ca; remove it, or name its CA", path,
                         number);
    const ASN1_TIME *until = X509_CRL_get0_nextUpdate(crl);
    if (until == NULL) return true;
    if (!tls_seconds(until, &next))
        return tls_wrong(problem, "CRL file %s: the dates of list %d cannot be decoded; issue it again", path, number);
    if (next < time(NULL)) {
        char text[32] = "?";
        struct tm broken;
        time_t seconds = (time_t)next;
        if (gmtime_r(&seconds, &broken) != NULL) strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S UTC", &broken);
        return tls_wrong(problem, "CRL file %s: list %d was to be replaced by %s, and every client would be refused; fetch "
                                  "the current list", path, number, text);
    }
    return true;
}

static bool check_coverage(STACK_OF(X509_CRL) *crls, const char *path, STACK_OF(X509) *authorities, tls_problem *problem)
{
    for (int i = 0; i < sk_X509_num(authorities); i++) {
        bool found = false;
        for (int k = 0; k < sk_X509_CRL_num(crls) && !found; k++)
            found = signed_by(sk_X509_CRL_value(crls, k), sk_X509_value(authorities, i));
        if (!found) {
            char name[256] = "?";
            X509_NAME_oneline(X509_get_subject_name(sk_X509_value(authorities, i)), name, sizeof name);
            return tls_wrong(problem, "CRL file %s holds no list of %s, and every client of that CA would be refused; add its "
                                      "list", path, name);
        }
    }
    return true;
}

STACK_OF(X509_CRL) *tls_read_crls(const char *path, STACK_OF(X509) *authorities, tls_problem *problem)
{
    BIO *bio = open_file("CRL file", path, problem);
    if (bio == NULL) return NULL;
    STACK_OF(X509_CRL) *all = sk_X509_CRL_new_null();
    X509_CRL *one;
    bool fine = all != NULL;
    while (fine && (one = PEM_read_bio_X509_CRL(bio, NULL, NULL, NULL)) != NULL)
        if (sk_X509_CRL_push(all, one) == 0) {
            X509_CRL_free(one);
            fine = false;
        }
    bool clean = fine && at_end();
    BIO_free(bio);
    int n = all != NULL ? sk_X509_CRL_num(all) : 0;
    if (!clean)
        fine = tls_wrong(problem, "CRL file %s: list %d cannot be decoded (%s); write the file again as PEM", path, n + 1,
                         tls_last_words());
    else if (n == 0)
        fine = tls_wrong(problem, "CRL file %s holds no revocation list; it must be PEM, with lines BEGIN X509 CRL and END "
                                  "X509 CRL", path);
    for (int i = 0; fine && i < n; i++) fine = check_crl(sk_X509_CRL_value(all, i), i + 1, path, authorities, problem);
    fine = fine && check_coverage(all, path, authorities, problem);
    ERR_clear_error();
    if (fine) return all;
    sk_X509_CRL_pop_free(all, X509_CRL_free);
    return NULL;
}
