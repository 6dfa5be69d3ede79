/* OpenSSL contexts from files. See tls_context.h for the contract. */
#include "tls_context.h"

#include <errno.h>
#include <openssl/core_names.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

/* What Mozilla calls intermediate (5.7) without finite-field DHE, which OpenSSL would compute for anyone who asks. */
static const char SUITES_12[] = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:"
                                "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:"
                                "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305";
static const char SUITES_13[] = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256";
static const char GROUPS[] = "X25519:P-256:P-384";

enum {
    CHAIN_MAX = 8,                /* certificates between a leaf and its root */
    PEER_CHAIN_BYTES = 64 * 1024, /* what a peer may send as its chain; OpenSSL allows 100 KB */
    TICKET_SECONDS = 2 * 3600,    /* a resumed session does not look at the client's certificate again */
};

/* What callbacks need; owned by the context through its ex_data, because connections outlive whoever made it. */
typedef struct {
    unsigned char *alpn;
    unsigned alpn_len;
    size_t n_keys;
    unsigned char keys[TLS_TICKET_KEYS_MAX][TLS_TICKET_KEY];
} settings;

static pthread_once_t index_once = PTHREAD_ONCE_INIT;
static int settings_index = -1; /* made once, never changed */

static void free_settings(void *parent, void *pointer, CRYPTO_EX_DATA *data, int index, long number, void *argument)
{
    (void)parent, (void)data, (void)index, (void)number, (void)argument;
    settings *gone = pointer;
    if (gone == NULL) return;
    free(gone->alpn);
    explicit_bzero(gone, sizeof *gone);
    free(gone);
}

static void make_index(void)
{
    settings_index = SSL_CTX_get_ex_new_index(0, NULL, NULL, NULL, free_settings);
}

static settings *settings_of(SSL_CTX *context)
{
    return SSL_CTX_get_ex_data(context, settings_index);
}

/* -- problems ------------------------------------------------------------------------------------------------------ */

__attribute__((format(printf, 2, 3))) static bool wrong(tls_problem *problem, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(problem->sentence, sizeof problem->sentence, format, arguments);
    va_end(arguments);
    ERR_clear_error();
    return false;
}

static const char *last_words(void)
{
    unsigned long code = ERR_peek_last_error();
    const char *words = ERR_reason_error_string(code);
    return words != NULL ? words : "unknown reason";
}

static bool too_weak(void)
{
    int reason = ERR_GET_REASON(ERR_peek_last_error());
    return ERR_GET_LIB(ERR_peek_last_error()) == ERR_LIB_SSL &&
           (reason == SSL_R_EE_KEY_TOO_SMALL || reason == SSL_R_CA_KEY_TOO_SMALL || reason == SSL_R_CA_MD_TOO_WEAK);
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
        wrong(problem, "cannot read %s %s: %s; check the path and that this user may read it", what, path,
              strerror(errno));
    return bio;
}

/* All certificates of a file; NULL with a problem when one cannot be read or there is none. */
static STACK_OF(X509) *read_certificates(const char *what, const char *path, tls_problem *problem)
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
        wrong(problem, "%s %s: certificate %d cannot be decoded (%s); write the file again as PEM", what, path, n + 1,
              last_words());
    else
        wrong(problem, "%s %s holds no certificate; it must be PEM, with lines BEGIN CERTIFICATE and END CERTIFICATE",
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
        wrong(problem, "key %s is encrypted with a passphrase, and nobody is there to enter it; decrypt it with "
                       "`openssl pkey -in OLD -out NEW` and protect the file by its mode", path);
    else if (key == NULL)
        wrong(problem, "key %s holds no private key; it must be PEM, with lines BEGIN PRIVATE KEY and END PRIVATE KEY",
              path);
    return key;
}

static bool seconds_of(const ASN1_TIME *time, int64_t *seconds)
{
    struct tm broken;
    if (ASN1_TIME_to_tm(time, &broken) != 1) return false;
    *seconds = timegm(&broken);
    return true;
}

