/* OpenSSL contexts from files. See tls_context.h for the contract.
 *
 * A listener's certificates differ in names and in kind of key. For each set of names that leads to other certificates
 * than the default ones there is a context of its own, to which a connection is moved when its client has said which
 * name it wants. They share everything else: ticket keys, ALPN and trust are the first context's.
 */
#include "tls_context.h"

#include <ctype.h>
#include <openssl/core_names.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* What Mozilla calls intermediate (5.7) without finite-field DHE, which OpenSSL would compute for anyone who asks. */
static const char SUITES_12[] = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:"
                                "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:"
                                "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305";
static const char SUITES_13[] = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256";
static const char GROUPS[] = "X25519:P-256:P-384";

enum {
    CHAIN_MAX = 8,                /* certificates between a leaf and its root, where nothing else is said */
    NAME_MAX_LEN = 253,           /* of a DNS name without its last dot (RFC 1035 2.3.4, RFC 1123 2.1) */
    PEER_CHAIN_BYTES = 64 * 1024, /* what a peer may send as its chain; OpenSSL allows 100 KB */
    TICKET_SECONDS = 2 * 3600,    /* a resumed session does not look at the client's certificate again */
};

/* One name of a certificate, and the context with the certificates that carry it; NULL: the first context. */
typedef struct {
    char *name;
    uint32_t chosen; /* bits: which identities */
    SSL_CTX *context;
} named;

/* What callbacks need; owned by the first context through its ex_data, because connections outlive whoever made it. */
typedef struct {
    unsigned char *alpn;
    unsigned alpn_len;
    EVP_CIPHER *ticket_cipher; /* fetched once: to fetch it for each ticket takes a lock and a search */
    size_t n_keys;
    unsigned char keys[TLS_TICKET_KEYS_MAX][TLS_TICKET_KEY];
    X509 *own; /* the first certificate */
    named *names; /* sorted */
    size_t n_names;
    SSL_CTX *others[TLS_IDENTITIES_MAX * TLS_IDENTITIES_MAX]; /* each once */
    size_t n_others;
    tls_file_date *dates;
    size_t n_dates;
    bool keys_from_file;
    bool trusting, required; /* asks clients for a certificate; refuses those without */
    unsigned char trust[TLS_TRUST];
} settings;

static pthread_once_t index_once = PTHREAD_ONCE_INIT;
static int settings_index = -1; /* made once, never changed; of the first context */
static int shared_index = -1;   /* of the others: the same settings, borrowed (whoever uses one holds the first too) */

static void free_settings(void *parent, void *pointer, CRYPTO_EX_DATA *data, int index, long number, void *argument)
{
    (void)parent, (void)data, (void)index, (void)number, (void)argument;
    settings *gone = pointer;
    if (gone == NULL) return;
    for (size_t i = 0; i < gone->n_others; i++) SSL_CTX_free(gone->others[i]);
    for (size_t i = 0; i < gone->n_names; i++) free(gone->names[i].name);
    for (size_t i = 0; i < gone->n_dates; i++) free(gone->dates[i].path);
    free(gone->names);
    free(gone->dates);
    free(gone->alpn);
    X509_free(gone->own);
    EVP_CIPHER_free(gone->ticket_cipher);
    explicit_bzero(gone, sizeof *gone);
    free(gone);
}

static void make_index(void)
{
    settings_index = SSL_CTX_get_ex_new_index(0, NULL, NULL, NULL, free_settings);
    shared_index = SSL_CTX_get_ex_new_index(0, NULL, NULL, NULL, NULL);
}

static settings *settings_of(SSL_CTX *context)
{
    settings *own = SSL_CTX_get_ex_data(context, settings_index);
    return own != NULL ? own : SSL_CTX_get_ex_data(context, shared_index);
}

