/* Keys of session tickets from a file that several nodes share. */
#ifndef ASC_TLS_TICKETS_H
#define ASC_TLS_TICKETS_H

#include <stdbool.h>
#include <stddef.h>

#include "tls_files.h"

enum { TLS_TICKET_KEY = 80, TLS_TICKET_KEYS_MAX = 8, TLS_TICKET_SEED = 32 };

/* A key from 32 random bytes: HKDF-Expand of RFC 5869 2.3 with SHA-256. name 16, AES-256 key 32, HMAC-SHA-256 key 32. */
bool tls_ticket_key(const unsigned char seed[TLS_TICKET_SEED], unsigned char key[TLS_TICKET_KEY]);

/* The keys of a file: lines of 64 hexadecimal digits (a seed each), empty lines, and lines that begin with #. At least
 * one and at most TLS_TICKET_KEYS_MAX. A file that others can read or its group can write is refused: whoever has the
 * keys can read recorded connections of TLS 1.2. False with a problem. The caller wipes the keys. */
bool tls_read_ticket_keys(const char *path, unsigned char (*keys)[TLS_TICKET_KEY], size_t *n, tls_problem *problem);

#endif
