/* Keys of session tickets from a file. See tls_tickets.h for the contract. */
#include "tls_tickets.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILE_MAX = 16384 };

bool tls_ticket_key(const unsigned char seed[TLS_TICKET_SEED], unsigned char key[TLS_TICKET_KEY])
{
    static const char use[] = "ascproxy session ticket key";
    int mode = EVP_KDF_HKDF_MODE_EXPAND_ONLY;
    OSSL_PARAM parameters[] = {
        OSSL_PARAM_construct_int(OSSL_KDF_PARAM_MODE, &mode),
        OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, "SHA256", 0),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, (void *)seed, TLS_TICKET_SEED),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, (void *)use, sizeof use - 1),
        OSSL_PARAM_construct_end(),
    };
    EVP_KDF *kdf = EVP_KDF_fetch(NULL, "HKDF", NULL);
    EVP_KDF_CTX *context = kdf != NULL ? EVP_KDF_CTX_new(kdf) : NULL;
    bool done = context != NULL && EVP_KDF_derive(context, key, TLS_TICKET_KEY, parameters) == 1;
    EVP_KDF_CTX_free(context);
    EVP_KDF_free(kdf);
    return done;
}

/* The whole file into bytes[0..FILE_MAX); -1 with a problem. */
static ssize_t read_whole(const char *path, char *bytes, tls_problem *problem)
{
    struct stat facts;
    ssize_t len = 0, got;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &facts) != 0) {
        tls_wrong(problem, "cannot read ticket key file %s: %s; check the path and that this user may read it", path,
                  strerror(errno));
        len = -1;
    } else if (!S_ISREG(facts.st_mode) || facts.st_size >= FILE_MAX) {
        tls_wrong(problem, "ticket key file %s is no regular file of less than %d bytes", path, FILE_MAX);
        len = -1;
    } else if ((facts.st_mode & (S_IRWXO | S_IWGRP)) != 0) {
        tls_wrong(problem, "ticket key file %s can be read by others or written by its group (mode %04o), and whoever has "
                           "these keys can read recorded connections: chmod 600 it and make new keys",
                  path, facts.st_mode & 07777);
        len = -1;
    } else {
        while (len < FILE_MAX && (got = read(fd, bytes + len, (size_t)(FILE_MAX - len))) > 0) len += got;
    }
    if (fd >= 0) close(fd);
    return len;
}

static int digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

static bool decode(const char *line, size_t len, unsigned char seed[TLS_TICKET_SEED])
{
    if (len != 2 * TLS_TICKET_SEED) return false;
    for (size_t i = 0; i < len; i += 2) {
        int high = digit(line[i]), low = digit(line[i + 1]);
        if (high < 0 || low < 0) return false;
        seed[i / 2] = (unsigned char)(high << 4 | low);
    }
    return true;
}

static bool parse(const char *path, const char *bytes, size_t len, unsigned char (*keys)[TLS_TICKET_KEY], size_t *n,
                  tls_problem *problem)
{
    unsigned number = 0;
    for (size_t at = 0; at < len;) {
        const char *line = bytes + at, *end = memchr(line, '\n', len - at);
        size_t size = end != NULL ? (size_t)(end - line) : len - at;
        at += size + 1;
        number++;
        while (size > 0 && isspace((unsigned char)line[size - 1])) size--;
        if (size == 0 || line[0] == '#') continue;
        if (*n == TLS_TICKET_KEYS_MAX)
            return tls_wrong(problem, "ticket key file %s holds more than %d keys; remove the oldest", path,
                             TLS_TICKET_KEYS_MAX);
        unsigned char seed[TLS_TICKET_SEED];
        bool done = decode(line, size, seed);
        if (!done)
            tls_wrong(problem, "ticket key file %s: line %u is no key: write 64 hexadecimal digits, as `openssl rand -hex 32` "
                               "prints them", path, number);
        else if (!(done = tls_ticket_key(seed, keys[*n])))
            tls_wrong(problem, "ticket key file %s: this OpenSSL has no HKDF", path);
        explicit_bzero(seed, sizeof seed);
        if (!done) return false;
        for (size_t i = 0; i < *n; i++)
            if (memcmp(keys[i], keys[*n], TLS_TICKET_KEY) == 0)
                return tls_wrong(problem, "ticket key file %s: line %u repeats a key; remove it", path, number);
        ++*n;
    }
    if (*n > 0) return true;
    return tls_wrong(problem, "ticket key file %s holds no key; make one with `openssl rand -hex 32`", path);
}

bool tls_read_ticket_keys(const char *path, unsigned char (*keys)[TLS_TICKET_KEY], size_t *n, tls_problem *problem)
{
    char bytes[FILE_MAX];
    *n = 0;
    ssize_t len = read_whole(path, bytes, problem);
    bool done = len >= 0 && parse(path, bytes, (size_t)len, keys, n, problem);
    explicit_bzero(bytes, sizeof bytes);
    return done;
}
