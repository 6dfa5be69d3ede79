/* units: tls.c tls_context.c tls_files.c tls_tickets.c */
/* libs: -lssl -lcrypto */
/* What contexts from files accept, refuse, choose and resume, seen from a client that is plain OpenSSL. */
#include "tls_pair.h"

#include <openssl/pem.h>
#include <unistd.h>

#include "../tls_context.h"

static identity authority, stranger, server_identity, client_identity, stranger_client;
static char folder[] = "/tmp/ascproxy-tls-XXXXXX";
static char server_pem[64], server_key[64], ca_pem[64], stranger_pem[64], client_pem[64], client_key[64];

static void write_pem(char *path, size_t size, const char *name, X509 *certificate, EVP_PKEY *key)
{
    snprintf(path, size, "%s/%s", folder, name);
    FILE *file = fopen(path, "w");
    if (certificate != NULL) PEM_write_X509(file, certificate);
    if (key != NULL) PEM_write_PrivateKey(file, key, NULL, NULL, 0, NULL, NULL);
    fclose(file);
}

static SSL_CTX *serve(tls_files files)
{
    tls_problem problem = {""};
    tls_pair own = {server_pem, server_key};
    files.pairs = &own;
    files.n_pairs = 1;
    SSL_CTX *context = tls_context_server(&files, &problem);
    CHECK_TEXT(problem.sentence, "");
    return context;
}

static SSL_CTX *ask(int version, const char *suites)
{
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_security_level(context, 0);
    SSL_CTX_set_min_proto_version(context, version);
    SSL_CTX_set_max_proto_version(context, version);
    if (suites != NULL && version == TLS1_3_VERSION) CHECK(SSL_CTX_set_ciphersuites(context, suites) == 1);
    if (suites != NULL && version != TLS1_3_VERSION) CHECK(SSL_CTX_set_cipher_list(context, suites) == 1);
    return context;
}

/* What one handshake came to. */
typedef struct {
    char server_says[128], cipher[64], alpn[16];
    bool established, resumed;
    int alert; /* the server sent to the client, 0 none */
    SSL_SESSION *session;
} outcome;

static int last_alert;

static void watch(const SSL *ssl, int where, int value)
{
    (void)ssl;
    if ((where & SSL_CB_READ_ALERT) == SSL_CB_READ_ALERT) last_alert = value & 0xff;
}

static SSL_SESSION *last_session;

static int take_session(SSL *ssl, SSL_SESSION *session)
{
    (void)ssl;
    SSL_SESSION_free(last_session);
    last_session = session;
    return 1;
}