static bool too_weak(void)
{
    int reason = ERR_GET_REASON(ERR_peek_last_error());
    return ERR_GET_LIB(ERR_peek_last_error()) == ERR_LIB_SSL &&
           (reason == SSL_R_EE_KEY_TOO_SMALL || reason == SSL_R_CA_KEY_TOO_SMALL || reason == SSL_R_CA_MD_TOO_WEAK);
}

/* -- identities ---------------------------------------------------------------------------------------------------- */

/* When something from this file ends. */
static bool note_date(settings *own, enum tls_file_kind kind, const char *path, int64_t since,
                      int64_t until)
{
    tls_file_date *grown = realloc(own->dates, (own->n_dates + 1) * sizeof *grown);
    if (grown == NULL) return false;
    own->dates = grown;
    grown[own->n_dates] = (tls_file_date){.kind = kind, .path = strdup(path), .since = since, .until = until};
    if (grown[own->n_dates].path == NULL) return false;
    own->n_dates++;
    return true;
}

static bool use_identity(SSL_CTX *context, const tls_identity *identity, const tls_pair *pair, tls_problem *problem)
{
    bool used = SSL_CTX_use_certificate(context, identity->leaf) == 1;
    for (int i = 1; used && i < sk_X509_num(identity->chain); i++)
        used = SSL_CTX_add1_chain_cert(context, sk_X509_value(identity->chain, i)) == 1;
    if (used && SSL_CTX_use_PrivateKey(context, identity->key) == 1) return true;
    if (too_weak())
        return tls_wrong(problem, "certificate %s is too weak (%s); use P-256, or RSA with 2048 bits or more, and SHA-256",
                     pair->certificate, tls_last_words());
    return tls_wrong(problem, "certificate %s or key %s cannot be used (%s)", pair->certificate, pair->key, tls_last_words());
}

static bool use_identities(SSL_CTX *context, const tls_identity *all, const tls_files *files, uint32_t chosen,
                           tls_problem *problem)
{
    for (size_t i = 0; i < files->n_pairs; i++)
        if ((chosen >> i & 1) != 0 && !use_identity(context, &all[i], &files->pairs[i], problem)) return false;
    return true;
}

static bool carries(const tls_identity *identity, const char *name)
{
    for (int i = 0; i < sk_OPENSSL_STRING_num(identity->names); i++)
        if (strcmp(sk_OPENSSL_STRING_value(identity->names, i), name) == 0) return true;
    return false;
}

/* The first identity of each kind of key among `candidates`: a context holds one of each, and the client decides. */
static uint32_t one_of_each_kind(const tls_identity *all, size_t n, uint32_t candidates)
{
    uint32_t chosen = 0;
    for (size_t i = 0; i < n; i++) {
        bool taken = (candidates >> i & 1) == 0;
        for (size_t k = 0; k < i && !taken; k++)
            taken = (chosen >> k & 1) != 0 && EVP_PKEY_get_base_id(all[k].key) == EVP_PKEY_get_base_id(all[i].key);
        if (!taken) chosen |= 1u << i;
    }
    return chosen;
}

static uint32_t chosen_for(const tls_identity *all, size_t n, const char *name)
{
    uint32_t candidates = 0;
    for (size_t i = 0; i < n; i++)
        if (carries(&all[i], name)) candidates |= 1u << i;
    return one_of_each_kind(all, n, candidates);
}

/* The first identity, and those of other kinds that share a name with it. */
static uint32_t chosen_by_default(const tls_identity *all, size_t n)
{
    uint32_t candidates = 1;
    for (size_t i = 1; i < n; i++)
        for (int k = 0; k < sk_OPENSSL_STRING_num(all[0].names); k++)
            if (carries(&all[i], sk_OPENSSL_STRING_value(all[0].names, k))) candidates |= 1u << i;
    return one_of_each_kind(all, n, candidates);
}

static int by_name(const void *one, const void *other)
{
    return strcmp(((const named *)one)->name, ((const named *)other)->name);
}