bool tls_certificate_read(X509 *certificate, tls_certificate_facts *facts)
{
    unsigned len = sizeof facts->sha256;
    bool done = seconds_of(X509_get0_notBefore(certificate), &facts->not_before) &&
                seconds_of(X509_get0_notAfter(certificate), &facts->not_after) &&
                X509_digest(certificate, EVP_sha256(), facts->sha256, &len) == 1;
    ERR_clear_error();
    return done;
}

static bool check_validity(X509 *certificate, const char *path, tls_problem *problem)
{
    tls_certificate_facts facts;
    if (!tls_certificate_read(certificate, &facts))
        return wrong(problem, "certificate %s: its dates cannot be decoded; issue it again", path);
    time_t now = time(NULL), limit;
    bool expired = facts.not_after < now;
    if (!expired && facts.not_before <= now) return true;
    limit = expired ? facts.not_after : facts.not_before;
    struct tm broken;
    char text[32] = "?";
    if (gmtime_r(&limit, &broken) != NULL) strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S UTC", &broken);
    if (expired) return wrong(problem, "certificate %s expired on %s; renew it", path, text);
    return wrong(problem, "certificate %s is not valid before %s; check the clock, or issue it again", path, text);
}

/* Servers send what is in the file, in its order; most clients need it whole (RFC 8446 4.4.2). */
static bool check_chain(STACK_OF(X509) *chain, const char *path, tls_problem *problem)
{
    for (int i = 1; i < sk_X509_num(chain); i++)
        if (X509_check_issued(sk_X509_value(chain, i), sk_X509_value(chain, i - 1)) != X509_V_OK)
            return wrong(problem,
                         "certificate %s: certificate %d of the file did not issue certificate %d; the order is the "
                         "server's own first, then each issuer", path, i + 1, i);
    return true;
}

static bool use_identity(SSL_CTX *context, const tls_files *files, bool server, tls_problem *problem)
{
    STACK_OF(X509) *chain = read_certificates("certificate", files->certificate, problem);
    EVP_PKEY *key = chain != NULL ? read_key(files->key, problem) : NULL;
    bool done = false;
    if (key == NULL) goto out;
    X509 *leaf = sk_X509_value(chain, 0);
    if (X509_check_private_key(leaf, key) != 1) {
        wrong(problem, "key %s does not belong to certificate %s; was only one of the two files replaced?", files->key,
              files->certificate);
        goto out;
    }
    if (!check_validity(leaf, files->certificate, problem)) goto out;
    if (!check_chain(chain, files->certificate, problem)) goto out;
    if (X509_check_purpose(leaf, server ? X509_PURPOSE_SSL_SERVER : X509_PURPOSE_SSL_CLIENT, 0) != 1) {
        wrong(problem, "certificate %s may not be used by a TLS %s (key usage); issue one for this use",
              files->certificate, server ? "server" : "client");
        goto out;
    }
    bool used = SSL_CTX_use_certificate(context, leaf) == 1;
    for (int i = 1; used && i < sk_X509_num(chain); i++)
        used = SSL_CTX_add1_chain_cert(context, sk_X509_value(chain, i)) == 1;
    if (!used || SSL_CTX_use_PrivateKey(context, key) != 1) {
        if (too_weak())
            wrong(problem, "certificate %s is too weak (%s); use P-256, or RSA with 2048 bits or more, and SHA-256",
                  files->certificate, last_words());
        else
            wrong(problem, "certificate %s or key %s cannot be used (%s)", files->certificate, files->key,
                  last_words());
        goto out;
    }
    done = true;
out:
    sk_X509_pop_free(chain, X509_free);
    EVP_PKEY_free(key);
    return done;
}