/* `session` is consumed; the new one, if any, is in the outcome for the caller to free. */
static outcome meet(SSL_CTX *client, SSL_CTX *server, SSL_SESSION *session)
{
    outcome seen = {.alert = 0};
    char got[1024];
    tls_output output = {.max = 1 << 20};
    last_alert = 0;
    last_session = NULL;
    SSL_CTX_set_session_cache_mode(client, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
    SSL_CTX_sess_set_new_cb(client, take_session);
    SSL_CTX_set_info_callback(client, watch);
    tls_conn *connection = tls_new_server(server, &output);
    raw r = raw_client(client);
    if (session != NULL) SSL_set_session(r.ssl, session);
    SSL_SESSION_free(session);
    SSL_do_handshake(r.ssl);
    raw_exchange(&r, connection, &output, got, sizeof got);
    seen.established = tls_established(connection) && SSL_is_init_finished(r.ssl);
    seen.resumed = tls_resumed(connection);
    seen.alert = last_alert;
    snprintf(seen.server_says, sizeof seen.server_says, "%s", tls_error(connection));
    snprintf(seen.alpn, sizeof seen.alpn, "%s", tls_alpn(connection));
    if (seen.established) snprintf(seen.cipher, sizeof seen.cipher, "%s", SSL_get_cipher_name(r.ssl));
    if (SSL_version(r.ssl) <= TLS1_2_VERSION && seen.established) { /* a renewed ticket is not told to take_session */
        SSL_SESSION_free(last_session);
        last_session = SSL_get1_session(r.ssl);
    }
    seen.session = last_session;
    SSL_set_shutdown(r.ssl, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN); /* or freeing it would end the session */
    SSL_free(r.ssl);
    tls_free(connection);
    free(output.bytes);
    return seen;
}

static outcome meet_once(SSL_CTX *client, SSL_CTX *server)
{
    outcome seen = meet(client, server, NULL);
    SSL_SESSION_free(seen.session);
    seen.session = NULL;
    SSL_CTX_free(client);
    return seen;
}

/* -- versions and suites -------------------------------------------------------------------------------------- */

static void suites(void)
{
    static const struct {
        int version;
        const char *offered, *chosen; /* NULL: refused */
    } cases[] = {
        {TLS1_2_VERSION, NULL, "ECDHE-ECDSA-AES128-GCM-SHA256"},
        {TLS1_2_VERSION, "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-AES128-GCM-SHA256",
         "ECDHE-ECDSA-AES128-GCM-SHA256"},
        {TLS1_2_VERSION, "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-AES256-GCM-SHA384"},
        {TLS1_2_VERSION, "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-ECDSA-AES128-GCM-SHA256",
         "ECDHE-ECDSA-CHACHA20-POLY1305"},
        {TLS1_2_VERSION, "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-CHACHA20-POLY1305",
         "ECDHE-ECDSA-AES128-GCM-SHA256"},
        {TLS1_2_VERSION, "ECDHE-ECDSA-AES128-SHA:ECDHE-ECDSA-AES128-SHA256", NULL},
        {TLS1_2_VERSION, "ECDHE-ECDSA-AES128-CCM", NULL},
        {TLS1_2_VERSION, "AES128-GCM-SHA256:DHE-RSA-AES128-GCM-SHA256", NULL},
        {TLS1_3_VERSION, NULL, "TLS_AES_128_GCM_SHA256"},
        {TLS1_3_VERSION, "TLS_AES_256_GCM_SHA384", "TLS_AES_256_GCM_SHA384"},
        {TLS1_3_VERSION, "TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256"},
        {TLS1_3_VERSION, "TLS_AES_128_CCM_SHA256", NULL},
    };
    SSL_CTX *server = serve((tls_files){0});
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        outcome seen = meet_once(ask(cases[i].version, cases[i].offered), server);
        CHECK_TEXT(seen.cipher, cases[i].chosen != NULL ? cases[i].chosen : "");
        CHECK_TEXT(seen.server_says,
                   cases[i].chosen != NULL ? "" : "the peer offers no cipher suite that is accepted here");
        CHECK(seen.alert == (cases[i].chosen != NULL ? 0 : SSL_AD_HANDSHAKE_FAILURE));
    }
    for (int version = TLS1_VERSION; version <= TLS1_1_VERSION; version++) {
        outcome seen = meet_once(ask(version, "ALL:@SECLEVEL=0"), server);
        CHECK(!seen.established && seen.alert == SSL_AD_PROTOCOL_VERSION);
        CHECK_TEXT(seen.server_says, "the peer speaks no TLS version that is accepted here");
    }
    SSL_CTX_free(server);
    server = serve((tls_files){.tls13_only = true});
    CHECK(meet_once(ask(TLS1_2_VERSION, NULL), server).alert == SSL_AD_PROTOCOL_VERSION);
    CHECK(meet_once(ask(TLS1_3_VERSION, NULL), server).established);
    SSL_CTX_free(server);
}