/* All names of all identities, each once, sorted. */
static bool collect_names(settings *own, const tls_identity *all, size_t n)
{
    size_t most = 0, kept = 0;
    for (size_t i = 0; i < n; i++) most += (size_t)sk_OPENSSL_STRING_num(all[i].names);
    own->names = calloc(most + 1, sizeof *own->names);
    if (own->names == NULL) return false;
    for (size_t i = 0; i < n; i++)
        for (int k = 0; k < sk_OPENSSL_STRING_num(all[i].names); k++) {
            char *name = strdup(sk_OPENSSL_STRING_value(all[i].names, k));
            if (name == NULL) return false;
            own->names[own->n_names++] = (named){.name = name, .chosen = chosen_for(all, n, name)};
        }
    qsort(own->names, own->n_names, sizeof *own->names, by_name);
    for (size_t i = 0; i < own->n_names; i++)
        if (kept > 0 && strcmp(own->names[kept - 1].name, own->names[i].name) == 0)
            free(own->names[i].name);
        else
            own->names[kept++] = own->names[i];
    own->n_names = kept;
    return true;
}

/* The context for a name as a certificate has it; NULL when none has. */
static const named *find_name(const settings *own, const char *name)
{
    named wanted = {.name = (char *)name};
    return own->n_names > 0 ? bsearch(&wanted, own->names, own->n_names, sizeof wanted, by_name) : NULL;
}

/* RFC 6066 3, RFC 9525 6.3: the name itself, or a wildcard that stands for its first label. A name that nobody has
 * gets the first certificate: to tell who may be served is not TLS's. */
static int choose_name(SSL *ssl, int *alert, void *argument)
{
    (void)alert;
    const settings *own = argument;
    const char *asked = SSL_get_servername(ssl, TLSEXT_NAMETYPE_host_name);
    size_t len = asked != NULL ? strlen(asked) : 0;
    if (len > 0 && asked[len - 1] == '.') len--;
    if (len == 0 || len > NAME_MAX_LEN) return SSL_TLSEXT_ERR_NOACK;
    char name[NAME_MAX_LEN + 1];
    for (size_t i = 0; i < len; i++) name[i] = (char)tolower((unsigned char)asked[i]);
    name[len] = '\0';
    const named *found = find_name(own, name);
    char *dot = found == NULL ? strchr(name, '.') : NULL;
    if (dot != NULL && dot > name) {
        dot[-1] = '*'; /* in the place of the first label's last letter */
        found = find_name(own, dot - 1);
    }
    if (found == NULL) return SSL_TLSEXT_ERR_NOACK;
    if (found->context != NULL && SSL_set_SSL_CTX(ssl, found->context) == NULL) return SSL_TLSEXT_ERR_ALERT_FATAL;
    return SSL_TLSEXT_ERR_OK;
}

/* -- who may be a client ------------------------------------------------------------------------------------------- */

/* What decides who is trusted, as one digest. */
typedef struct {
    EVP_MD_CTX *hash;
    bool fine;
} summary;

static void sum(summary *s, const unsigned char *bytes, size_t len)
{
    s->fine = s->fine && EVP_DigestUpdate(s->hash, bytes, len) == 1;
}

static bool trust_authorities(SSL_CTX *context, const tls_files *files, STACK_OF(X509) *all, bool server, summary *s)
{
    X509_STORE *store = SSL_CTX_get_cert_store(context);
    settings *own = settings_of(context);
    unsigned char one[EVP_MAX_MD_SIZE];
    unsigned len = 0;
    int64_t since = 0, first = INT64_MAX;
    for (int i = 0; i < sk_X509_num(all); i++) {
        X509 *certificate = sk_X509_value(all, i);
        tls_certificate_facts facts;
        if (X509_STORE_add_cert(store, certificate) != 1 || X509_digest(certificate, EVP_sha256(), one, &len) != 1 ||
            (server && SSL_CTX_add_client_CA(context, certificate) != 1))
            return false;
        sum(s, one, len);
        if (tls_certificate_read(certificate, &facts) && facts.not_after < first) {
            since = facts.not_before;
            first = facts.not_after;
        }
    }
    return !server || note_date(own, TLS_FILE_CLIENT_CA, files->ca, since, first);
}