/* Trust the certificates of a file. A server names them to clients, and binds its sessions to them. */
static bool use_authority(SSL_CTX *context, const tls_files *files, bool server, tls_problem *problem)
{
    const char *path = files->ca;
    STACK_OF(X509) *all = read_certificates("CA file", path, problem);
    if (all == NULL) return false;
    X509_STORE *store = SSL_CTX_get_cert_store(context);
    EVP_MD_CTX *hash = EVP_MD_CTX_new();
    unsigned char digest[EVP_MAX_MD_SIZE], one[EVP_MAX_MD_SIZE];
    unsigned len = 0;
    bool done = hash != NULL && EVP_DigestInit_ex(hash, EVP_sha256(), NULL) == 1 &&
                EVP_DigestUpdate(hash, files->client_required ? "required" : "optional", 8) == 1;
    for (int i = 0; done && i < sk_X509_num(all); i++) {
        X509 *certificate = sk_X509_value(all, i);
        done = X509_STORE_add_cert(store, certificate) == 1 && X509_digest(certificate, EVP_sha256(), one, &len) == 1 &&
               EVP_DigestUpdate(hash, one, len) == 1 && (!server || SSL_CTX_add_client_CA(context, certificate) == 1);
    }
    /* A ticket made under another CA file, or where a certificate was optional, must not be resumed: the client's
     * certificate is not looked at again. */
    if (done && server)
        done = EVP_DigestFinal_ex(hash, digest, &len) == 1 && SSL_CTX_set_session_id_context(context, digest, len) == 1;
    if (!done) wrong(problem, "CA file %s cannot be used (%s)", path, last_words());
    EVP_MD_CTX_free(hash);
    sk_X509_pop_free(all, X509_free);
    return done;
}

/* -- callbacks ----------------------------------------------------------------------------------------------------- */

/* Our order decides. Without a match the handshake ends with alert 120 (RFC 7301 3.2): falling back would let a client
 * speak one protocol and the server another. */
static int choose_alpn(SSL *ssl, const unsigned char **out, unsigned char *out_len, const unsigned char *theirs,
                       unsigned theirs_len, void *argument)
{
    (void)ssl;
    const settings *own = argument;
    for (unsigned i = 0; i < own->alpn_len; i += 1u + own->alpn[i])
        for (unsigned k = 0; k < theirs_len && theirs[k] < theirs_len - k; k += 1u + theirs[k])
            if (theirs[k] == own->alpn[i] && memcmp(theirs + k + 1, own->alpn + i + 1, theirs[k]) == 0) {
                *out = theirs + k + 1;
                *out_len = theirs[k];
                return SSL_TLSEXT_ERR_OK;
            }
    return SSL_TLSEXT_ERR_ALERT_FATAL;
}

/* 1: use, 2: use and renew, 0: no such key (a full handshake), -1: failed. */
static int ticket_key(SSL *ssl, unsigned char *name, unsigned char *iv, EVP_CIPHER_CTX *cipher, EVP_MAC_CTX *mac,
                      int encrypt)
{
    const settings *own = settings_of(SSL_get_SSL_CTX(ssl));
    size_t i = 0;
    if (own->n_keys == 0) return 0;
    if (encrypt) {
        int len = EVP_CIPHER_get_iv_length(EVP_aes_256_cbc());
        if (RAND_bytes(iv, len) != 1) return -1;
        memcpy(name, own->keys[0], 16);
    } else {
        while (i < own->n_keys && memcmp(name, own->keys[i], 16) != 0) i++; /* names are public */
        if (i == own->n_keys) return 0;
    }
    const unsigned char *key = own->keys[i];
    OSSL_PARAM parameters[] = {
        OSSL_PARAM_construct_octet_string(OSSL_MAC_PARAM_KEY, (void *)(key + 48), 32),
        OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, "SHA256", 0),
        OSSL_PARAM_construct_end(),
    };
    if (EVP_MAC_CTX_set_params(mac, parameters) != 1 ||
        EVP_CipherInit_ex(cipher, EVP_aes_256_cbc(), NULL, key + 16, iv, encrypt) != 1)
        return -1;
    return i == 0 ? 1 : 2;
}

bool tls_context_tickets(SSL_CTX *context, const unsigned char (*keys)[TLS_TICKET_KEY], size_t n)
{
    settings *own = settings_of(context);
    if (own == NULL || n > TLS_TICKET_KEYS_MAX) return false;
    explicit_bzero(own->keys, sizeof own->keys);
    if (n > 0) memcpy(own->keys, keys, n * TLS_TICKET_KEY);
    own->n_keys = n;
    if (n > 0)
        SSL_CTX_clear_options(context, SSL_OP_NO_TICKET);
    else
        SSL_CTX_set_options(context, SSL_OP_NO_TICKET);
    SSL_CTX_set_num_tickets(context, n > 0 ? 1 : 0);
    return true;
}