static void groups(void)
{
    static const char *const accepted[] = {"X25519", "P-256", "P-384"};
    SSL_CTX *server = serve((tls_files){0});
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        for (size_t i = 0; i < 3; i++) {
            SSL_CTX *client = ask(version, NULL);
            CHECK(SSL_CTX_set1_groups_list(client, accepted[i]) == 1);
            outcome seen = meet_once(client, server);
            /* An ECDSA key on P-256 needs the client to know that curve in TLS 1.2 (RFC 8422 5.1). */
            CHECK(seen.established == (version == TLS1_3_VERSION || i == 1));
        }
        SSL_CTX *client = ask(version, NULL);
        CHECK(SSL_CTX_set1_groups_list(client, "P-521:X448") == 1);
        outcome seen = meet_once(client, server);
        CHECK(!seen.established && seen.alert == SSL_AD_HANDSHAKE_FAILURE);
    }
    SSL_CTX_free(server);
}

/* -- ALPN ----------------------------------------------------------------------------------------------------- */

#define NAMES(text) (const unsigned char *)(text), sizeof(text) - 1

static void check_alpn(const unsigned char *ours, unsigned ours_len, const unsigned char *theirs, unsigned theirs_len,
                       const char *chosen)
{
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        SSL_CTX *server = serve((tls_files){.alpn = ours, .alpn_len = ours_len}), *client = ask(version, NULL);
        if (theirs_len > 0) SSL_CTX_set_alpn_protos(client, theirs, theirs_len);
        outcome seen = meet_once(client, server);
        CHECK(seen.established == (chosen != NULL));
        CHECK_TEXT(seen.alpn, chosen != NULL ? chosen : "");
        CHECK(seen.alert == (chosen != NULL ? 0 : 120));
        SSL_CTX_free(server);
    }
}

static void alpn(void)
{
    check_alpn(NAMES("\x02h2\x08http/1.1"), NAMES("\x08http/1.1\x02h2"), "h2"); /* our order */
    check_alpn(NAMES("\x02h2\x08http/1.1"), NAMES("\003foo\x08http/1.1"), "http/1.1");
    check_alpn(NAMES("\x08http/1.1"), NAMES("\x02h2"), NULL);
    check_alpn(NAMES("\x08http/1.1"), NAMES("\x08http/1.0\x07http/1.\x01h"), NULL);
    check_alpn(NAMES("\x08http/1.1"), NAMES(""), "");
    check_alpn(NAMES(""), NAMES("\x02h2"), "");
    check_alpn(NAMES("\x0cmy-protocol1"), NAMES("\x02h2\x0cmy-protocol1"), "my-protocol1");
}

/* -- client certificates -------------------------------------------------------------------------------------- */

static SSL_CTX *ask_as(int version, const identity *who)
{
    SSL_CTX *client = ask(version, NULL);
    if (who != NULL) {
        SSL_CTX_use_certificate(client, who->certificate);
        SSL_CTX_use_PrivateKey(client, who->key);
    }
    return client;
}

static void client_certificates(int version)
{
    SSL_CTX *required = serve((tls_files){.ca = ca_pem, .client_required = true});
    SSL_CTX *optional = serve((tls_files){.ca = ca_pem});
    CHECK(meet_once(ask_as(version, &client_identity), required).established);
    CHECK(meet_once(ask_as(version, &client_identity), optional).established);
    outcome seen = meet_once(ask_as(version, NULL), required);
    CHECK(seen.alert == (version == TLS1_3_VERSION ? SSL_AD_CERTIFICATE_REQUIRED : SSL_AD_HANDSHAKE_FAILURE));
    CHECK_TEXT(seen.server_says, "the peer sent no certificate, and one is required");
    CHECK(meet_once(ask_as(version, NULL), optional).established);
    SSL_CTX *const contexts[] = {required, optional};
    for (size_t i = 0; i < 2; i++) { /* a wrong certificate is worse than none */
        seen = meet_once(ask_as(version, &stranger_client), contexts[i]);
        CHECK(seen.alert == SSL_AD_UNKNOWN_CA);
        CHECK_TEXT(seen.server_says, "certificate verify failed: unable to get local issuer certificate");
    }
    SSL_CTX_free(required);
    SSL_CTX_free(optional);
}