static bool use_crls(SSL_CTX *context, const tls_files *files, STACK_OF(X509) *authorities, summary *s,
                     tls_problem *problem)
{
    STACK_OF(X509_CRL) *all = tls_read_crls(files->crl, authorities, problem);
    if (all == NULL) return false;
    X509_STORE *store = SSL_CTX_get_cert_store(context);
    unsigned char one[EVP_MAX_MD_SIZE];
    unsigned len = 0;
    int64_t since = 0, first = INT64_MAX, until;
    bool done = true;
    for (int i = 0; done && i < sk_X509_CRL_num(all); i++) {
        X509_CRL *crl = sk_X509_CRL_value(all, i);
        done = X509_STORE_add_crl(store, crl) == 1 && X509_CRL_digest(crl, EVP_sha256(), one, &len) == 1;
        sum(s, one, len);
        const ASN1_TIME *next = X509_CRL_get0_nextUpdate(crl);
        if (next != NULL && tls_seconds(next, &until) && until < first) {
            first = until;
            if (!tls_seconds(X509_CRL_get0_lastUpdate(crl), &since)) since = 0;
        }
    }
    done = done && X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK | X509_V_FLAG_CRL_CHECK_ALL) == 1 &&
           (first == INT64_MAX || note_date(settings_of(context), TLS_FILE_CLIENT_CRL, files->crl, since, first));
    if (!done) tls_wrong(problem, "CRL file %s cannot be used (%s)", files->crl, tls_last_words());
    sk_X509_CRL_pop_free(all, X509_CRL_free);
    return done;
}

static bool has_root(STACK_OF(X509) *all)
{
    for (int i = 0; i < sk_X509_num(all); i++)
        if (X509_check_issued(sk_X509_value(all, i), sk_X509_value(all, i)) == X509_V_OK) return true;
    return false;
}

/* Trust the certificates of a file. A server names them to clients, and binds its sessions to them: a ticket made under
 * another CA file or other revocation lists, or where a certificate was optional, must not be resumed, because the
 * client's certificate is not looked at again. */
static bool use_authority(SSL_CTX *context, const tls_files *files, bool server, tls_problem *problem)
{
    STACK_OF(X509) *all = tls_read_certificates("CA file", files->ca, problem);
    if (all == NULL) return false;
    settings *own = settings_of(context);
    summary s = {.hash = EVP_MD_CTX_new(), .fine = true};
    unsigned char mode[2] = {files->client_required, (unsigned char)files->client_depth};
    s.fine = s.hash != NULL && EVP_DigestInit_ex(s.hash, EVP_sha256(), NULL) == 1;
    sum(&s, mode, sizeof mode);
    bool told = false, done = trust_authorities(context, files, all, server, &s);
    if (done && server && !has_root(all)) {
        done = tls_wrong(problem, "CA file %s holds no root (a certificate that signed itself): add the root of the issuers in it",
                     files->ca);
        told = true;
    }
    if (done && server && files->crl != NULL && !use_crls(context, files, all, &s, problem)) {
        done = false;
        told = true;
    }
    if (done && server) {
        done = s.fine && EVP_DigestFinal_ex(s.hash, own->trust, NULL) == 1 &&
               SSL_CTX_set_session_id_context(context, own->trust, TLS_TRUST) == 1;
        own->trusting = true;
        own->required = files->client_required;
        SSL_CTX_set_verify(
            context, SSL_VERIFY_PEER | (files->client_required ? SSL_VERIFY_FAIL_IF_NO_PEER_CERT : 0), NULL);
    }
    if (!done && !told) tls_wrong(problem, "CA file %s cannot be used (%s)", files->ca, tls_last_words());
    EVP_MD_CTX_free(s.hash);
    sk_X509_pop_free(all, X509_free);
    return done;
}