/* -- contexts ------------------------------------------------------------------------------------------------------ */

static SSL_CTX *new_context(const tls_files *files, bool server, tls_problem *problem)
{
    pthread_once(&index_once, make_index);
    ERR_clear_error();
    SSL_CTX *context = SSL_CTX_new(server ? TLS_server_method() : TLS_client_method());
    settings *own = calloc(1, sizeof *own);
    if (context == NULL || own == NULL || settings_index < 0 ||
        SSL_CTX_set_ex_data(context, settings_index, own) != 1) {
        wrong(problem, "no memory for a TLS context");
        free(own);
        SSL_CTX_free(context);
        return NULL;
    }
    SSL_CTX_set_security_level(context, 2); /* 112 bits: RSA from 2048 bits, no SHA-1 (NIST SP 800-57) */
    SSL_CTX_set_options(context, SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_TICKET);
    SSL_CTX_set_mode(context, SSL_MODE_NO_AUTO_CHAIN); /* only what is in the file is sent */
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_verify_depth(context, CHAIN_MAX);
    SSL_CTX_set_max_cert_list(context, PEER_CHAIN_BYTES);
    bool set = SSL_CTX_set_min_proto_version(context, files->tls13_only ? TLS1_3_VERSION : TLS1_2_VERSION) == 1 &&
               SSL_CTX_set_cipher_list(context, SUITES_12) == 1 && SSL_CTX_set_ciphersuites(context, SUITES_13) == 1 &&
               SSL_CTX_set1_groups_list(context, GROUPS) == 1;
    if (files->alpn_len > 0) {
        own->alpn = malloc(files->alpn_len);
        if (own->alpn == NULL) {
            set = false;
        } else {
            memcpy(own->alpn, files->alpn, files->alpn_len);
            own->alpn_len = files->alpn_len;
        }
    }
    if (set) return context;
    wrong(problem, "this OpenSSL cannot be set up for TLS (%s)", last_words());
    SSL_CTX_free(context);
    return NULL;
}

SSL_CTX *tls_context_server(const tls_files *files, tls_problem *problem)
{
    SSL_CTX *context = new_context(files, true, problem);
    if (context == NULL) return NULL;
    settings *own = settings_of(context);
    /* AES first for machines that have it in hardware, ChaCha for clients that put it first because they have not. */
    SSL_CTX_set_options(context, SSL_OP_CIPHER_SERVER_PREFERENCE | SSL_OP_PRIORITIZE_CHACHA);
    SSL_CTX_set_timeout(context, TICKET_SECONDS);
    SSL_CTX_set_num_tickets(context, 0);
    SSL_CTX_set_session_id_context(context, (const unsigned char *)"no client CA", 12);
    if (own->alpn_len > 0) SSL_CTX_set_alpn_select_cb(context, choose_alpn, own);
    if (SSL_CTX_set_tlsext_ticket_key_evp_cb(context, ticket_key) == 1 && use_identity(context, files, true, problem) &&
        (files->ca == NULL || use_authority(context, files, true, problem))) {
        if (files->ca != NULL)
            SSL_CTX_set_verify(
                context, SSL_VERIFY_PEER | (files->client_required ? SSL_VERIFY_FAIL_IF_NO_PEER_CERT : 0), NULL);
        return context;
    }
    SSL_CTX_free(context);
    return NULL;
}

SSL_CTX *tls_context_client(const tls_files *files, tls_problem *problem)
{
    SSL_CTX *context = new_context(files, false, problem);
    if (context == NULL) return NULL;
    settings *own = settings_of(context);
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
    bool done = true;
    if (files->ca != NULL)
        done = use_authority(context, files, false, problem);
    else if (SSL_CTX_set_default_verify_paths(context) != 1)
        done = wrong(problem, "the system's CA certificates cannot be loaded (%s); name a CA file", last_words());
    if (done && files->certificate != NULL) done = use_identity(context, files, false, problem);
    if (done && own->alpn_len > 0 && SSL_CTX_set_alpn_protos(context, own->alpn, own->alpn_len) != 0)
        done = wrong(problem, "no memory for a TLS context");
    if (done) return context;
    SSL_CTX_free(context);
    return NULL;
}