/* -- tickets -------------------------------------------------------------------------------------------------- */

static unsigned char keys[4][TLS_TICKET_KEY];

/* Two servers with these keys (n of them, from `first`); the client takes the session of one to the other. */
static outcome carry(int version, tls_files files, size_t first, size_t n, tls_files other_files, size_t other_first,
                     size_t other_n)
{
    SSL_CTX *one = serve(files), *other = serve(other_files);
    SSL_CTX *client = ask_as(version, &client_identity);
    if (n > 0) CHECK(tls_context_tickets(one, (const unsigned char(*)[TLS_TICKET_KEY])keys + first, n));
    if (other_n > 0)
        CHECK(tls_context_tickets(other, (const unsigned char(*)[TLS_TICKET_KEY])keys + other_first, other_n));
    outcome before = meet(client, one, NULL);
    CHECK(before.established && !before.resumed);
    CHECK((before.session != NULL && SSL_SESSION_has_ticket(before.session)) == (n > 0));
    outcome after = meet(client, other, before.session);
    CHECK(after.established);
    SSL_CTX_free(client);
    SSL_CTX_free(one);
    SSL_CTX_free(other);
    return after;
}

static bool resumes(outcome seen)
{
    SSL_SESSION_free(seen.session);
    return seen.resumed;
}

static void tickets(int version)
{
    const tls_files none = {0}, mutual = {.ca = ca_pem, .client_required = true}, optional = {.ca = ca_pem},
                    stranger_ca = {.ca = stranger_pem};
    for (size_t i = 0; i < sizeof keys; i++) ((unsigned char *)keys)[i] = (unsigned char)(i * 167 + i / 80);
    CHECK(resumes(carry(version, none, 0, 1, none, 0, 1)));
    CHECK(resumes(carry(version, none, 0, 3, none, 0, 3)));
    CHECK(!resumes(carry(version, none, 0, 0, none, 0, 0))); /* without keys nothing is resumed */
    CHECK(!resumes(carry(version, none, 0, 1, none, 0, 0)));
    CHECK(!resumes(carry(version, none, 0, 1, none, 1, 1)));
    CHECK(!resumes(carry(version, none, 0, 1, none, 1, 3)));

    outcome renewed = carry(version, none, 1, 1, none, 0, 2); /* the key stands second now */
    CHECK(renewed.resumed && renewed.session != NULL);
    SSL_CTX *only_first = serve(none), *client = ask_as(version, &client_identity);
    tls_context_tickets(only_first, (const unsigned char(*)[TLS_TICKET_KEY])keys, 1);
    CHECK(resumes(meet(client, only_first, renewed.session))); /* and what was renewed is under the first */
    SSL_CTX_free(only_first);
    SSL_CTX_free(client);

    /* Who was let in there is not let in here: the certificate would not be looked at again. */
    CHECK(resumes(carry(version, mutual, 0, 1, mutual, 0, 1)));
    CHECK(!resumes(carry(version, optional, 0, 1, mutual, 0, 1)));
    CHECK(!resumes(carry(version, none, 0, 1, mutual, 0, 1)));
    CHECK(!resumes(carry(version, none, 0, 1, optional, 0, 1)));
    SSL_CTX *old = serve(mutual), *changed = serve(stranger_ca);
    client = ask_as(version, &client_identity);
    tls_context_tickets(old, (const unsigned char(*)[TLS_TICKET_KEY])keys, 1);
    tls_context_tickets(changed, (const unsigned char(*)[TLS_TICKET_KEY])keys, 1);
    outcome seen = meet(client, old, NULL);
    seen = meet(client, changed, seen.session);
    CHECK(!seen.established && !seen.resumed && seen.alert == SSL_AD_UNKNOWN_CA);
    SSL_SESSION_free(seen.session);
    SSL_CTX_free(old);
    SSL_CTX_free(changed);
    SSL_CTX_free(client);
}