bool tls_context_same_trust(SSL_CTX *one, SSL_CTX *other)
{
    const settings *a = settings_of(one), *b = settings_of(other);
    return a->trusting == b->trusting && memcmp(a->trust, b->trust, sizeof a->trust) == 0;
}

bool tls_context_trusts(SSL_CTX *context, X509 *certificate, STACK_OF(X509) *chain)
{
    const settings *own = settings_of(context);
    if (certificate == NULL) return !own->required;
    if (!own->trusting) return false;
    X509_STORE_CTX *check = X509_STORE_CTX_new();
    bool trusted = check != NULL &&
                   X509_STORE_CTX_init(check, SSL_CTX_get_cert_store(context), certificate, chain) == 1 &&
                   X509_STORE_CTX_set_default(check, "ssl_client") == 1;
    if (trusted) {
        X509_STORE_CTX_set_depth(check, SSL_CTX_get_verify_depth(context));
        X509_VERIFY_PARAM_set_auth_level(X509_STORE_CTX_get0_param(check), SSL_CTX_get_security_level(context));
        trusted = X509_verify_cert(check) == 1;
    }
    X509_STORE_CTX_free(check);
    ERR_clear_error();
    return trusted;
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
        int len = EVP_CIPHER_get_iv_length(own->ticket_cipher);
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
        EVP_CipherInit_ex2(cipher, own->ticket_cipher, key + 16, iv, encrypt, NULL) != 1)
        return -1;
    return i == 0 ? 1 : 2;
}

