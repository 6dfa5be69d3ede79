/* Memory for plaintext credentials (DESIGN D14): never swapped where the system allows it, in no core dump, gone after
 * fork, wiped when freed. Sizes and places are kept outside, so that a guard page is all that borders a value. */
#ifndef ASC_SECRET_H
#define ASC_SECRET_H

#include <stdbool.h>
#include <stddef.h>

typedef struct secret_arena secret_arena;

enum { SECRET_MAX = 16 * 1024 }; /* bytes of one value: it becomes a header field (LIMITS 1) */

typedef struct {
    char sentence[2048];
} secret_problem;

/* An arena of at least `size` bytes (rounded up to pages); NULL with errno when there is no memory. */
secret_arena *secret_arena_new(size_t size);
void secret_arena_free(secret_arena *arena);

/* Whether the memory is locked: not when RLIMIT_MEMLOCK is too small. */
bool secret_arena_locked(const secret_arena *arena);

/* Bytes in use, alignment included. */
size_t secret_arena_used(const secret_arena *arena);

/* False in a child that was forked after the arena was made: its values are zeroes there. */
bool secret_arena_alive(const secret_arena *arena);

/* First fit, 16-byte aligned and zeroed; NULL when no gap is large enough, or len is 0. */
char *secret_alloc(secret_arena *arena, size_t len);

/* Wipe and give back. `bytes` is what secret_alloc, secret_load or secret_put gave; NULL is ignored. */
void secret_free(secret_arena *arena, char *bytes);

/* A value from a file, read straight into the arena: a regular file of 1 to SECRET_MAX visible ASCII characters (0x21
 * to 0x7e), after which one LF or CRLF is ignored. NULL with a problem that names the file. */
char *secret_load(secret_arena *arena, const char *path, size_t *len, secret_problem *problem);

/* A value from memory, under the same rule but for the line end, which is refused. The caller wipes its own copy. */
char *secret_put(secret_arena *arena, const char *bytes, size_t len, secret_problem *problem);

#endif