static void tickets_can_be_taken_away(int version)
{
    SSL_CTX *server = serve((tls_files){0}), *client = ask(version, NULL);
    CHECK(!tls_context_tickets(server, (const unsigned char(*)[TLS_TICKET_KEY])keys, TLS_TICKET_KEYS_MAX + 1));
    tls_context_tickets(server, (const unsigned char(*)[TLS_TICKET_KEY])keys, 1);
    outcome seen = meet(client, server, NULL);
    tls_context_tickets(server, NULL, 0);
    seen = meet(client, server, seen.session);
    CHECK(seen.established && !seen.resumed);
    CHECK(seen.session == NULL || !SSL_SESSION_has_ticket(seen.session));
    SSL_SESSION_free(seen.session);
    SSL_CTX_free(server);
    SSL_CTX_free(client);
}

/* -- clients, and lives --------------------------------------------------------------------------------------- */

static void client_contexts(int version)
{
    tls_problem problem = {""};
    const tls_pair own = {client_pem, client_key};
    const tls_files trusting = {.ca = ca_pem, .pairs = &own, .n_pairs = 1, .alpn = NAMES("\x08http/1.1")};
    const tls_files system = {.alpn = NAMES("\x08http/1.1")};
    SSL_CTX *server = serve((tls_files){.ca = ca_pem, .client_required = true, .alpn = NAMES("\x08http/1.1")});
    SSL_CTX_set_max_proto_version(server, version);
    SSL_CTX *client = tls_context_client(&trusting, &problem);
    pair p = {0};
    start(&p, client, server, "gateway.example");
    /* A connection keeps its context, callbacks and keys included. */
    SSL_CTX_free(client);
    SSL_CTX_free(server);
    pump(&p);
    CHECK_TEXT(tls_error(p.client), "");
    check_talks(&p);
    CHECK_TEXT(tls_alpn(p.client), "http/1.1");
    part(&p);

    server = serve((tls_files){0});
    client = tls_context_client(&system, &problem);
    p = (pair){0};
    start(&p, client, server, "gateway.example");
    pump(&p);
    CHECK_TEXT(tls_error(p.client), "certificate verify failed: unable to get local issuer certificate");
    part(&p);
    SSL_CTX_free(client);
    SSL_CTX_free(server);
}

int main(void)
{
    if (mkdtemp(folder) == NULL) return 2;
    authority = make("test authority", NULL, NULL);
    stranger = make("other authority", NULL, NULL);
    server_identity = make("server", "DNS:gateway.example", &authority);
    client_identity = make("client", "DNS:client.example", &authority);
    stranger_client = make("client", "DNS:client.example", &stranger);
    write_pem(server_pem, sizeof server_pem, "server.pem", server_identity.certificate, NULL);
    write_pem(server_key, sizeof server_key, "server.key", NULL, server_identity.key);
    write_pem(ca_pem, sizeof ca_pem, "ca.pem", authority.certificate, NULL);
    write_pem(stranger_pem, sizeof stranger_pem, "stranger.pem", stranger.certificate, NULL);
    write_pem(client_pem, sizeof client_pem, "client.pem", client_identity.certificate, NULL);
    write_pem(client_key, sizeof client_key, "client.key", NULL, client_identity.key);
    suites();
    groups();
    alpn();
    for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
        client_certificates(version);
        tickets(version);
        tickets_can_be_taken_away(version);
        client_contexts(version);
    }
    char *const files[] = {server_pem, server_key, ca_pem, stranger_pem, client_pem, client_key};
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) unlink(files[i]);
    rmdir(folder);
    drop(&authority);
    drop(&stranger);
    drop(&server_identity);
    drop(&client_identity);
    drop(&stranger_client);
    if (failures > 0) fprintf(stderr, "%d checks failed\n", failures);
    return failures > 0;
}