bool tls_context_tickets(SSL_CTX *context, const unsigned char (*keys)[TLS_TICKET_KEY], size_t n)
{
    settings *own = settings_of(context);
    if (own == NULL || n > TLS_TICKET_KEYS_MAX || own->keys_from_file) return false;
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

bool tls_context_tickets_from_file(SSL_CTX *context)
{
    return settings_of(context)->keys_from_file;
}

static bool use_ticket_file(SSL_CTX *context, const char *path, tls_problem *problem)
{
    unsigned char keys[TLS_TICKET_KEYS_MAX][TLS_TICKET_KEY];
    size_t n;
    bool done = tls_read_ticket_keys(path, keys, &n, problem) &&
                tls_context_tickets(context, (const unsigned char(*)[TLS_TICKET_KEY])keys, n);
    settings_of(context)->keys_from_file = done;
    explicit_bzero(keys, sizeof keys);
    return done;
}

/* -- contexts ------------------------------------------------------------------------------------------------------ */

/* A context with everything that does not depend on files; its settings are new, or those of another one. */
static SSL_CTX *new_context(const tls_files *files, bool server, settings *shared, tls_problem *problem)
{
    pthread_once(&index_once, make_index);
    ERR_clear_error();
    SSL_CTX *context = SSL_CTX_new(server ? TLS_server_method() : TLS_client_method());
    settings *own = shared != NULL ? shared : calloc(1, sizeof *own);
    if (context == NULL || own == NULL || settings_index < 0 || shared_index < 0 ||
        SSL_CTX_set_ex_data(context, shared != NULL ? shared_index : settings_index, own) != 1) {
        tls_wrong(problem, "no memory for a TLS context");
        if (shared == NULL) free(own);
        SSL_CTX_free(context);
        return NULL;
    }
    SSL_CTX_set_security_level(context, 2); /* 112 bits: RSA from 2048 bits, no SHA-1 (NIST SP 800-57) */
    SSL_CTX_set_options(context, SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_TICKET);
    SSL_CTX_set_mode(context, SSL_MODE_NO_AUTO_CHAIN); /* only what is in the file is sent */
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_verify_depth(context, server && files->client_depth > 0 ? files->client_depth - 1 : CHAIN_MAX);
    SSL_CTX_set_max_cert_list(context, PEER_CHAIN_BYTES);
    if (SSL_CTX_set_min_proto_version(context, files->tls13_only ? TLS1_3_VERSION : TLS1_2_VERSION) == 1 &&
        SSL_CTX_set_cipher_list(context, SUITES_12) == 1 && SSL_CTX_set_ciphersuites(context, SUITES_13) == 1 &&
        SSL_CTX_set1_groups_list(context, GROUPS) == 1)
        return context;
    tls_wrong(problem, "this OpenSSL cannot be set up for TLS (%s)", tls_last_words());
    SSL_CTX_free(context);
    return NULL;
}

static bool keep_alpn(settings *own, const tls_files *files, tls_problem *problem)
{
    if (files->alpn_len == 0) return true;
    own->alpn = malloc(files->alpn_len);
    if (own->alpn == NULL) return tls_wrong(problem, "no memory for a TLS context");
    memcpy(own->alpn, files->alpn, files->alpn_len);
    own->alpn_len = files->alpn_len;
    return true;
}

/* What every context of a listener has: a connection may be moved from one to another. */
static void dress_server(SSL_CTX *context, settings *own)
{
    /* AES first for machines that have it in hardware, ChaCha for clients that put it first because they have not. */
    SSL_CTX_set_options(context, SSL_OP_CIPHER_SERVER_PREFERENCE | SSL_OP_PRIORITIZE_CHACHA);
    SSL_CTX_set_timeout(context, TICKET_SECONDS);
    SSL_CTX_set_num_tickets(context, 0);
    SSL_CTX_set_session_id_context(context, (const unsigned char *)"no client CA", 12);
    if (own->alpn_len > 0) SSL_CTX_set_alpn_select_cb(context, choose_alpn, own);
}

/* The context for the identities that are chosen, made when it is needed first; NULL with a problem. */
static SSL_CTX *other_context(SSL_CTX *first, const tls_files *files, const tls_identity *all, uint32_t chosen,
                              tls_problem *problem)
{
    settings *own = settings_of(first);
    if (own->n_others == sizeof own->others / sizeof own->others[0]) {
        tls_wrong(problem, "the certificates of this listener overlap in too many ways; give each its own names");
        return NULL;
    }
    SSL_CTX *context = new_context(files, true, own, problem);
    if (context == NULL) return NULL;
    dress_server(context, own);
    STACK_OF(X509_NAME) *names = SSL_dup_CA_list(SSL_CTX_get_client_CA_list(first));
    SSL_CTX_set_client_CA_list(context, names);
    SSL_CTX_set1_cert_store(context, SSL_CTX_get_cert_store(first));
    if (own->trusting) {
        SSL_CTX_set_session_id_context(context, own->trust, TLS_TRUST);
        SSL_CTX_set_verify(context, SSL_CTX_get_verify_mode(first), NULL);
    }
    if (!use_identities(context, all, files, chosen, problem)) {
        SSL_CTX_free(context);
        return NULL;
    }
    own->others[own->n_others++] = context;
    return context;
}

/* The context of each name, where it is not the first one. */
static bool spread_names(SSL_CTX *first, const tls_files *files, const tls_identity *all, uint32_t usual,
                         tls_problem *problem)
{
    settings *own = settings_of(first);
    for (size_t i = 0; i < own->n_names; i++) {
        named *name = &own->names[i];
        for (size_t k = 0; k < i && name->context == NULL; k++)
            if (own->names[k].chosen == name->chosen) name->context = own->names[k].context;
        if (name->chosen != usual && name->context == NULL)
            name->context = other_context(first, files, all, name->chosen, problem);
        if (name->chosen != usual && name->context == NULL) return false;
    }
    return true;
}

/* Read every certificate, then give each name its own. */
static bool use_own(SSL_CTX *context, const tls_files *files, tls_problem *problem)
{
    settings *own = settings_of(context);
    tls_identity all[TLS_IDENTITIES_MAX];
    size_t n = 0;
    bool done = true;
    while (done && n < files->n_pairs) {
        done = tls_identity_read(&all[n], files->pairs[n].certificate, files->pairs[n].key, true, problem);
        n += done;
    }
    for (size_t i = 0; done && i < n; i++) {
        tls_certificate_facts facts;
        if (!tls_certificate_read(all[i].leaf, &facts) ||
            !note_date(own, TLS_FILE_SERVER, files->pairs[i].certificate, facts.not_before, facts.not_after))
            done = tls_wrong(problem, "no memory for a TLS context");
    }
    if (done) {
        uint32_t usual = chosen_by_default(all, n);
        X509_up_ref(all[0].leaf);
        own->own = all[0].leaf;
        if (!collect_names(own, all, n))
            done = tls_wrong(problem, "no memory for a TLS context");
        else
            done = use_identities(context, all, files, usual, problem) && spread_names(context, files, all, usual, problem);
    }
    while (n > 0) tls_identity_clear(&all[--n]);
    return done;
}

SSL_CTX *tls_context_server(const tls_files *files, tls_problem *problem)
{
    if (files->n_pairs == 0 || files->n_pairs > TLS_IDENTITIES_MAX) {
        tls_wrong(problem, "a listener has 1 to %d certificates, not %zu", TLS_IDENTITIES_MAX, files->n_pairs);
        return NULL;
    }
    SSL_CTX *context = new_context(files, true, NULL, problem);
    if (context == NULL) return NULL;
    settings *own = settings_of(context);
    own->ticket_cipher = EVP_CIPHER_fetch(NULL, "AES-256-CBC", NULL);
    if (own->ticket_cipher == NULL) {
        tls_wrong(problem, "this OpenSSL cannot be set up for TLS (%s)", tls_last_words());
    } else if (keep_alpn(own, files, problem)) {
        dress_server(context, own);
        SSL_CTX_set_tlsext_servername_callback(context, choose_name);
        SSL_CTX_set_tlsext_servername_arg(context, own);
        SSL_CTX_set_tlsext_ticket_key_evp_cb(context, ticket_key);
        if ((files->ca == NULL || use_authority(context, files, true, problem)) && use_own(context, files, problem) &&
            (files->tickets == NULL || use_ticket_file(context, files->tickets, problem)))
            return context;
    }
    SSL_CTX_free(context);
    return NULL;
}

SSL_CTX *tls_context_client(const tls_files *files, tls_problem *problem)
{
    SSL_CTX *context = new_context(files, false, NULL, problem);
    if (context == NULL) return NULL;
    settings *own = settings_of(context);
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
    bool done = keep_alpn(own, files, problem);
    if (done && files->ca != NULL)
        done = use_authority(context, files, false, problem);
    else if (done && SSL_CTX_set_default_verify_paths(context) != 1)
        done = tls_wrong(problem, "the system's CA certificates cannot be loaded (%s); name a CA file", tls_last_words());
    if (done && files->n_pairs > 0) {
        tls_identity identity;
        done = tls_identity_read(&identity, files->pairs[0].certificate, files->pairs[0].key, false, problem);
        if (done) {
            done = use_identity(context, &identity, &files->pairs[0], problem);
            X509_up_ref(identity.leaf);
            own->own = identity.leaf;
            tls_identity_clear(&identity);
        }
    }
    if (done && own->alpn_len > 0 && SSL_CTX_set_alpn_protos(context, own->alpn, own->alpn_len) != 0)
        done = tls_wrong(problem, "no memory for a TLS context");
    if (done) return context;
    SSL_CTX_free(context);
    return NULL;
}

/* -- facts --------------------------------------------------------------------------------------------------------- */

X509 *tls_context_certificate(SSL_CTX *context)
{
    return settings_of(context)->own;
}

const tls_file_date *tls_context_dates(SSL_CTX *context, size_t *n)
{
    const settings *own = settings_of(context);
    *n = own->n_dates;
    return own->dates;
}
